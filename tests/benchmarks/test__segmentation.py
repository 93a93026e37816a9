"""What both segmentation benchmarks share: exact scores, exact loading, resumption after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from simclr import BadInput, datasets
from simclr.benchmarks import _segmentation
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
    return metric.compute_metrics(metric.results)


def scores_by_loop(truth, prediction, classes):
    """mIoU, mAcc, aAcc in percent from the definition, pixel sets class by class."""
    kept = truth != 255
    truth, prediction = truth[kept], prediction[kept]
    iou, accuracy = [], []
    for c in range(len(classes)):
        union = ((truth == c) | (prediction == c)).sum()
        both = ((truth == c) & (prediction == c)).sum()
        iou += [both / union] if union else []
        accuracy += [both / (truth == c).sum()] if (truth == c).any() else []
    return {
        "miou": 100 * np.mean(iou),
        "macc": 100 * np.mean(accuracy),
        "aacc": 100 * (truth == prediction).mean(),
    }


def test_scores_equal_the_definition():
    rng = np.random.default_rng(0)
    classes = list("abcdef")
    truth = rng.choice([0, 1, 2, 3, 255], (5, 20, 30))
    prediction = rng.choice([0, 1, 2, 4], (5, 20, 30))
    areas = areas_of(truth, prediction, classes)
    metrics = _segmentation.scores(areas)
    assert areas["images"] == 5
    assert metrics == pytest.approx(scores_by_loop(truth, prediction, classes), rel=1e-14)
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
    areas = metric.compute_metrics([(torch.tensor([2.0**24]),) * 4, (torch.tensor([1.0]),) * 4])
    assert areas["union"] == [2**24 + 1]


def test_no_labelled_pixel_is_an_error_not_a_number():
    areas = areas_of(np.full((1, 2, 2), 255), np.zeros((1, 2, 2), int), ["a", "b"])
    with pytest.raises(BadInput, match="no labelled pixel"):
        _segmentation.scores(areas)


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(BadInput, match=r"mask\.png: label 7"):
        areas_of(np.array([[[0, 7]]]), np.array([[[0, 0]]]), ["a", "b"])


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


def test_a_foreign_pickle_is_refused_and_not_run(tmp_path, backbone, dataset):
    config = Config(**TINY)
    voc = dataset("voc12aug")
    folder = tmp_path / _segmentation.fingerprint(_segmentation.inputs_of(backbone, voc, config))
    folder.mkdir()
    torch.save({"state_dict": Payload(tmp_path / "ran")}, folder / "iter_2.pth")
    (folder / "last_checkpoint").write_text("/elsewhere/iter_2.pth")
    with pytest.raises(BadInput, match=r"iter_2\.pth: .*foreign.*delete the folder"):
        evaluate(backbone, voc, config, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "iter_2.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BadInput, match="truncated"):
        _segmentation.read_checkpoint(path)


# ---------------------------------------------------------------- the run

KILLED = """
import os, signal, sys
from simclr.__main__ import main
from simclr.benchmarks import _segmentation

def die(self, runner, batch_idx, data_batch=None, outputs=None):
    if batch_idx == 4:
        os.kill(os.getpid(), signal.SIGKILL)

