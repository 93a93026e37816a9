"""The Detectron2 engine beside Detectron2 itself: what loads, what it sees, how it counts, how it goes on.

All of it needs Detectron2, which no package registry has; `tests/benchmarks/test__detection.py` has what can
be tested without.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test__detection import (
    ARCHITECTURE,
    CLASSES,
    SMALL,
    coco_scene,
    image,
    prepared_files,
    random_scenes,
    spec_of,
)

from simclr import BadInput, checkpoint, convert, files, rolling
from simclr.benchmarks import _detection
from simclr.benchmarks import _detection_detectron2 as engine
from simclr.benchmarks import _detection_torchvision as peer
from simclr.benchmarks._detection_metrics import coco_metrics, coco_of, voc_metrics
from simclr.benchmarks.coco2017_detection import Config as Coco
from simclr.benchmarks.voc0712_detection import Config as Voc
from simclr.model import resnet

pytest.importorskip("detectron2", reason="Detectron2 is not installed")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    checkpoint.save_backbone(path, resnet(ARCHITECTURE).state_dict(), {"architecture": ARCHITECTURE})
    return checkpoint.Backbone.open(path)


def built(spec, **changes):
    """Return Detectron2's model of a spec, with changes of the config's RESNETS."""
    from detectron2.modeling import build_model

    cfg = engine.configure(spec, "cpu").clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.update(changes)
    torch.manual_seed(1)
    return build_model(cfg)


DETECTORS = {"c4": Voc(**SMALL), "fpn": Coco(**SMALL)}


@pytest.mark.parametrize("detector", DETECTORS)
def test_all_tensors_of_the_backbone_arrive(backbone, tmp_path, detector):
    spec = spec_of(backbone, DETECTORS[detector], tmp_path)
    report = engine.load_backbone(built(spec), spec)
    assert (report["expected"], report["loaded"], report["unmatched"]) == (318, 318, [])
    maps = {"c4": (4, 5), "fpn": (2, 3, 4, 5)}[detector]
    assert set(report["largest_relative_difference"]) == {f"feature{i}" for i in maps}


def raw(state):
    return {"model": state, "matching_heuristics": True}


def prefixed(state):
    names = {f"module.{convert.detectron2_key(key)}": value for key, value in state.items()}
    return {"model": names, "matching_heuristics": True}


def without_heuristics(state):
    return {"model": {convert.detectron2_key(key): value for key, value in state.items()}}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("fault", [raw, prefixed, without_heuristics])
def test_what_detectron2_would_not_load_is_refused(backbone, tmp_path, fault, detector):
    """Three of the five silent failures: its own loader goes on with these files, and random weights."""
    from detectron2.checkpoint import DetectionCheckpointer

    spec = spec_of(backbone, DETECTORS[detector], tmp_path)
    model, state = built(spec), backbone.state()
    torch.save(fault(state), tmp_path / "weights.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "weights.pth"))
    own = model.state_dict()
    found = {key: own.get(engine.model_key(key, detector)) for key in state}
    with pytest.raises(BadInput, match="of 318 backbone tensors did not arrive"):
        _detection.load_report(found, state, "detectron2")


def test_the_exported_file_is_one_that_detectron2_loads_whole(backbone, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    convert.convert(backbone, "detectron2", tmp_path / "weights.pth")
    spec, state = spec_of(backbone, DETECTORS["c4"], tmp_path), backbone.state()
    model = built(spec)
    DetectionCheckpointer(model).load(str(tmp_path / "weights.pth"))
    own = model.state_dict()
    found = {key: own.get(engine.model_key(key, "c4")) for key in state}
    assert _detection.load_report(found, state, "detectron2")["loaded"] == 318


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_stride_in_the_first_convolution_is_refused(backbone, tmp_path, detector):
    """The fourth: every tensor arrives, and res3 to res5 are other maps."""
    spec = spec_of(backbone, DETECTORS[detector], tmp_path)
    with pytest.raises(BadInput, match="features of a fixed input do not agree"):
        engine.load_backbone(built(spec, STRIDE_IN_1X1=True), spec)


def test_both_engines_see_the_same_pixels(tmp_path):
    """The fifth: RGB in the right order, resized by PIL, divided by the standard deviation."""
    from detectron2.data import DatasetMapper

    photo = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    line = image("photo", file_name=str(tmp_path / "photo.png"))
    spec = {**spec_of(checkpoint_of(tmp_path), DETECTORS["c4"], tmp_path), "backbone": ""}
    cfg = engine.configure(spec, "cpu")
    theirs = DatasetMapper(cfg, is_train=False)(dict(line))["image"]
    ours = peer.pixels(peer.resized(line, 64, 128))
    assert torch.equal(theirs, ours)
    model, detector = built(spec), peer.build(resnet(ARCHITECTURE), spec["protocol"], 2, masks=False)
    batch = model.preprocess_image([{"image": theirs}]).tensor
    torch.testing.assert_close(batch, detector._batch([ours]))
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def checkpoint_of(folder):
    path = folder / "b.safetensors"
    checkpoint.save_backbone(path, resnet(ARCHITECTURE).state_dict(), {"architecture": ARCHITECTURE})
    return checkpoint.Backbone.open(path)


@pytest.mark.parametrize("images", [4, 8, 32])
def test_the_linear_rule_is_detectron2s(tmp_path, images):
    from detectron2.engine import DefaultTrainer

    spec = {**spec_of(checkpoint_of(tmp_path), Voc(), tmp_path), "classes": 20}
    cfg = engine.configure(spec, "cpu").clone()
    cfg.defrost()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 16
    theirs = DefaultTrainer.auto_scale_workers(cfg, images).SOLVER
    ours = _detection.scaled(Voc(images_per_iteration=images).model_dump(mode="json"))
    assert ours["batch_size"] == theirs.IMS_PER_BATCH
    assert (ours["lr"], ours["iterations"]) == (theirs.BASE_LR, theirs.MAX_ITER)
    assert (tuple(ours["steps"]), ours["warmup_iterations"]) == (theirs.STEPS, theirs.WARMUP_ITERS)


# ---------------------------------------------------------------- the evaluators


def instances(found):
    """Return detections of one image as Detectron2's models give them."""
    from detectron2.structures import Boxes, Instances

    result = Instances((60, 80))
    result.pred_boxes = Boxes(torch.tensor([each["bbox"] for each in found]).reshape(-1, 4))
    result.scores = torch.tensor([each["score"] for each in found], dtype=torch.float64)
    result.pred_classes = torch.tensor([each["category_id"] for each in found], dtype=torch.int64)
    return result


