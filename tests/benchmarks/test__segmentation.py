"""What both segmentation benchmarks share: exact scores, exact loading, resumption after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS
from PIL import Image
from safetensors.torch import save_file

from simclr import BadInput, datasets, distributed, files, results, rolling
from simclr.__main__ import main
from simclr.benchmarks import _segmentation, _segmentation_config
from simclr.benchmarks.voc12aug_segmentation import Config, evaluate
from simclr.checkpoint import Backbone, save_backbone
from simclr.model import resnet

ARCHITECTURE = "resnet18_w0.125"
TINY = {
    "iterations": 6,
    "checkpoint_every": 2,
    "batch_size": 2,
    "workers": 0,
    "resize": (128, 48),
    "crop": 32,
}
TINY |= {"decode_channels": 8, "auxiliary_channels": 8}


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, resnet(ARCHITECTURE).state_dict(), {"architecture": ARCHITECTURE})
    return Backbone.open(path)


# ---------------------------------------------------------------- scores


def areas_of(truth, prediction, classes):
    """The areas that `AreaMetric` finds in maps `(N, H, W)`, image by image."""
    metric = _segmentation.AreaMetric()
    metric.dataset_meta = {"classes": classes}
    samples = [
        {
            "gt_sem_seg": {"data": torch.from_numpy(t)[None]},
            "pred_sem_seg": {"data": torch.from_numpy(p)[None]},
            "seg_map_path": "mask.png",
        }
        for t, p in zip(truth, prediction, strict=True)
    ]
    metric.process({}, samples)
    return metric.evaluate(len(samples))


def test_scores_equal_the_definition(scores_of_maps):
    rng = np.random.default_rng(0)
    classes = list("abcdef")
    truth = rng.choice([0, 1, 2, 3, 255], (5, 20, 30))
    prediction = rng.choice([0, 1, 2, 4], (5, 20, 30))
    areas = areas_of(truth, prediction, classes)
    metrics = _segmentation.scores(areas)
    assert areas["images"] == 5
    assert metrics == pytest.approx(scores_of_maps(truth, prediction, len(classes)), rel=1e-14)
    assert list(metrics.details["not_counted"]) == ["f"]
    assert metrics.details["predicted_only"] == ["e"]
    assert list(metrics.details["iou"]) == list("abcde")


def test_scores_of_a_case_worked_by_hand():
    # truth 0 0 1 1, prediction 0 1 1 1: IoU 1/2 and 2/3, accuracy 1/2 and 1, 3 of 4 pixels.
    areas = areas_of(np.array([[[0, 0, 1, 1]]]), np.array([[[0, 1, 1, 1]]]), ["a", "b"])
    assert _segmentation.scores(areas) == pytest.approx({"miou": 700 / 12, "macc": 75.0, "aacc": 75.0})


def test_areas_are_added_without_rounding():
    # In float32, in which MMSegmentation adds, 2**24 + 1 is 2**24.
    metric = _segmentation.AreaMetric()
    metric.dataset_meta = {"classes": ["a"]}
    metric.results = [(torch.tensor([2.0**24]),) * 4, (torch.tensor([1.0]),) * 4]
    assert metric.evaluate(2)["union"] == [2**24 + 1]


def test_a_process_without_images_adds_nothing():
    metric = _segmentation.AreaMetric()
    metric.dataset_meta = {"classes": ["a", "b"]}
    areas = {key: [0, 0] for key in ("intersection", "union", "prediction", "truth")}
    assert metric.evaluate(1) == {"classes": ["a", "b"], "images": 0, **areas}


def test_no_labelled_pixel_is_an_error_not_a_number():
    areas = areas_of(np.full((1, 2, 2), 255), np.zeros((1, 2, 2), int), ["a", "b"])
    with pytest.raises(BadInput, match="no labelled pixel"):
        _segmentation.scores(areas)


# ---------------------------------------------------------------- loading


def runner_of(module, iteration=0):
    model = SimpleNamespace(backbone=module)
    return SimpleNamespace(iter=iteration, model=model, logger=SimpleNamespace(info=print))


def test_gate_loads_every_tensor_and_reports_it(tmp_path):
    source, target = resnet(ARCHITECTURE), resnet(ARCHITECTURE)
    hook = _segmentation.LoadBackbone(source.state_dict(), tmp_path / "backbone.json")
    hook.before_train(runner_of(target))
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())
    assert json.loads((tmp_path / "backbone.json").read_text()) == {"expected": 120, "loaded": 120}


def test_gate_leaves_resumed_weights_alone(tmp_path):
    target = resnet(ARCHITECTURE)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    hook = _segmentation.LoadBackbone(resnet(ARCHITECTURE).state_dict(), tmp_path / "backbone.json")
    hook.before_train(runner_of(target, iteration=4))
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("wrong", ["resnet18_w0.25", "resnet34_w0.125"])
def test_gate_fires_on_a_backbone_of_another_architecture(wrong, tmp_path):
    hook = _segmentation.LoadBackbone(resnet(wrong).state_dict(), tmp_path / "backbone.json")
    with pytest.raises(RuntimeError):
        hook.before_train(runner_of(resnet(ARCHITECTURE)))
    assert not (tmp_path / "backbone.json").exists()


def test_gate_fires_on_one_changed_missing_or_extra_tensor():
    module = resnet(ARCHITECTURE)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    assert _segmentation.count_equal(module, state) == len(state)
    for wrong in (
        {**state, "conv1.weight": state["conv1.weight"] + 1e-6},
        {key: value for key, value in state.items() if key != "conv1.weight"},
    ):
        with pytest.raises(RuntimeError, match=r"1 of .* conv1\.weight"):
            _segmentation.count_equal(module, wrong)
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        _segmentation.count_equal(module, {**state, "fc.bias": torch.zeros(1)})


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def run_folder(work, backbone, dataset, config):
    """The folder of a run, made."""
    with files.workplace(work, _segmentation.inputs_of(backbone, dataset, config)) as folder:
        return folder


def test_a_foreign_pickle_is_refused_and_not_run(tmp_path, backbone, dataset):
    config, voc = Config(**TINY), dataset("voc12aug")
    folder = run_folder(tmp_path, backbone, voc, config)
    torch.save({"state_dict": Payload(tmp_path / "ran")}, folder / "iter_000000002.pth")
    with pytest.raises(BadInput, match=r"iter_000000002\.pth: .*foreign.*delete the folder"):
        evaluate(backbone, voc, config, tmp_path)
    torch.save({"model": {}}, folder / "iter_000000002.pth")
    with pytest.raises(BadInput, match=r"iter_000000002\.pth: .*foreign.*'run'"):
        evaluate(backbone, voc, config, tmp_path)
    assert not (tmp_path / "ran").exists()


def job_in(folder, run, **config):
    return _segmentation.Job(Config(**TINY | config), None, run, folder, torch.device("cpu"))


def write_checkpoint(folder, iterations, run):
    state = {"state_dict": {"weight": torch.zeros(1000)}, "meta": {}, "cost": {}, "run": run}
    path = _segmentation.checkpoint_path(folder, iterations)
    torch.save(state, path)
    return path


def test_of_a_truncated_checkpoint_the_one_before_is_taken(tmp_path, capsys):
    job = job_in(tmp_path, {"config": {"lr": 0.01}})
    assert _segmentation.newest_checkpoint(job) is None
    second, tenth = (write_checkpoint(tmp_path, number, job.run) for number in (2, 10))
    assert _segmentation.newest_checkpoint(job) == tenth
    tenth.write_bytes(tenth.read_bytes()[:-2000])
    assert _segmentation.newest_checkpoint(job) == second
    assert "iter_000000010.pth: expected a checkpoint of this benchmark" in capsys.readouterr().err
    second.write_bytes(b"")
    with pytest.raises(BadInput, match=rf"{tenth}: .*truncated.*delete the folder {tmp_path}"):
        _segmentation.newest_checkpoint(job)


def test_the_checkpoint_of_another_run_is_refused_and_both_are_named(tmp_path):
    """Folders are named by all that a run depends on; this is of one who copies what is in them."""
    job = job_in(tmp_path, {"checkpoint_sha256": "aa", "config": {"lr": 0.01, "crop": 512}})
    write_checkpoint(tmp_path, 4, {"checkpoint_sha256": "bb", "config": {"lr": 0.02, "crop": 512}})
    said = (
        r"iter_000000004\.pth: expected .* of this run, found one of another: checkpoint_sha256 is bb there, "
    )
    with pytest.raises(BadInput, match=said + r"aa here; config\.lr is 0\.02 there, 0\.01 here; delete it"):
        _segmentation.newest_checkpoint(job)


def test_processes_that_see_different_folders_are_refused(tmp_path, monkeypatch):
    job = job_in(tmp_path, {})
    write_checkpoint(tmp_path, 4, {})
    monkeypatch.setattr(distributed, "gather", lambda found: [found, torch.tensor([2])])
    with pytest.raises(BadInput, match=r"found checkpoints of iterations 4, 2; expected one for all; --work"):
        _segmentation.newest_checkpoint(job)


# ---------------------------------------------------------------- the run

KILLED = """
import os, signal, sys
from simclr.__main__ import main
from simclr.__main__ import main
from simclr.benchmarks import _segmentation, _segmentation_config

