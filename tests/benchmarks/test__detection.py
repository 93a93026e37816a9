"""What both engines share: lists, metrics, the work folder, and what is refused."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_coco2017_detection import TINY

from simclr import BadInput, checkpoint, convert, rolling
from simclr.benchmarks import _detection
from simclr.benchmarks import _detection_detectron2 as detectron2
from simclr.benchmarks import _detection_torchvision as engine
from simclr.benchmarks._detection_metrics import coco_metrics, measured, voc_metrics
from simclr.benchmarks._detection_sheet import draw
from simclr.benchmarks.coco2017_detection import Config as Coco
from simclr.benchmarks.voc0712_detection import Config
from simclr.model import resnet

CLASSES = ["zero", "one"]
ARCHITECTURE = "resnet50_w0.125"
SMALL = {**TINY, "iterations": 8, "steps": [6], "checkpoint_every": 2}


def image(image_id, *objects, **keys):
    annotations = [
        {"bbox": list(map(float, box)), "category_id": label, "iscrowd": 0, "difficult": int(difficult)}
        for box, label, difficult in objects
    ]
    shape = {"file_name": f"{image_id}.jpg", "image_id": image_id, "height": 60, "width": 80}
    return {**shape, "annotations": annotations, **keys}


def detection(image_id, box, score, label=0):
    return {"image_id": image_id, "bbox": list(map(float, box)), "score": score, "category_id": label}


def spec_of(backbone, config, folder):
    return {
        "protocol": _detection.scaled(config.model_dump(mode="json")),
        "masks": config.masks,
        "classes": len(CLASSES),
        "architecture": ARCHITECTURE,
        "backbone": str(backbone.path),
        "folder": str(folder),
        "seed": 0,
        "run": {"checkpoint_sha256": backbone.checkpoint_sha256, "seed": 0},
    }


def prepared_files(backbone, config, folder):
    """Return the spec file of four images to train on and to test, and where the result will be."""
    folder.mkdir(exist_ok=True)
    spec = {**spec_of(backbone, config, folder), "engine": config.engine}
    lines = []
    for i in range(4):
        path = folder / f"{i}.jpg"
        Image.effect_noise((80, 60), 90).convert("RGB").save(path)
        scene = image(i, ((20, 10, 60, 50), i % 2, False), file_name=str(path))
        scene["annotations"][0]["segmentation"] = square((20, 10, 60, 50))
        lines.append(scene)
    _detection.write_lines(folder / "images.jsonl", lines)
    spec["train"] = spec["test"] = str(folder / "images.jsonl")
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder / "spec.json", folder / "result.json"


def random_scenes(seed, images=12):
    random = np.random.RandomState(seed)
    truth, found = [], []
    for i in range(images):
        objects = []
        for _ in range(random.randint(1, 4)):
            corner = random.randint(0, 40, 2)
            box = [*corner, *(corner + random.randint(8, 20, 2))]
            objects.append((box, int(random.randint(2)), random.rand() < 0.2))
            for _ in range(random.randint(0, 3)):
                shifted = np.array(box) + random.normal(0, 2, 4)
                found.append(detection(i, shifted.tolist(), float(random.rand()), int(random.randint(2))))
        truth.append(image(i, *objects))
    return truth, found


def slow_ap(truth, found, label, threshold):
    """The development kit in loops: descending scores, one object per detection.

    Returns VOC2007's mean over 11 recall levels, and VOC2010's area.
    """
    objects = [
        {"image": i["image_id"], "difficult": a["difficult"], "taken": False}
        | {"box": [a["bbox"][0] + 1, a["bbox"][1] + 1, a["bbox"][2], a["bbox"][3]]}
        for i in truth
        for a in i["annotations"]
        if a["category_id"] == label
    ]
    positives = sum(not each["difficult"] for each in objects)
    curve, right, wrong = [], 0, 0
    rows = [d for d in found if d["category_id"] == label]
    for d in sorted(rows, key=lambda d: -round(d["score"], 3)):
        x0, y0, x1, y1 = d["bbox"]
        box = [round(x0 + 1, 1), round(y0 + 1, 1), round(x1, 1), round(y1, 1)]
        best, best_iou = None, threshold
        for each in objects:
            if each["image"] == d["image_id"] and slow_iou(box, each["box"]) > best_iou:
                best, best_iou = each, slow_iou(box, each["box"])
        if best is None or (best["taken"] and not best["difficult"]):
            wrong += 1
        elif not best["difficult"]:
            best["taken"] = True
            right += 1
        curve.append((right / positives, right / max(right + wrong, 1e-9)))
    levels = [max((p for r, p in curve if r >= 0.1 * k), default=0) for k in range(11)]
    area = sum(max(p for r, p in curve if r >= k / positives) for k in range(1, right + 1)) / positives
    return sum(levels) / 11, area


def slow_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("seed", range(6))
def test_voc_metrics_equal_the_slow_ones(seed):
    truth, found = random_scenes(seed)
    metrics = voc_metrics(truth, found, CLASSES)
    table = np.array([[slow_ap(truth, found, c, t / 100) for t in range(50, 100, 5)] for c in (0, 1)])
    for i, values in enumerate((metrics, metrics.details["area"])):
        expected = {"ap50": table[:, 0, i], "ap": table[..., i], "ap75": table[:, 5, i]}
        assert values == pytest.approx({key: 100 * part.mean() for key, part in expected.items()})


def test_voc_metrics_by_hand():
    """Two objects, found at scores .9 and .1 with a wrong detection between: precision 1, then 2/3."""
    truth = [image("a", ((0, 0, 10, 10), 0, False), ((30, 30, 50, 50), 0, False))]
    found = [detection("a", (0, 0, 10, 10), 0.9), detection("a", (60, 0, 70, 9), 0.5)]
    found.append(detection("a", (30, 30, 50, 50), 0.1))
    metrics = voc_metrics(truth, found, CLASSES[:1])
    assert metrics["ap50"] == pytest.approx(100 * (6 * 1 + 5 * 2 / 3) / 11)
    assert metrics == {key: pytest.approx(metrics["ap50"]) for key in ("ap50", "ap", "ap75")}
    assert metrics.details["area"] == {key: pytest.approx(100 * (1 + 2 / 3) / 2) for key in metrics}


def test_a_difficult_object_counts_neither_way_and_a_second_hit_is_wrong():
    truth = [image("a", ((0, 0, 10, 10), 0, False), ((30, 30, 50, 50), 0, True))]
    hit, difficult = detection("a", (0, 0, 10, 10), 0.5), detection("a", (30, 30, 50, 50), 0.9)
    assert voc_metrics(truth, [difficult, hit], CLASSES[:1])["ap"] == pytest.approx(100)
    again = detection("a", (0, 0, 10, 10), 0.6)
    truth[0]["annotations"].append({**truth[0]["annotations"][0], "bbox": [60, 0, 70, 10]})
    late = detection("a", (60, 0, 70, 10), 0.1)
    metrics = voc_metrics(truth, [again, hit, late], CLASSES[:1])
    assert metrics["ap50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


def test_scores_are_rounded_to_three_decimals_before_they_are_ranked():
    truth = [image("a", ((0, 0, 10, 10), 0, False))]
    wrong, right = detection("a", (40, 0, 50, 10), 0.50004), detection("a", (0, 0, 10, 10), 0.50005)
    assert voc_metrics(truth, [wrong, right], CLASSES[:1])["ap50"] == pytest.approx(50)


def test_equal_scores_are_ranked_in_the_order_of_the_file():
    truth = [image("a", ((0, 0, 10, 10), 0, False), ((20, 0, 30, 10), 0, False))]
    right = [detection("a", box, 0.5) for box in ((0, 0, 10, 10), (20, 0, 30, 10))]
    wrong = [detection("a", (40, 0, 50, 10), score) for score in (0.5, 0.6) * 50]
    assert voc_metrics(truth, right + wrong, CLASSES[:1])["ap50"] == pytest.approx(100 * 2 / 52)
    assert voc_metrics(truth, wrong + right, CLASSES[:1])["ap50"] == pytest.approx(100 * 2 / 102)


def test_a_class_without_objects_has_no_ap():
    truth = [image("a", ((0, 0, 10, 10), 0, False), ((0, 0, 10, 10), 1, True))]
    with pytest.raises(BadInput, match="class one that is not difficult"):
        voc_metrics(truth, [detection("a", (0, 0, 10, 10), 0.9)], CLASSES)


def test_no_detection_is_no_number():
    with pytest.raises(BadInput, match="found nothing above score_threshold in 1 test images"):
        measured(voc_metrics, [image("a", ((0, 0, 9, 9), 0, False))], [], CLASSES)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_detections_that_are_no_numbers_are_no_ap(score):
    found = [detection("a", (0, 0, 9, 9), 0.9), detection("b", (0, 0, 9, 9), score)]
    truth = [image("a", ((0, 0, 9, 9), 0, False))]
    with pytest.raises(BadInput, match="1 of 2 detections are no finite numbers, the first in image b"):
        measured(voc_metrics, truth, found, CLASSES[:1])


def square(box):
    x0, y0, x1, y1 = map(float, box)
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def coco_scene(crowd=0):
    boxes = [(0, 0, 10, 10), (30, 30, 50, 50)]
    truth = [image(i, *((box, 0, False) for box in boxes)) for i in (7, 8)]
    for each in truth:
        for annotation in each["annotations"]:
            annotation.update(segmentation=square(annotation["bbox"]), iscrowd=crowd)
    return truth


def coco_detection(image_id, box, score):
    from pycocotools import mask as coco

    rle = coco.merge(coco.frPyObjects(square(box), 60, 80))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    return {**detection(image_id, box, score), "segmentation": segmentation}


def test_coco_metrics_by_hand():
    """Half of four objects found, nothing wrong: COCO's 101 recall levels reach 0.5, so 51 of them hold."""
    found = [coco_detection(7, (0, 0, 10, 10), 0.9), coco_detection(8, (30, 30, 50, 50), 0.8)]
    metrics = coco_metrics(coco_scene(), found, CLASSES[:1])
    assert metrics == {key: pytest.approx(100 * 51 / 101) for key in metrics}
    assert list(metrics) == ["box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"]