_segmentation.StopUnlessFinite.after_train_iter = die
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_in_a_moved_folder(tmp_path, backbone, dataset, monkeypatch):
    voc, config = dataset("voc12aug"), Config(**TINY)
    before, work = tmp_path / "before", tmp_path / "after"
    command = [sys.executable, "-c", KILLED, "voc12aug_segmentation", "--model", "random_init"]
    command += ["--config", config.model_dump_json(), "--backbone", str(backbone.path)]
    command += ["--dataset", str(tmp_path / "manifests/voc12aug.json")]
    killed = subprocess.run([*command, "--work", str(before), "--output", str(tmp_path / "record.json")])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "record.json").exists()
    shutil.move(before, work)
    (folder,) = work.iterdir()
    assert (folder / "last_checkpoint").read_text().startswith(str(before))
    assert sorted(path.name for path in folder.glob("*.pth")) == ["iter_2.pth", "iter_4.pth"]

    trained, predictions = [], {}
    spy(monkeypatch, _segmentation.StopUnlessFinite, "after_train_iter", partial(keep_iteration, trained))
    spy(monkeypatch, _segmentation.AreaMetric, "process", partial(keep_predictions, predictions))
    metrics = evaluate(backbone, voc, config, work)

    assert trained == [4, 5]
    assert sorted(path.name for path in folder.glob("*.pth")) == ["iter_4.pth", "iter_6.pth"]
    assert _segmentation.read_checkpoint(folder / "iter_6.pth")["meta"]["iter"] == 6
    assert metrics.details["backbone_tensors"] == {"expected": 120, "loaded": 120}
    assert metrics.details["images"] == len(predictions) == voc.images["val"]
    assert metrics.details["norm"] == "BN"
    # Against masks read from the dataset's own lists, without MMSegmentation.
    images, masks = datasets.segmentation(voc, "val")
    truth = np.concatenate([np.asarray(Image.open(mask)).ravel() for mask in masks])
    predicted = np.concatenate([predictions[str(image)].ravel() for image in images])
    assert metrics == pytest.approx(scores_by_loop(truth, predicted, voc.class_names), rel=1e-12)
    with Image.open(metrics.details["predictions"]) as sheet:
        assert sheet.width > sheet.height / 2

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


def keep_iteration(trained, runner, batch_idx, **_):
    trained.append(batch_idx)


def keep_predictions(predictions, data_batch, data_samples):
    for sample in data_samples:
        predictions[sample["img_path"]] = sample["pred_sem_seg"]["data"].squeeze().numpy()


def test_a_run_has_its_own_folder(backbone, dataset):
    voc = dataset("voc12aug")

    def name(**changes):
        inputs = _segmentation.inputs_of(backbone, voc, Config(**TINY | changes))
        return _segmentation.fingerprint(inputs)

    assert name() == name(workers=2) == name(checkpoint_every=5)
    assert len({name(), name(lr=0.02), name(seed=1), name(version=2)}) == 4


def test_two_runs_in_one_folder_are_refused(tmp_path, backbone, dataset):
    voc, config = dataset("voc12aug"), Config(**TINY)
    folder = tmp_path / _segmentation.fingerprint(_segmentation.inputs_of(backbone, voc, config))
    hold = (
        "import sys; from simclr.results import locked\nwith locked(sys.argv[1]): print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(BadInput, match="another run works in this folder; wait for it or stop it"):
            evaluate(backbone, voc, config, tmp_path)
        holder.communicate(b"\n")
    assert not list(folder.glob("*.pth"))


def test_an_empty_note_of_the_last_checkpoint_counts_as_none(tmp_path):
    assert _segmentation.latest_checkpoint(tmp_path) is None
    (tmp_path / "last_checkpoint").write_text("")
    assert _segmentation.latest_checkpoint(tmp_path) is None
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_2.pth")
    assert _segmentation.latest_checkpoint(tmp_path) == tmp_path / "iter_2.pth"


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, backbone, dataset):
    with pytest.raises(BadInput, match=r"the loss is (nan|inf) in iteration \d; expected a finite number"):
        evaluate(backbone, dataset("voc12aug"), Config(**TINY | {"lr": 1e30}), tmp_path)
    assert not list(tmp_path.rglob("iter_6.pth"))


def test_classes_of_another_dataset_are_refused(tmp_path, backbone, dataset):
    with pytest.raises(BadInput, match=r"cityscapes: .*segmentation|cityscapes: expected the 21 classes"):
        evaluate(backbone, dataset("cityscapes"), Config(**TINY), tmp_path)


def test_a_batch_that_cannot_be_dealt_is_refused(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(_segmentation, "world_size", lambda: 4)
    with pytest.raises(BadInput, match="multiple of the 4 processes, found 6"):
        _segmentation.settings(Config(batch_size=6), "resnet50", dataset("voc12aug"), tmp_path, "cuda")