def by_image(truth, found):
    for entry in truth:
        chosen = [each for each in found if each["image_id"] == entry["image_id"]]
        yield {"image_id": entry["image_id"]}, chosen


def write_voc(truth, folder):
    """Write what the evaluator reads: one XML per image, with corners counted from 1, and the list."""
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for entry in truth:
        objects = "".join(
            f"<object><name>{CLASSES[each['category_id']]}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{each['difficult']}</difficult><bndbox><xmin>{int(x0) + 1}</xmin><ymin>{int(y0) + 1}"
            f"</ymin><xmax>{int(x1)}</xmax><ymax>{int(y1)}</ymax></bndbox></object>"
            for each in entry["annotations"]
            for x0, y0, x1, y1 in [each["bbox"]]
        )
        path = folder / f"Annotations/{entry['image_id']}.xml"
        path.write_text(f"<annotation>{objects}</annotation>")
    names = "\n".join(str(entry["image_id"]) for entry in truth)
    (folder / "ImageSets/Main/test.txt").write_text(names)


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("seed", range(4))
def test_voc_metrics_equal_detectron2s(tmp_path, seed, year):
    """2007: eleven points. 2012: the area under the curve."""
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import PascalVOCDetectionEvaluator

    truth, found = random_scenes(seed, images=40)
    ranks = np.random.RandomState(seed).permutation(len(found)) + 1
    for each, rank in zip(found, ranks, strict=True):
        each["score"] = float(rank) / 1000  # its order of equal scores is left to chance
    write_voc(truth, tmp_path)
    name = f"voc_{seed}_{year}"
    MetadataCatalog.get(name).set(
        dirname=str(tmp_path), split="test", year=year, thing_classes=CLASSES, evaluator_type="voc"
    )
    try:
        evaluator = PascalVOCDetectionEvaluator(name)
        evaluator.reset()
        for entry, chosen in by_image(truth, found):
            evaluator.process([entry], [{"instances": instances(chosen)}])
        theirs = evaluator.evaluate()["bbox"]
    finally:
        MetadataCatalog.pop(name)
    metrics = voc_metrics(truth, found, CLASSES)
    ours = metrics if year == 2007 else metrics.details["area"]
    assert ours == pytest.approx({"ap": theirs["AP"], "ap50": theirs["AP50"], "ap75": theirs["AP75"]})
    assert metrics["ap"] != pytest.approx(metrics.details["area"]["ap"])