def test_coco_without_an_object_is_refused():
    with pytest.raises(BadInput, match="no crowd"):
        coco_metrics(coco_scene(crowd=1), [coco_detection(7, (0, 0, 9, 9), 0.9)], CLASSES[:1])


def test_coco_refuses_an_object_of_which_pycocotools_makes_no_mask():
    """It takes four numbers for a box, and stumbles over a list; a later short polygon is read."""
    found, shape = [coco_detection(7, (0, 0, 10, 10), 0.9)], square((0, 0, 10, 10))
    scene = coco_scene()
    scene[0]["annotations"][0]["segmentation"] = [*shape, [1.0, 1.0, 4.0, 4.0]]
    assert coco_metrics(scene, found, CLASSES[:1])["mask_ap50"] > 0
    scene[0]["annotations"][0]["segmentation"] = [[1.0, 1.0, 4.0, 4.0], *shape]
    with pytest.raises(BadInput, match=r"7.jpg: an object has a first polygon of less than three points"):
        coco_metrics(scene, found, CLASSES[:1])


def test_training_keeps_difficult_objects_and_drops_crowds_and_empty_images():
    crowd = image("b", ((0, 0, 9, 9), 0, False))
    crowd["annotations"][0]["iscrowd"] = 1
    kept = _detection.training_images([image("a", ((0, 0, 9, 9), 1, True)), crowd, image("c")], masks=False)
    assert [each["image_id"] for each in kept] == ["a"]
    assert kept[0]["annotations"][0]["category_id"] == 1