reseed = _segmentation.Reseed.before_train_iter

def die(self, runner, batch_idx, data_batch=None):
    if batch_idx == int(sys.argv[2]):
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
    reseed(self, runner, batch_idx)

_segmentation.Reseed.before_train_iter = die
sys.exit(main(sys.argv[3:]))
"""


def arguments(tmp_path, backbone, config, work, **options):
    """The command line of the step."""
    values = {"model": "random_init", "config": config.model_dump_json(), "backbone": backbone.path}
    values |= {"dataset": tmp_path / "manifests/voc12aug.json", "work": work} | options
    return ["voc12aug_segmentation", *(str(part) for key in values for part in (f"--{key}", values[key]))]


@pytest.fixture(scope="module")
def uninterrupted():
    """Metrics and last checkpoint of a run without interruption, made by the first test that needs them."""
    return {}


def whole_run(uninterrupted, backbone, dataset, folder):
    if not uninterrupted:
        evaluate(backbone, dataset, Config(**TINY), folder)
        (path,) = folder.glob("*/iter_000000006.pth")
        uninterrupted["state"] = _segmentation.read_checkpoint(path)
    return uninterrupted["state"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_killed_run_goes_on_in_a_moved_folder(
    tmp_path, backbone, dataset, monkeypatch, uninterrupted, predictions, scores_by_loop
):
    voc, config = dataset("voc12aug"), Config(**TINY)
    before, work = tmp_path / "before", tmp_path / "after"
    command = arguments(tmp_path, backbone, config, before, output=tmp_path / "record.json")
    killed = subprocess.run([sys.executable, "-c", KILLED, "SIGKILL", "5", *command])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "record.json").exists()
    shutil.move(before, work)
    (folder,) = work.iterdir()
    assert [path.name for path in sorted(folder.glob("*.pth"))] == [
        "iter_000000002.pth",
        "iter_000000004.pth",
    ]
    cost = _segmentation.read_checkpoint(folder / "iter_000000004.pth")["cost"]

    trained = []
    spy(monkeypatch, _segmentation.Reseed, "before_train_iter", partial(keep_iteration, trained))
    metrics = evaluate(backbone, voc, config, work, tmp_path / "sheet.png")

    assert trained == [4, 5]
    assert [path.name for path in sorted(folder.glob("*.pth"))] == [
        "iter_000000004.pth",
        "iter_000000006.pth",
    ]
    last = _segmentation.read_checkpoint(folder / "iter_000000006.pth")
    assert last["meta"]["iter"] == 6
    assert last["run"] == json.loads((folder / "run.json").read_text())
    assert metrics.details["backbone_tensors"] == {"expected": 120, "loaded": 120}
    assert metrics.details["images"] == len(predictions) == voc.images["val"]
    assert (metrics.details["norm"], metrics.details["processes"]) == ("BN", 1)
    # What the two parts took adds up; what the kill lost does not count.
    assert last["cost"]["seconds"] > cost["seconds"] > 0
    assert metrics.details["seconds_per_iteration"] == last["cost"]["seconds"] / 6
    assert metrics.details["peak_memory_gb"] > 0
    assert metrics.details["gpu_hours"] == 0  # no GPU
    # Against masks read from the dataset's own lists, without MMSegmentation.
    assert metrics == pytest.approx(scores_by_loop(voc, predictions), rel=1e-12)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    # In a folder of its own, as if nothing had happened.
    whole = whole_run(uninterrupted, backbone, voc, tmp_path / "whole")
    assert same_weights(last["state_dict"], whole["state_dict"])

    trained.clear()
    again = evaluate(backbone, voc, Config(**TINY | {"checkpoint_every": 3}), work)
    assert (again, trained) == (metrics, [])


def spy(monkeypatch, owner, name, see):
    """Let `see` have the arguments of every call of `owner.name`, which goes on as before."""
    original = getattr(owner, name)

    def seen(self, *args, **kwargs):
        see(*args, **kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, seen)


def keep_iteration(trained, runner, batch_idx, *_, **__):
    trained.append(batch_idx)


def test_a_run_that_is_asked_to_stop_loses_nothing(tmp_path, backbone, dataset, monkeypatch, uninterrupted):
    voc, config = dataset("voc12aug"), Config(**TINY | {"checkpoint_every": 100, "workers": 1})
    command = arguments(tmp_path, backbone, config, tmp_path / "work", output=tmp_path / "record.json")
    command = [sys.executable, "-c", KILLED, "SIGTERM", "2", *command]
    asked = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=900)
    assert asked.returncode == rolling.STOPPED
    assert "stopped after iteration 3 of 6; the same command goes on" in asked.stderr
    assert not (tmp_path / "record.json").exists()

    trained = []
    spy(monkeypatch, _segmentation.Reseed, "before_train_iter", partial(keep_iteration, trained))
    evaluate(backbone, voc, config, tmp_path / "work")
    assert trained == [3, 4, 5]
    (path,) = tmp_path.glob("work/*/iter_000000006.pth")
    resumed, whole = (
        _segmentation.read_checkpoint(path),
        whole_run(uninterrupted, backbone, voc, tmp_path / "whole"),
    )
    assert same_weights(resumed["state_dict"], whole["state_dict"])


def test_a_kill_between_training_and_test_costs_the_test_alone(tmp_path, backbone, dataset, monkeypatch):
    voc, config = dataset("voc12aug"), Config(**TINY)
    with monkeypatch.context() as patched:
        patched.setattr(_segmentation.AreaMetric, "process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(backbone, voc, config, tmp_path)
    trained = []
    spy(monkeypatch, _segmentation.Reseed, "before_train_iter", partial(keep_iteration, trained))
    metrics = evaluate(backbone, voc, config, tmp_path)
    assert trained == []
    assert metrics.details["images"] == voc.images["val"]


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_two_processes_train_as_one(tmp_path, backbone, dataset):
    """Started as the workflow starts them: equal weights up to rounding, and a record of the same shape."""
    voc = dataset("voc12aug")
    config = Config(**TINY | {"dropout": 0, "batch_size": 4})  # each process has dropout of its own
    one = evaluate(backbone, voc, config, tmp_path / "one")
    record = tmp_path / "record.json"
    command = arguments(
        tmp_path, backbone, config, tmp_path / "two", output=record, picture=tmp_path / "sheet.png"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(datasets.__file__).parents[1])}
    subprocess.run(
        [*launcher, "-m", "simclr", *command], check=True, env=environment, cwd=tmp_path, timeout=900
    )
    (a,), (b,) = ((tmp_path / name).glob("*/iter_000000006.pth") for name in ("one", "two"))
    a, b = (_segmentation.read_checkpoint(path)["state_dict"] for path in (a, b))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
    two = results.read(record)
    assert two.metrics.keys() == one.keys()
    assert two.details.keys() == one.details.keys()
    assert two.details["images"] == voc.images["val"]
    assert (two.details["processes"], two.details["batch_per_process"]) == (2, 2)
    assert (two.details["norm"], one.details["norm"]) == ("SyncBN", "BN")
    assert (tmp_path / "sheet.png").exists()
    assert not list(tmp_path.glob(".dist_test*"))  # MMEngine's exchange of pickles beside the user's files


def test_a_run_has_its_own_folder(tmp_path, backbone, dataset):
    voc = dataset("voc12aug")

    def name(**changes):
        return run_folder(tmp_path, backbone, voc, Config(**TINY | changes)).name

    assert name() == name(workers=2) == name(checkpoint_every=5)
    assert len({name(), name(lr=0.02), name(seed=1), name(version=2)}) == 4


def test_two_runs_in_one_folder_are_refused(tmp_path, backbone, dataset):
    voc, config = dataset("voc12aug"), Config(**TINY)
    folder = run_folder(tmp_path, backbone, voc, config)
    hold = "import sys; from simclr.files import locked\nwith locked(sys.argv[1]): print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(BadInput, match="another run works in this folder; wait for it or stop it"):
            evaluate(backbone, voc, config, tmp_path)
        holder.communicate(b"\n")
    assert not list(folder.glob("*.pth"))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, backbone, dataset):
    with pytest.raises(BadInput, match=r"the loss is (nan|inf) in iteration \d; expected a finite number"):
        evaluate(backbone, dataset("voc12aug"), Config(**TINY | {"lr": 1e30}), tmp_path)
    assert not list(tmp_path.rglob("*.pth"))


def test_classes_of_another_dataset_are_refused(tmp_path, backbone, dataset):
    with pytest.raises(BadInput, match=r"cityscapes: .*segmentation|cityscapes: expected the 21 classes"):
        evaluate(backbone, dataset("cityscapes"), Config(**TINY), tmp_path)


def test_a_batch_that_cannot_be_dealt_is_refused(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(_segmentation_config, "world_size", lambda: 4)
    with pytest.raises(BadInput, match="multiple of the 4 processes, found 6"):
        _segmentation_config.settings(Config(batch_size=6), "resnet50", dataset("voc12aug"), tmp_path, "cuda")


# ---------------------------------------------------------------- what is refused


def said(capsys):
    """The last line on standard error."""
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def own_images(demo_data, demo_block, tmp_path):
    """A verified copy of the miniature VOC to damage: its folder VOC2012."""
    root = shutil.copytree(demo_data / "VOCdevkit", tmp_path / "VOCdevkit")
    values = demo_block("voc12aug").model_copy(update={"root": root})
    datasets.verify("voc12aug", values, tmp_path / "manifests/voc12aug.json")
    return root / "VOC2012"


def remove(path):
    path.unlink()


def shrink(path):
    Image.open(path).crop((0, 0, 20, 10)).save(path)


def mislabel(path):
    pixels = np.array(Image.open(path))
    pixels[:] = 21
    Image.fromarray(pixels).save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


FAULTS = [
    ("val", "SegmentationClass/{}.png", mislabel, "expected class numbers 0 to 20 or 255, found 21"),
    ("val", "SegmentationClass/{}.png", shrink, "the size of its image, found 20 × 10"),
    ("val", "SegmentationClass/{}.png", cut, "cannot be decoded"),
    ("val", "SegmentationClass/{}.png", remove, "no such image"),
    ("val", "JPEGImages/{}.jpg", remove, "no such image"),
    ("val", "JPEGImages/{}.jpg", cut, "cannot be decoded"),
    ("aug", "SegmentationClassAug/{}.png", mislabel, "expected class numbers 0 to 20 or 255, found 21"),
    ("aug", "JPEGImages/{}.jpg", remove, "no such image"),
]


def test_what_changed_since_it_was_verified_is_named(tmp_path, own_images):
    """As MMSegmentation's pipelines meet it, in training and in test."""
    voc = datasets.Dataset.open(tmp_path / "manifests/voc12aug.json")
    built = _segmentation_config.settings(Config(**TINY), ARCHITECTURE, voc, tmp_path, "cpu")
    with DefaultScope.overwrite_default_scope("mmseg"):
        val = DATASETS.build(built.test_dataloader.dataset)
        aug = DATASETS.build(built.train_dataloader.dataset.dataset.datasets[1])
    for split, name, damage, words in FAULTS:
        images, _ = datasets.segmentation(voc, split)
        path = own_images / name.format(images[0].stem)
        intact = path.read_bytes()
        damage(path)
        with pytest.raises(BadInput) as error:
            {"val": val, "aug": aug}[split][0]
        assert str(error.value).startswith(f"{path}: ")
        assert words in str(error.value)
        path.write_bytes(intact)
    assert val[0].keys() == aug[0].keys() == {"inputs", "data_samples"}