def test_coco_metrics_equal_detectron2s(tmp_path):
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator

    truth, found = coco_scenes()
    nothing = torch.zeros(60, 80, dtype=torch.uint8)
    content = coco_of(truth, CLASSES).dataset
    (tmp_path / "coco.json").write_text(json.dumps(content))
    MetadataCatalog.get("coco").set(
        json_file=str(tmp_path / "coco.json"),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        thing_classes=CLASSES,
    )
    try:
        evaluator = COCOEvaluator("coco", ("bbox", "segm"), False, str(tmp_path), use_fast_impl=False)
        evaluator.reset()
        for entry, chosen in by_image(truth, found):
            result = instances(chosen)
            result.pred_masks = torch.stack([nothing, *map(decoded, chosen)])[1:].bool()
            evaluator.process([entry], [{"instances": result}])
        theirs = evaluator.evaluate()
    finally:
        MetadataCatalog.pop("coco")
    ours = coco_metrics(truth, found, CLASSES)
    assert ours["mask_ap"] > 1
    for kind, key in (("bbox", "box"), ("segm", "mask")):
        found = [ours[f"{key}_{name}"] for name in ("ap", "ap50", "ap75")]
        assert found == pytest.approx([theirs[kind][name] for name in ("AP", "AP50", "AP75")])


def coco_scenes():
    """Return scenes of boxes with octagonal masks, a crowd among them, and detections near them."""
    truth, found = random_scenes(3, images=20)
    truth = [{**each, "annotations": [octagonal(entry) for entry in each["annotations"]]} for each in truth]
    truth += coco_scene(crowd=1)[:1]
    truth[-1]["image_id"] = 99
    inside = [{**each, "bbox": np.clip(each["bbox"], 0, (80, 60, 80, 60)).tolist()} for each in found]
    return truth, [
        {**each, "segmentation": encoded(each["bbox"])} for each in inside if decoded_area(each["bbox"])
    ]


def octagonal(entry):
    return {**entry, "segmentation": [corners(entry["bbox"])]}


def corners(box):
    angles = np.linspace(0, 2 * np.pi, 9)[:-1] + np.pi / 8
    ellipse = (np.stack([np.cos(angles), np.sin(angles)], 1) + 1) / 2
    low, high = np.array(box[:2]), np.array(box[2:])
    return (low + ellipse * (high - low)).ravel().tolist()


def encoded(box):
    from pycocotools import mask as coco

    rle = coco.merge(coco.frPyObjects([corners(box)], 60, 80))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def decoded_area(box):
    return box[2] - box[0] > 1 and box[3] - box[1] > 1


def decoded(detection):
    from pycocotools import mask as coco

    return torch.from_numpy(coco.decode(detection["segmentation"]))


# ---------------------------------------------------------------- the whole engine


@pytest.fixture
def prepared(backbone, tmp_path):
    """config → its spec file, with four images to train on and to test, and the result file."""

    def prepare(config):
        return prepared_files(backbone, config, tmp_path)

    return prepare