def test_masks_need_polygons_of_three_points():
    truth = image("a", ((0, 0, 9, 9), 0, False), ((0, 0, 5, 5), 1, False))
    first, second = truth["annotations"]
    first["segmentation"], second["segmentation"] = square(first["bbox"]), [[1.0, 1.0, 2.0, 2.0]]
    kept = _detection.training_images([truth], masks=True)
    assert [each["category_id"] for each in kept[0]["annotations"]] == [0]
    first["segmentation"] = {"size": [60, 80], "counts": "0"}
    with pytest.raises(BadInput, match="expected polygons"):
        _detection.training_images([truth], masks=True)


def test_difficult_objects_can_be_left_out():
    both = image("a", ((0, 0, 9, 9), 1, True), ((0, 0, 9, 9), 0, False))
    alone = image("b", ((0, 0, 9, 9), 1, True))
    kept = _detection.training_images([both, alone], masks=False, difficult=False)
    assert [(i["image_id"], [e["category_id"] for e in i["annotations"]]) for i in kept] == [("a", [0])]


@pytest.mark.parametrize("images", [4, 8, 32, 48])
def test_other_batches_follow_the_linear_rule(images):
    """As Detectron2's DefaultTrainer.auto_scale_workers: rate by the ratio, iterations by its inverse."""
    given = Config(images_per_iteration=images).model_dump(mode="json")
    scaled, ratio = _detection.scaled(given), images / 16
    assert (scaled["batch_size"], scaled["lr"]) == (images, pytest.approx(0.02 * ratio))
    assert scaled["iterations"] == round(24000 / ratio)
    assert scaled["steps"] == [round(18000 / ratio), round(22000 / ratio)]
    assert scaled["warmup_iterations"] == round(100 / ratio)
    kept = given.keys() - {*_detection.SCHEDULE, "images_per_iteration"}
    assert {key: scaled[key] for key in kept} == {key: given[key] for key in kept}


def test_the_published_batch_leaves_the_schedule_as_it_is():
    given = Config().model_dump(mode="json")
    assert _detection.scaled(given) == given


def test_classes_that_coco_leaves_out_are_named():
    found = [coco_detection(7, (0, 0, 10, 10), 0.9)]
    alone, both = (coco_metrics(coco_scene(), found, names) for names in (CLASSES[:1], CLASSES))
    assert (alone, alone.details) == (both, {"absent_classes": []})
    assert both.details == {"absent_classes": ["one"]}


def test_what_all_trials_took():
    one = {"processes": 8, "gpu": "H100", "seconds": 3000.0, "seconds_per_iteration": 0.5}
    one |= {"test_seconds": 600.0, "peak_memory_gb": 9.0}
    trials = [one, {**one, "seconds": 1200.0, "peak_memory_gb": 10.0}]
    took = _detection.total(trials)
    assert (took["gpu_hours"], took["peak_memory_gb"], took["processes"]) == (12, 10, 8)
    assert _detection.total([{**each, "gpu": None} for each in trials])["gpu_hours"] == 0


def test_an_engine_leaves_its_refusal_where_it_is_looked_for(tmp_path):
    (tmp_path / "spec.json").write_text("{}")

    def refuse(spec):
        raise BadInput("no such thing")

    assert _detection.main(refuse, [str(tmp_path / "spec.json"), str(tmp_path / "result.json")]) == 2
    assert (tmp_path / _detection.REFUSAL).read_text() == "no such thing"
    assert not (tmp_path / "result.json").exists()