def test_an_image_missing_in_the_test_ends_with_one_sentence(tmp_path, backbone, own_images, capsys):
    voc = datasets.Dataset.open(tmp_path / "manifests/voc12aug.json")
    images, _ = datasets.segmentation(voc, "val")
    images[3].unlink()
    config = Config(**TINY | {"iterations": 1, "workers": 1})
    record = tmp_path / "record.json"
    assert main(arguments(tmp_path, backbone, config, tmp_path / "work", output=record)) == 2
    assert said(capsys).startswith(f"simclr: {images[3]}: no such image; restore it")
    assert not record.exists()


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("aug", "expected 81 images in aug and train, found 80"),
        ("val", "expected 17 images in val, found 16"),
    ],
)
def test_another_number_of_images_than_verified_is_refused(
    tmp_path, backbone, dataset, split, words, monkeypatch
):
    """Before anything is trained, also for the images of the test."""
    trained = []
    spy(monkeypatch, _segmentation.Reseed, "before_train_iter", partial(keep_iteration, trained))
    voc = dataset("voc12aug")
    voc.splits[split]["images"] += 1
    with pytest.raises(BadInput, match=words):
        evaluate(backbone, voc, Config(**TINY | {"iterations": 1}), tmp_path)
    assert trained == []


def test_a_backbone_of_another_depth_is_refused(tmp_path, dataset, capsys):
    dataset("voc12aug")
    path = tmp_path / "backbone.safetensors"
    save_file(resnet(ARCHITECTURE).state_dict(), path, {"architecture": "resnet34_w0.125"})
    command = arguments(tmp_path, SimpleNamespace(path=path), Config(**TINY), tmp_path / "work")
    assert main([*command, "--output", str(tmp_path / "record.json")]) == 2
    sentence = said(capsys)
    assert sentence.startswith(
        f"simclr: {path}: expected exactly the 216 tensors of resnet34_w0.125; missing:"
    )
    assert not (tmp_path / "work").exists()


def test_without_mmsegmentation_one_sentence_says_what_to_install(tmp_path, backbone, dataset):
    dataset("voc12aug")
    command = arguments(
        tmp_path, backbone, Config(**TINY), tmp_path / "work", output=tmp_path / "record.json"
    )
    hidden = "import sys; sys.modules['mmcv'] = None\nfrom simclr.__main__ import main\n"
    run = [sys.executable, "-c", hidden + "sys.exit(main(sys.argv[1:]))", *command]
    ended = subprocess.run(run, capture_output=True, text=True)
    assert ended.returncode == 2
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith("simclr: MMSegmentation cannot be imported")
    assert "mmcv" in sentence
    assert "`uv sync`" in sentence
    assert "envs/mmseg.yaml" in sentence