def test_a_diverging_training_is_one_sentence(prepared, monkeypatch):
    monkeypatch.setenv("SIMCLR_DETECTRON2_PYTHON", sys.executable)
    files = prepared(DETECTORS["c4"].model_copy(update={"lr": 1e12, "warmup_iterations": 0}))
    with pytest.raises(BadInput, match=r"training diverged: .*; lower lr or warm up longer"):
        _detection._run("detectron2", *files)


@pytest.fixture
def unregister():
    """Let the engine register its lists again, at once and when the test is over."""
    from detectron2.data import DatasetCatalog

    def remove():
        for name in (engine.TRAIN, engine.TEST):
            DatasetCatalog.remove(name)

    yield remove
    remove()


def program(prepared, tmp_path, **changes):
    """Return what runs the engine in a process of its own, as keywords of `subprocess.Popen`."""
    files = [str(path) for path in prepared(DETECTORS["c4"].model_copy(update=changes))]
    root = str(Path(engine.__file__).parents[2])
    return {
        "args": [sys.executable, "-u", "-m", engine.__name__, *files],
        "env": {**os.environ, "PYTHONPATH": root},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_run_killed_at_once_goes_on_and_detects(prepared, tmp_path, detector):
    config = DETECTORS[detector].model_copy(update={"precise_bn": 1})
    call = program(lambda _: prepared(config), tmp_path)
    with subprocess.Popen(**call) as killed:
        for _ in range(600):
            if list(tmp_path.glob("checkpoint-*.pt")) or killed.poll() is not None:
                break
            time.sleep(0.1)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run(**call)
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.search(r"Starting training from iteration [2468]\n", done.stdout)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["load"]["loaded"], result["software"]["detectron2"]) == (318, "0.6")
    assert result["usage"]["seconds"] > 0
    assert {each["image_id"] for each in result["detections"]} <= set(range(4))
    assert ("segmentation" in result["detections"][0]) == config.masks
    assert not list(tmp_path.glob("checkpoint-*.pt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_training_that_is_asked_to_stop_saves_at_once(prepared, tmp_path, number):
    call = program(prepared, tmp_path, iterations=100_000, checkpoint_every=100_000)
    with subprocess.Popen(**call) as stopped:
        assert any(" iter: 19 " in line for line in stopped.stdout)
        stopped.send_signal(number)
        said = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == rolling.STOPPED
    (saved,) = tmp_path.glob("checkpoint-*.pt")
    step = torch.load(saved, weights_only=True)["step"]
    assert f"stopped after iteration {step} of 100000; the same command goes on" in said
    with subprocess.Popen(**call) as resumed:
        assert any(f"Starting training from iteration {step}\n" in line for line in resumed.stdout)
        resumed.kill()


def test_a_kill_during_the_test_costs_no_training(prepared, monkeypatch, unregister):
    """The record, too, is what it would have been; but for what the test took."""
    from detectron2 import evaluation
    from detectron2.engine import SimpleTrainer

    spec = json.loads(prepared(DETECTORS["c4"])[0].read_text())
    reports = []

    def killed(*_):
        raise KeyboardInterrupt

    def reported(*given):
        reports.append(report(*given))
        return reports[-1]

    report = engine.training_report
    monkeypatch.setattr(engine, "training_report", reported)
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "inference_on_dataset", killed)
        with pytest.raises(KeyboardInterrupt):
            engine.worker(spec)
    monkeypatch.setattr(SimpleTrainer, "run_step", killed)
    unregister()
    result = engine.run(spec)
    assert result["losses"] == reports[-1]["losses"] != {}
    assert {**reports[-1]["usage"], "test_seconds": result["usage"]["test_seconds"]} == result["usage"]
    assert result["usage"]["seconds_per_iteration"] > 0


def test_every_start_has_an_order_and_draws_of_its_own(prepared):
    """A training in many short turns would else see the same few images again and again."""
    spec = json.loads(prepared(DETECTORS["c4"])[0].read_text())
    seeds = [engine.configure({**spec, "seed": seed}, start=step).SEED for seed in (0, 1) for step in (0, 5)]
    assert len(set(seeds)) == 4
    again = engine.configure(spec, start=5).SEED
    assert again == seeds[1]


@pytest.mark.parametrize("fault", ["missing", "damaged", "resized", "turned"])
def test_an_image_that_is_not_as_verified_is_one_sentence(prepared, monkeypatch, capfd, fault):
    monkeypatch.setenv("SIMCLR_DETECTRON2_PYTHON", sys.executable)
    files = prepared(DETECTORS["c4"])
    path = files[0].with_name("2.jpg")
    if fault == "missing":
        path.unlink()
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:600])
    elif fault == "resized":
        Image.new("RGB", (8, 6)).save(path)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (80, 60)).save(path, exif=exif)
    said = {
        "missing": "no such image; restore it",
        "damaged": "cannot be decoded .*replace it by an intact copy",
        "resized": "expected 80 × 60 pixels, as its annotation says; found 8 × 6",
        "turned": "Detectron2 cannot read it .*set engine: torchvision",
    }
    with pytest.raises(BadInput, match=rf"2\.jpg: {said[fault]}"):
        _detection._run("detectron2", *files)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("unregister")