def test_a_gpu_with_too_little_memory_is_one_sentence(tmp_path):
    (tmp_path / "spec.json").write_text("{}")

    def train(spec):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …")

    assert _detection.main(train, [str(tmp_path / "spec.json"), str(tmp_path / "result.json")]) == 2
    said = (tmp_path / _detection.REFUSAL).read_text()
    assert said.startswith("the GPU has too little memory (CUDA out of memory); let `gpus`")
    assert "images_per_iteration" in said


def test_an_engine_that_cannot_even_say_why_it_refuses_is_one_sentence(tmp_path, monkeypatch):
    """On a disk that is full."""
    monkeypatch.setattr(_detection, "main", lambda *_: 2)
    with pytest.raises(BadInput, match=r"refused\.txt: no space for what the torchvision engine has to say"):
        _detection._run("torchvision", tmp_path / "spec.json", tmp_path / "result.json")


def test_an_engine_clears_what_a_killed_one_left(tmp_path):
    left, whole = tmp_path / ".checkpoint-000000002.pt.77.part", tmp_path / "checkpoint-000000002.pt"
    for path in (left, whole, tmp_path / "spec.json"):
        path.write_text("{}")
    files = [str(tmp_path / name) for name in ("spec.json", "result.json")]
    (tmp_path / "spec.json").write_text('{"run": {}}')
    assert _detection.main(lambda spec: {}, files) == 0
    assert not left.exists()
    assert whole.exists()


def test_load_report_names_what_did_not_arrive():
    state = {"conv1.weight": torch.ones(2), "bn1.weight": torch.ones(2)}
    assert _detection.load_report(dict(state), state, "x")["loaded"] == 2
    with pytest.raises(BadInput, match=r"1 of 2 backbone tensors did not arrive.*bn1\.weight"):
        _detection.load_report({**state, "bn1.weight": torch.zeros(2)}, state, "x")
    with pytest.raises(BadInput, match="did not arrive"):
        _detection.load_report({"conv1.weight": state["conv1.weight"], "bn1.weight": None}, state, "x")


def made(tmp_path, state, architecture="resnet50_w0.125", detector="c4", **changes):
    """Return the torchvision engine's detector and load report for a file of `state`."""
    path = tmp_path / "backbone.safetensors"
    save_file(state, path, {"architecture": architecture, **changes})
    protocol = (Config if detector == "c4" else Coco)().model_dump(mode="json")
    spec = {"backbone": str(path), "seed": 0, "architecture": "resnet50_w0.125", "protocol": protocol}
    return engine.make({**spec, "classes": 2, "masks": False}, torch.device("cpu"))


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return {key: value.contiguous() for key, value in resnet("resnet50_w0.125").state_dict().items()}


@pytest.mark.parametrize("detector", ["c4", "fpn"])
def test_the_torchvision_engine_loads_every_tensor(tmp_path, weights, detector):
    found, report = made(tmp_path, weights, detector=detector)
    assert (report["expected"], report["loaded"], report["unmatched"]) == (318, 318, [])
    assert max(report["largest_relative_difference"].values()) < 1e-5
    assert found.training


def detectron2s_names(weights):
    return {convert.detectron2_key(key): value for key, value in weights.items()}


def prefixed(weights):
    return {f"module.{key}": value for key, value in weights.items()}


def lacking(weights):
    return {key: value for key, value in weights.items() if not key.startswith("layer4.")}


@pytest.mark.parametrize("fault", [detectron2s_names, prefixed, lacking])
def test_the_torchvision_engine_loads_nothing_by_halves(tmp_path, weights, fault):
    """Files with which Detectron2's own loader would go on at random weights."""
    with pytest.raises(BadInput, match="expected exactly the 318 tensors"):
        made(tmp_path, fault(weights))


def test_a_checkpoint_of_another_depth_is_refused(tmp_path):
    shallow = {key: value.contiguous() for key, value in resnet("resnet18_w0.125").state_dict().items()}
    with pytest.raises(BadInput, match="expected exactly the 318 tensors"):
        made(tmp_path, shallow)


@pytest.mark.parametrize("detector", ["c4", "fpn"])
def test_weights_that_change_on_the_way_are_refused(tmp_path, weights, detector, monkeypatch):
    def blurred(*arguments):
        found = build(*arguments)
        next(found.backbone.parameters()).data.mul_(1 + 1e-6)
        return found

    build = engine.build
    monkeypatch.setattr(engine, "build", blurred)
    with pytest.raises(BadInput, match=r"1 of 318 backbone tensors did not arrive.*conv1\.weight"):
        made(tmp_path, weights, detector=detector)


@pytest.mark.parametrize("detector", ["c4", "fpn"])
def test_a_stride_in_the_first_convolution_is_refused(tmp_path, weights, detector, monkeypatch):
    """All tensors are in their places, and the maps are others."""

    def strided(architecture, state):
        found = build(architecture, state)
        for name in ("layer2", "layer3", "layer4"):
            first = getattr(found, name)[0]
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        return found

    build = checkpoint.build
    monkeypatch.setattr(checkpoint, "build", strided)
    with pytest.raises(BadInput, match="features of a fixed input do not agree"):
        made(tmp_path, weights, detector=detector)


