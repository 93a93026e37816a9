"""VOC detection: the published protocol, what its config refuses, a miniature run with torchvision."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from simclr import BadInput, checkpoint, datasets
from simclr.benchmarks import _detection_torchvision as engine
from simclr.benchmarks.voc0712_detection import COLUMNS, Config, evaluate
from simclr.model import resnet

TINY = Config(
    engine="torchvision",
    iterations=4,
    steps=[3],
    warmup_iterations=1,
    batch_size=2,
    train_edges=[64],
    test_edge=64,
    max_edge=128,
    anchor_sizes=[16, 32],
    rpn_batch=16,
    rpn_pre_nms=[50, 20],
    rpn_post_nms=[12, 8],
    roi_batch=4,
    precise_bn=2,
    score_threshold=0,
    trials=1,
    checkpoint_every=2,
)


def test_the_published_protocol():
    """MMSelfSup v0.11.0, pascal_voc_R_50_C4_24k_moco.yaml and its bases."""
    config = Config()
    assert (config.engine, config.detector, config.trials) == ("detectron2", "c4", 5)
    assert (config.iterations, config.steps) == (24000, (18000, 22000))
    assert (config.batch_size, config.lr, config.warmup_iterations) == (16, 0.02, 100)
    assert (config.momentum, config.weight_decay, config.warmup_factor) == (0.9, 1e-4, 0.001)
    assert config.train_edges == tuple(range(480, 801, 32))
    assert (config.test_edge, config.max_edge, config.precise_bn) == (800, 1333, 200)
    assert (config.rpn_pre_nms, config.rpn_post_nms) == ((12000, 6000), (2000, 1000))
    assert (config.roi_batch, config.rpn_batch, config.detections) == (512, 256, 100)
    assert config.score_threshold == 0.05
    assert list(COLUMNS) == ["ap50", "ap", "ap75"]


def test_the_protocol_of_mmselfsups_row_is_a_short_delta():
    """MMSelfSup v0.11.0, configs/benchmarks/mmdetection/voc0712/faster_rcnn_r50_c4_mstrain_24k_voc0712.py."""
    ours, theirs = Config().model_dump(), Config(variant="mmselfsup").model_dump()
    assert {key: value for key, value in theirs.items() if value != ours[key]} == {
        "variant": "mmselfsup",
        "norm_weight_decay": 1e-4,
        "precise_bn": 0,
        "train_difficult": False,
        "border_anchors": False,
    }
    assert Config(variant="mmselfsup", precise_bn=7).precise_bn == 7


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"iterations": 100}, "steps must ascend and lie below iterations 100"),
        ({"steps": [200, 100]}, "must ascend"),
        ({"iterations": 50, "steps": []}, "warmup_iterations 100 exceed"),
        ({"detector": "fpn", "anchor_sizes": [32]}, "five anchor_sizes"),
        ({"test_edge": 2000}, "must not exceed max_edge"),
        ({"train_max_edge": 640}, "must not exceed train_max_edge 640"),
        ({"box_head": "4conv1fc"}, "is of detector: fpn"),
        (
            {"images_per_iteration": 400000},
            "400000 instead of batch_size 16 gives lr 500 and 1 iterations: at least 1000 must be left",
        ),
        (
            {"iterations": 2000, "steps": [1000, 1001], "images_per_iteration": 32},
            r"gives lr 0.04 and 1000 iterations: steps must ascend .*\(500, 500\)",
        ),
        ({"iterations": 200, "steps": [], "images_per_iteration": 32}, "100 iterations: at least 200 must"),
        ({"variant": "mocov2"}, "variant"),
        ({"learning_rate": 0.1}, "Extra inputs"),
    ],
)
def test_impossible_values_are_refused(values, reason):
    with pytest.raises(ValidationError, match=reason):
        Config(**values)


def test_possible_numbers_of_images_are_taken():
    assert Config(images_per_iteration=384).images_per_iteration == 384  # leaves 1,000 iterations
    assert Config(iterations=200, steps=[], images_per_iteration=4).iterations == 200


@pytest.fixture
def voc(dataset, monkeypatch):
    """The miniature dataset, cut to 6 training images and, for each class, one test image."""
    full = dataset("voc0712")
    records = {split: datasets.detection(full, split) for split in full.images}
    sure = {}
    for image in records["test07"]:
        for each in image["annotations"]:
            if not each["difficult"]:
                sure.setdefault(each["category_id"], image)
    few = {image["image_id"]: image for image in sure.values()}
    cut = {"trainval07": records["trainval07"][:6], "trainval12": [], "test07": list(few.values())}
    monkeypatch.setattr(datasets, "detection", lambda _, split: cut[split])
    return full


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "backbone.safetensors"
    checkpoint.save_backbone(
        path, resnet("resnet18_w0.125").state_dict(), {"architecture": "resnet18_w0.125"}
    )
    return checkpoint.Backbone.open(path)


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(voc, backbone, tmp_path, monkeypatch):
    picture = tmp_path / "voc.png"
    unbroken = evaluate(backbone, voc, TINY, tmp_path / "unbroken", picture)
    assert list(unbroken) == list(COLUMNS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    schedule = {"batch_size": 2, "lr": 0.02, "iterations": 4, "steps": [3], "warmup_iterations": 1}
    assert (unbroken.details["schedule"], unbroken.details["variant"]) == (schedule, "moco")
    assert unbroken.details["seconds_per_iteration"] > 0
    assert (unbroken.details["processes"], unbroken.details["peak_memory_gb"] > 0) == (1, True)
    load = unbroken.details["load"]
    assert {key: load[key] for key in ("expected", "loaded", "unmatched")} == {
        "expected": 120,
        "loaded": 120,
        "unmatched": [],
    }
    assert set(load["largest_relative_difference"]) == {"feature4", "feature5"}
    assert unbroken.details["engine"] == "torchvision"

    update = engine.step

    def killed(optimizer, losses, iteration):
        if iteration == 3:
            raise KeyboardInterrupt
        update(optimizer, losses, iteration)

    work = tmp_path / "killed"
    monkeypatch.setattr(engine, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(backbone, voc, TINY, work)
    assert [path.name for path in work.rglob("checkpoint-*")] == ["checkpoint-000000002.pt"]

    # The state of another trial is none of this one's.
    (path,) = work.rglob("checkpoint-*")
    state = torch.load(path, weights_only=True)
    torch.save({**state, "run": {**state["run"], "seed": 1}}, path)
    with pytest.raises(BadInput, match="found one of another: seed is 1 there, 0 here; delete it"):
        evaluate(backbone, voc, TINY, work)
    torch.save(state, path)

    iterations = []
    monkeypatch.setattr(engine, "step", lambda *a: (iterations.append(a[2]), update(*a)))
    assert dict(evaluate(backbone, voc, TINY, work)) == dict(unbroken)
    assert iterations == [2, 3]
    (first,), (second,) = ((tmp_path / name).rglob("result.json") for name in ("unbroken", "killed"))
    assert json.loads(first.read_text())["detections"] == json.loads(second.read_text())["detections"]
    assert not list(work.rglob("checkpoint-*"))

    # Nor is its result, nor are its weights.
    (result,) = work.rglob("result.json")
    (trained,) = work.rglob("trained.pt")
    state, done = torch.load(trained, weights_only=True), result.read_text()
    torch.save({**state, "run": {**state["run"], "seed": 1}}, trained)
    result.write_text(json.dumps({**json.loads(done), "run": {**state["run"], "seed": 2}}))
    with pytest.raises(BadInput, match=r"result\.json: .*found one of another: seed is 2 there, 0 here"):
        evaluate(backbone, voc, TINY, work)
    result.unlink()
    with pytest.raises(BadInput, match=r"trained\.pt: .*found one of another: seed is 1 there, 0 here"):
        evaluate(backbone, voc, TINY, work)
    torch.save(state, trained)
    result.write_text(done)

    # Done is done; another protocol has a folder of its own; one more trial only adds its run.
    assert dict(evaluate(backbone, voc, TINY, work)) == dict(unbroken)
    assert iterations == [2, 3]
    more = evaluate(backbone, voc, TINY.model_copy(update={"trials": 2}), work)
    assert iterations == [2, 3, 0, 1, 2, 3]
    assert set(more.spread) == set(COLUMNS)
    assert more.trials == dict.fromkeys(COLUMNS, 2)
    assert len(list(work.iterdir())) == 1
    evaluate(backbone, voc, TINY.model_copy(update={"iterations": 1, "steps": ()}), work)
    assert len(list(work.iterdir())) == 2
    protocols = [json.loads((each / "run.json").read_text())["protocol"] for each in work.iterdir()]
    assert {each["iterations"] for each in protocols} == {1, 4}


def test_a_class_without_a_test_object_is_refused_before_anything_is_trained(
    voc, backbone, tmp_path, monkeypatch
):
    truth = datasets.detection(voc, "test07")
    for each in truth[0]["annotations"]:
        each["difficult"] = 1
    monkeypatch.setattr(datasets, "detection", lambda _, split: truth[:1])
    with pytest.raises(BadInput, match=rf"of class {voc.class_names[0]} that is not difficult"):
        evaluate(backbone, voc, TINY, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_torchrun_is_refused(voc, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="without torchrun"):
        evaluate(backbone, voc, TINY, tmp_path)