def test_a_full_disk_is_one_sentence(prepared, monkeypatch):

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    spec = json.loads(prepared(DETECTORS["c4"])[0].read_text())
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device; free some"):
        engine.worker(spec)


@pytest.mark.usefixtures("unregister")
def test_a_loaders_workers_leave_a_signal_to_the_training(prepared):
    """A cluster signals all processes of a job."""
    spec = json.loads(prepared(DETECTORS["c4"])[0].read_text())
    engine.register(spec)
    cfg = engine.configure(spec, "cpu").clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 2
    trainer = engine.make_trainer(cfg, spec["run"])
    batches = trainer._trainer._data_loader_iter
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(20):
        next(batches)
    assert (len(workers), all(worker.is_alive() for worker in workers)) == (2, True)
    trainer.max_iter = trainer.start_iter
    trainer.train()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.usefixtures("unregister")
def test_the_state_of_another_run_is_refused(prepared):
    spec = json.loads(prepared(DETECTORS["c4"])[0].read_text())
    rolling.save(Path(spec["folder"]), 2, {**spec["run"], "seed": 1}, {})
    with pytest.raises(BadInput, match="found one of another: seed is 1 there, 0 here; delete it"):
        engine.worker(spec)


RANKS = """
import signal, time
from simclr import BadInput, distributed, rolling
from simclr.benchmarks import _detection_detectron2 as engine

def stop(spec, folder):
    with rolling.stop_signals() as signals:
        (folder / f"rank{distributed.rank()}").touch()
        while not distributed.any_rank(bool(signals), "cpu"):
            time.sleep(0.05)
        rolling.stop("soon", signals)

def stay(spec, folder):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / f"rank{distributed.rank()}").touch()
    time.sleep(60)

def refuse(spec, folder):
    raise BadInput("no such thing")

def worker(spec):
    engine._work = {"stop": stop, "stay": stay, "refuse": refuse}[spec["work"]]
    engine.worker(spec)
"""


@pytest.mark.parametrize("work", ["stop", "stay", "refuse"])
def test_ranks_stop_and_end_with_the_engine(tmp_path, work):
    """Those that are asked to stop do so together; none outlives an engine that is killed."""
    (tmp_path / "ranks.py").write_text(RANKS)
    root = str(Path(engine.__file__).parents[2])
    spec = {"folder": str(tmp_path), "work": work}
    start = f"import ranks; from ranks import engine; engine.worker = ranks.worker; engine.start(2, {spec})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    call = [sys.executable, "-c", start]
    with subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True) as started:
        ready = [tmp_path / f"rank{i}" for i in (0, 1)]
        while not all(path.exists() for path in ready) and started.poll() is None:
            time.sleep(0.1)
        time.sleep(0.2)
        started.send_signal(signal.SIGTERM if work == "stop" else signal.SIGKILL)
        try:
            said = started.communicate(timeout=30)[1]  # all have closed it
        finally:
            started.kill()
    status = {"stop": rolling.STOPPED, "stay": -signal.SIGKILL, "refuse": 2}
    assert started.returncode == status[work]
    assert "Traceback" not in said
    assert said.count("stopped soon") == (work == "stop")