def test_images_are_rgb_and_divided_by_the_standard_deviation(tmp_path, weights):
    Image.new("RGB", (80, 60), (200, 100, 50)).save(tmp_path / "photo.png")
    line = image("photo", file_name=str(tmp_path / "photo.png"))
    batch = made(tmp_path, weights)[0]._batch([engine.pixels(engine.resized(line, 60, 100))])
    expected = [(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375]
    assert batch.amin((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-5)
    assert batch.amax((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_batch_must_divide():
    assert _detection.per_process(16, 8) == 2
    with pytest.raises(BadInput, match=r"multiple of the 3 GPUs.*SIMCLR_GPUS"):
        _detection.per_process(16, 3)


@pytest.mark.parametrize(
    ("visible", "said", "expected"),
    [(0, None, 1), (8, None, 8), (6, "4", 4), (8, "1", 1), (8, "8", 8)],
)
def test_the_job_says_how_many_gpus_are_its_own(monkeypatch, visible, said, expected):
    """Locally all GPUs are visible: of six, which do not divide a batch of 16, the job asked for four."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("SIMCLR_GPUS", said or str(visible))
    if said is None:
        monkeypatch.delenv("SIMCLR_GPUS")
    launches = []
    monkeypatch.setattr(detectron2, "known", lambda: None)
    launch = SimpleNamespace(launch=lambda worker, processes, **keys: launches.append(processes))
    monkeypatch.setitem(sys.modules, "detectron2", SimpleNamespace(engine=launch))
    monkeypatch.setitem(sys.modules, "detectron2.engine", launch)
    protocol = {"detector": "c4", "batch_size": 16}
    spec = {"architecture": "resnet50", "folder": "/nowhere", "protocol": protocol}
    with pytest.raises(FileNotFoundError):  # nothing was detected
        detectron2.run(spec)
    command = _detection._torchvision_command()
    assert launches == [expected]
    assert expected == 1 if command is None else command[-1] == f"--nproc-per-node={expected}"


@pytest.mark.parametrize(("visible", "said"), [(2, "4"), (0, "1"), (2, "all"), (2, "0")])
def test_gpus_that_are_not_there_are_refused(monkeypatch, visible, said):
    monkeypatch.delenv("SIMCLR_ALLOW_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("SIMCLR_GPUS", said)
    with pytest.raises(BadInput, match=f"SIMCLR_GPUS: .*found {said}"):
        _detection.processes()
    monkeypatch.setenv("SIMCLR_ALLOW_CPU", "1")
    if not visible:
        assert _detection.processes() == 1


def test_missing_detectron2_is_one_sentence(monkeypatch):
    monkeypatch.delenv("SIMCLR_DETECTRON2_PYTHON", raising=False)
    monkeypatch.setattr(_detection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"envs/detectron2\.yaml.*engine: torchvision"):
        _detection._detectron2_command()
    monkeypatch.setenv("SIMCLR_DETECTRON2_PYTHON", sys.executable)
    assert _detection._detectron2_command() == [sys.executable]
    monkeypatch.setenv("SIMCLR_DETECTRON2_PYTHON", "/nowhere/python")
    with pytest.raises(BadInput, match=r"no program /nowhere/python.*engine: torchvision"):
        _detection._detectron2_command()


@pytest.mark.parametrize("broken", ["numpy", "pydantic", "safetensors", "detectron2", "detectron2._C"])
def test_a_python_that_cannot_run_detectron2_is_one_sentence(tmp_path, monkeypatch, broken):
    """It is asked before anything is trained: for what the engine needs from its first line on, and later."""
    packages = {"detectron2": "__version__ = '0.6'", "detectron2/_C": "", "detectron2/engine": ""}
    for name, text in {
        **packages,
        broken.replace(".", "/"): f"raise ImportError('{broken} is broken')",
    }.items():
        module = tmp_path / f"{name}.py" if "/" in name else tmp_path / name / "__init__.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SIMCLR_DETECTRON2_PYTHON", sys.executable)
    monkeypatch.setattr(_detection, "_call", None)  # nothing is started
    _detection.check_python.cache_clear()
    reason = rf"cannot run Detectron2 \(ImportError: {broken} is broken\); create .*envs/detectron2\.yaml"
    with pytest.raises(BadInput, match=rf"{reason}.*engine: torchvision"):
        _detection._run("detectron2", tmp_path / "spec.json", tmp_path / "result.json")


def test_a_python_without_anything_is_one_sentence(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(BadInput, match=rf"{python} cannot run Detectron2 \(it ended with status 3\); create"):
        _detection.check_python(str(python))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM])
def test_an_engine_ends_with_the_step(tmp_path, monkeypatch, number):
    """It is told of what asks the step to stop, and ends, too, when the time of its job of Slurm is over."""
    engines = tmp_path / "pid"
    program = (
        "import os, pathlib, signal, time\n"
        f"pathlib.Path({str(engines)!r}).write_text(str(os.getpid()))\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"  # the shell may have it ignored
        f"os.kill(os.getppid(), {number:d})\n"
        "time.sleep(10)\n"
        f"pathlib.Path({str(engines)!r}).unlink()"
    )
    monkeypatch.setattr(_detection, "_detectron2_command", lambda: [sys.executable, "-c", program])
    monkeypatch.setattr(_detection, "check_python", lambda _: None)

    def over(*_):
        if number == signal.SIGALRM:
            sys.exit(rolling.STOPPED)

    before = signal.signal(number, over)
    try:
        with pytest.raises(SystemExit) as end:
            _detection._run("detectron2", tmp_path / "spec.json", tmp_path / "result.json")
        assert signal.getsignal(number) is over
    finally:
        signal.signal(number, before)
    assert end.value.code == rolling.STOPPED
    with pytest.raises(ProcessLookupError):
        os.kill(int(engines.read_text()), 0)


def test_an_unknown_version_of_detectron2_is_refused(monkeypatch):
    for version in (*detectron2.VERSIONS, "0.7"):
        monkeypatch.setitem(sys.modules, "detectron2", SimpleNamespace(__version__=version))
        if version in detectron2.VERSIONS:
            detectron2.known()
    with pytest.raises(BadInput, match=r"expected Detectron2 0\.6, found 0\.7"):
        detectron2.known()


@pytest.mark.parametrize("work", [(detectron2, "worker", "_work"), (engine, "run", "make")])
def test_neither_engine_computes_in_tf32(tmp_path, monkeypatch, work):
    module, start, does = work
    matmul = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def look(*_):
        raise BadInput(str([torch.backends.cudnn.allow_tf32, matmul.allow_tf32]))

    monkeypatch.setattr(module, does, look)
    with pytest.raises(BadInput, match=r"\[False, False\]"):
        getattr(module, start)({"folder": str(tmp_path)})


@pytest.mark.parametrize(
    ("architecture", "detector", "reason"),
    [("resnet18", "c4", "bottleneck"), ("resnet18_w0.25", "fpn", "width 1 only")],
)
def test_detectron2_refuses_what_it_cannot_build(architecture, detector, reason):
    with pytest.raises(BadInput, match=reason):
        detectron2.refuse(architecture, detector)
    detectron2.refuse("resnet50_w2", detector)


def test_detectron2_names_of_the_backbone():
    assert detectron2.model_key("layer4.0.bn1.weight", "c4") == "roi_heads.res5.0.conv1.norm.weight"
    assert detectron2.model_key("layer1.0.downsample.0.weight", "c4") == "backbone.res2.0.shortcut.weight"
    assert detectron2.model_key("conv1.weight", "fpn") == "backbone.bottom_up.stem.conv1.weight"


def _hold(folder, ready, done):
    with _detection.locked(folder):
        ready.set()
        done.wait(30)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(30)
    with pytest.raises(BadInput, match="another run works in this folder"), _detection.locked(tmp_path):
        pass
    done.set()
    other.join()
    with _detection.locked(tmp_path):
        pass


# ---------------------------------------------------------------- the torchvision engine's own parts


@pytest.mark.parametrize(
    ("size", "edge", "max_edge", "expected"),
    [
        ((500, 375), 800, 1333, (1067, 800)),
        ((375, 500), 480, 1333, (480, 640)),
        ((500, 200), 800, 1333, (1333, 533)),  # the long edge binds
        ((333, 500), 600, 1333, (600, 901)),
    ],
)
def test_new_size(size, edge, max_edge, expected):
    assert engine.new_size(*size, edge, max_edge) == expected


def test_learning_rate_warms_up_linearly_and_drops_twice():
    config = {"lr": 0.02, "warmup_iterations": 100, "warmup_factor": 0.001, "steps": [18000, 22000]}
    rates = [engine.learning_rate(config, i) for i in (0, 50, 100, 17999, 18000, 21999, 22000)]
    assert rates == pytest.approx([2e-5, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.002, 0.0002])


def test_batches_hold_one_shape_and_see_every_image():
    wide = [i % 3 == 0 for i in range(30)]
    stream = engine.batches(wide, 3, seed=1)
    taken = [next(stream) for _ in range(9)]
    assert all(len({wide[index] for _, index in batch}) == 1 for batch in taken)
    indices = [index for batch in taken for _, index in batch]
    assert len(set(indices)) >= 24
    again = engine.batches(wide, 3, seed=1)
    assert [next(again) for _ in range(9)] == taken


def test_processes_share_out_the_images(monkeypatch):
    """Their positions in the order are disjoint, and together all of it."""
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    taken = []
    for rank in (0, 1):
        monkeypatch.setattr(engine, "rank", lambda rank=rank: rank)
        stream = engine.batches([True] * 10, 1, seed=1)
        taken.append([item for batch in itertools.islice(stream, 5) for item in batch])
    assert sorted(itertools.chain(*taken)) == list(enumerate(itertools.islice(engine.order(10, 1), 10)))


@pytest.fixture
def backbone(tmp_path, weights):
    path = tmp_path / "backbone.safetensors"
    checkpoint.save_backbone(path, weights, {"architecture": ARCHITECTURE})
    return checkpoint.Backbone.open(path)


def launch(processes):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def test_two_processes_on_the_cpu_do_what_one_does(tmp_path, backbone):
    """They take the same step, gather what they detected, and leave the same kind of record.

    No region is left to chance, which each process draws from a seed of its own, and all images have equally
    many, as each process takes the mean over its own. The network multiplies what rounding leaves: the two
    steps differ by less than 5 % of their length, and by all of it where a process is left out.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(engine.__file__).parents[2])}
    all_regions = {"rpn_batch": 10_000, "rpn_post_nms": [4, 8], "roi_batch": 100}
    step = {"iterations": 1, "lr": 0.001, "warmup_iterations": 0}
    prepared, _ = prepared_files(backbone, Config(**TINY | all_regions | step), tmp_path / "images")
    spec, results, weights = json.loads(prepared.read_text()), [], []
    for name, launcher in {"one": [sys.executable], "two": launch(2)}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "spec.json").write_text(json.dumps({**spec, "folder": str(folder)}))
        command = [*launcher, "-m", engine.__name__, folder / "spec.json", folder / "result.json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads((folder / "result.json").read_text()))
        weights.append(torch.load(folder / "trained.pt")["model"])
    before = engine.make(spec, torch.device("cpu"))[0].state_dict()
    for key in (key for key, value in before.items() if value.is_floating_point()):
        a, b = (after[key] - before[key] for after in weights)
        assert (a - b).norm() < 0.2 * a.norm(), key
    one, two = results
    assert [result["usage"]["processes"] for result in results] == [1, 2]
    assert one["load"] == two["load"]
    for part in ("usage", "losses"):
        assert one[part].keys() == two[part].keys()
    assert one.keys() == two.keys()
    for result in results:
        images = [each["image_id"] for each in result["detections"]]
        assert images == sorted(images)
        assert set(images) == set(range(4))
        assert result["detections"][0].keys() == one["detections"][0].keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM])
def test_a_training_that_is_asked_to_stop_saves_at_once(tmp_path, backbone, monkeypatch, number):
    """At the time limit of its job it is queued again, too; who watched the time before goes on watching."""
    asked, done, step = [], [], engine.step
    monkeypatch.setattr(rolling.slurm, "requeue", lambda: asked.append(True))
    monkeypatch.setattr(rolling.slurm, "seconds_left", lambda: 1000)
    spec = json.loads(prepared_files(backbone, Coco(**TINY), tmp_path / "run")[0].read_text())

    def stopped(optimizer, losses, iteration):
        step(optimizer, losses, iteration)
        done.append(iteration)
        if len(done) == 1:
            monkeypatch.setattr(rolling.slurm, "seconds_left", lambda: None)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(engine, "step", stopped)
    with rolling.queued_again_in_time(), pytest.raises(SystemExit) as end:
        engine.run(spec)
    assert (end.value.code, asked) == (rolling.STOPPED, [True] * (number == signal.SIGALRM))
    monkeypatch.setattr(rolling.slurm, "seconds_left", lambda: 1000)
    with rolling.queued_again_in_time():
        engine.run(spec)
        assert signal.alarm(0) > 900
    assert done == list(range(TINY["iterations"]))


@pytest.mark.parametrize(
    ("number", "command"),
    [(signal.SIGTERM, launch(2)), (signal.SIGUSR1, launch(1)), (signal.SIGALRM, [sys.executable])],
)
def test_a_step_that_is_asked_to_stop_has_its_engine_save(tmp_path, backbone, number, command):
    config = Coco(**TINY).model_copy(update={"iterations": 100_000})
    files = prepared_files(backbone, config, tmp_path / "run")
    program = (
        "import pathlib, signal, sys\n"
        "from simclr.benchmarks import _detection\n"
        "signal.signal(signal.SIGALRM, lambda *_: sys.exit('queued again'))\n"
        f"_detection._torchvision_command = lambda: {command}\n"
        "_detection._run('torchvision', *map(pathlib.Path, sys.argv[1:]))"
    )
    step = subprocess.Popen([sys.executable, "-c", program, *files], stderr=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("iteration 20/") for line in step.stderr)
        step.send_signal(number)
        said = step.communicate(timeout=60)[1]
    finally:
        step.kill()
    assert ("queued again" in said) == (number == signal.SIGALRM)
    assert step.returncode == (1 if number == signal.SIGALRM else rolling.STOPPED)
    (saved,) = (tmp_path / "run").glob("checkpoint-*.pt")
    assert f"stopped after iteration {torch.load(saved)['step']} of 100000" in said


def test_a_kill_during_precise_bn_costs_the_record_nothing(tmp_path, backbone, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    said, step = [], engine.step
    config = Coco(**TINY, checkpoint_every=TINY["iterations"])
    spec = json.loads(prepared_files(backbone, config, tmp_path / "run")[0].read_text())
    monkeypatch.setattr(engine, "detect", lambda *_: [])
    with monkeypatch.context() as patched:
        patched.setattr(engine, "precise_bn", killed)
        patched.setattr(engine, "step", lambda *given: (said.append(given[1]), step(*given)))
        with pytest.raises(KeyboardInterrupt):
            engine.run(spec)
    monkeypatch.setattr(engine, "step", killed)  # no iteration is left
    result = engine.run(spec)
    assert result["losses"] == {name: value.item() for name, value in said[-1].items()}
    assert result["usage"]["seconds_per_iteration"] > 0


def test_a_flip_mirrors_boxes_and_polygons():
    line = image("a", ((10, 5, 30, 25), 1, False), ((0, 0, 80, 60), 0, False))
    for annotation in line["annotations"]:
        annotation["segmentation"] = square(annotation["bbox"])
    target = engine.transformed(line, (160, 120), flip=True)
    assert target["boxes"].tolist() == [[100, 10, 140, 50], [0, 0, 160, 120]]
    assert target["labels"].tolist() == [2, 1]
    assert target["polygons"][0][0].tolist() == [140, 10, 100, 10, 100, 50, 140, 50]


def test_an_object_outside_the_image_is_dropped():
    line = image("a", ((10, 5, 30, 25), 1, False), ((80, 0, 90, 10), 0, False))
    assert engine.transformed(line, (80, 60), flip=False)["labels"].tolist() == [2]


def test_precise_bn_equals_the_statistics_of_all_values():
    layer = torch.nn.BatchNorm2d(3).double()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, images, targets):
            return self.norm(images)

    batches = [torch.randn(n, 3, 4, 5, dtype=torch.double) * 2 + 1 for n in (2, 5, 1)]
    engine.precise_bn(Model(), [(batch, None) for batch in batches])
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, values.mean(1))
    torch.testing.assert_close(layer.running_var, values.var(1, unbiased=False))
    assert layer.momentum == 0.1


@pytest.mark.parametrize("reached", [True, False])
def test_precise_bn_leaves_a_layer_that_no_value_reached_as_it_was(reached):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)
            self.norm.running_mean.fill_(2)
            self.norm.running_var.fill_(5)

        def forward(self, images, targets):
            return self.norm(images) if reached else images

    model = Model()
    engine.precise_bn(model, [(torch.zeros(0, 3, 4, 5), None)])
    assert model.norm.running_mean.tolist() == [2] * 3
    assert model.norm.running_var.tolist() == [5] * 3
    assert model.norm.momentum == 0.1


def test_a_diverged_loss_stops_training():
    with pytest.raises(BadInput, match=r"diverged at iteration 3.*lower lr"):
        engine.step(None, {"loss_box_reg": torch.tensor(float("nan"))}, 3)


def test_proposals_that_are_no_numbers_stop_training(tmp_path, weights):
    proposals = made(tmp_path, weights)[0].rpn
    boxes, logits = torch.tensor([[0, 0, float("nan"), 9.0]]), torch.zeros(1)
    with pytest.raises(BadInput, match=r"diverged.*lower lr"):
        proposals._suppress(boxes, logits, torch.zeros(1), (60, 80))
    assert len(proposals.eval()._suppress(boxes, logits, torch.zeros(1), (60, 80))[0]) == 0


def test_an_image_is_turned_only_when_its_boxes_are(tmp_path):
    stored = Image.effect_noise((80, 60), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    stored.save(tmp_path / "a.jpg", exif=exif)
    line = image("a", ((10, 5, 30, 25), 1, False), file_name=str(tmp_path / "a.jpg"))
    as_stored = engine.resized(line, 60, 100)
    assert as_stored.size == (80, 60)
    upright = engine.resized({**line, "width": 60, "height": 80}, 60, 100)
    assert upright.size == (60, 80)
    assert np.array_equal(upright, as_stored.transpose(Image.Transpose.ROTATE_270))
    draw([line], [], CLASSES, tmp_path / "detections.png")
    with Image.open(tmp_path / "detections.png") as sheet:
        assert sheet.getpixel((160, 270)) == (0, 0, 0)  # 320 × 240, wider than high, above black


def test_the_sheet_shows_objects_left_and_detections_right(tmp_path):
    """Of 11 grey images the first, third … last; boxes and masks in the colour of their class."""
    Image.new("RGB", (80, 60), (128, 128, 128)).save(tmp_path / "grey.png")
    box = (20, 10, 60, 50)
    truth = [image(i, (box, 0, False), file_name=str(tmp_path / "grey.png")) for i in range(11)]
    for each in truth[0]["annotations"]:
        each["segmentation"] = square(box)
    found = [{**coco_detection(2, box, 0.2), "category_id": 1}, detection(2, (15, 5, 25, 55), 0.1)]
    draw(truth, found, CLASSES, tmp_path / "a.png")
    draw(truth, list(reversed(found)), CLASSES, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (4 * 320, 20 + 3 * 320)
        centre, edge, grey = (160, 120), (80, 120), (128, 128, 128)
        tiles = [(x, y) for y in range(20, 980, 320) for x in range(0, 1280, 320)]
        at = [[sheet.getpixel((x + point[0], y + point[1])) for x, y in tiles] for point in (centre, edge)]
    zero, one = at[1][0], at[1][3]
    assert len({zero, one, grey}) == 3
    assert [at[1][i] for i in range(0, 12, 2)] == [zero] * 6  # an object in each
    assert [at[1][i] for i in range(1, 12, 2)] == [grey, one, grey, grey, grey, grey]
    tinted = [i for i, colour in enumerate(at[0]) if colour != grey]
    assert tinted == [0, 3]
    assert at[0][0] == tuple((a + b) // 2 for a, b in zip(zero, grey, strict=True))
