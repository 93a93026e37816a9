"""COCO detection: the protocol as VOC's and a delta, its variants, and a miniature run with masks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from simclr import BadInput, checkpoint, datasets
from simclr.benchmarks import voc0712_detection
from simclr.benchmarks.coco2017_detection import COLUMNS, Config, evaluate
from simclr.model import resnet

ROOT = Path(__file__).parents[2]

TINY = {
    "engine": "torchvision",
    "iterations": 2,
    "steps": [],
    "warmup_iterations": 1,
    "batch_size": 2,
    "train_edges": [64],
    "test_edge": 64,
    "max_edge": 128,
    "anchor_sizes": [8, 16, 32, 48, 64],
    "rpn_batch": 16,
    "rpn_pre_nms": [30, 10],
    "rpn_post_nms": [12, 8],
    "roi_batch": 4,
    "head_channels": 8,
    "fc_channels": 16,
    "precise_bn": 1,
    "score_threshold": 0,
    "detections": 5,
}


def test_the_default_is_fpn_1x():
    """Detectron2's Mask R-CNN R50-FPN 1x, as MMSelfSup v0.11.0 configures it."""
    config = Config()
    assert (config.detector, config.iterations, config.steps) == ("fpn", 90000, (60000, 80000))
    assert (config.warmup_iterations, config.trials) == (1000, 1)
    assert config.train_edges == (640, 672, 704, 736, 768, 800)
    assert (config.rpn_pre_nms, config.rpn_post_nms) == ((2000, 1000), (1000, 1000))
    assert Config(variant="fpn_1x") == config


def test_variants_set_what_is_not_given():
    c4 = Config(variant="c4_2x")
    assert (c4.detector, c4.iterations, c4.steps) == ("c4", 180000, (120000, 160000))
    assert (c4.rpn_pre_nms, c4.rpn_post_nms) == ((12000, 6000), (2000, 1000))
    assert Config(variant="c4_2x", rpn_post_nms=[50, 20]).rpn_post_nms == (50, 20)
    with pytest.raises(ValidationError, match="variant"):
        Config(variant="c4_3x")


def differences(variant, base):
    ours, theirs = Config(variant=base).model_dump(), Config(variant=variant).model_dump()
    return {key: value for key, value in theirs.items() if value != ours[key] and key != "variant"}


@pytest.mark.parametrize("length", ["1x", "2x"])
def test_mmselfsups_files_are_short_deltas_from_detectron2s(length):
    """MMSelfSup v0.11.0, configs/benchmarks: detectron2/coco_R_50_C4_2x_moco.yaml and mmdetection/coco."""
    assert differences(f"mmselfsup_c4_{length}", f"c4_{length}") == {"train_max_edge": 1200}
    epochs, drops = {"1x": (12, (8, 11)), "2x": (24, (16, 22))}[length]
    per_epoch = -(-117266 // 16)  # images with objects; batches of 16
    assert differences(f"mmselfsup_fpn_{length}", f"fpn_{length}") == {
        "box_head": "4conv1fc",
        "norm_weight_decay": 1e-4,
        "precise_bn": 0,
        "iterations": epochs * per_epoch,
        "steps": tuple(drop * per_epoch for drop in drops),
    }


@pytest.mark.parametrize("benchmark", ["voc0712_detection", "coco2017_detection"])
def test_the_config_file_names_the_variants_that_published_rows_have(benchmark):
    rows = yaml.safe_load((ROOT / "results/published.yaml").read_text())
    text = (ROOT / "config/config.yaml").read_text()
    comment = text.partition("# A detection is compared only")[2].partition("voc0712_detection:")[0]
    variants = {row["variants"][benchmark] for row in rows if benchmark in row.get("variants", {})}
    assert variants
    assert {each for each in variants if each not in re.findall(r"\w+", comment)} == set()


def test_what_is_not_said_is_vocs():
    voc, coco = voc0712_detection.Config(), Config()
    delta = {"iterations", "steps", "warmup_iterations", "train_edges", "trials"}
    delta |= {"variant", "detector", "rpn_pre_nms", "rpn_post_nms"}
    same = set(voc0712_detection.Config.model_fields) - delta
    assert {key: getattr(coco, key) for key in same} == {key: getattr(voc, key) for key in same}


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "backbone.safetensors"
    checkpoint.save_backbone(
        path, resnet("resnet18_w0.125").state_dict(), {"architecture": "resnet18_w0.125"}
    )
    return checkpoint.Backbone.open(path)


def test_crowds_alone_are_refused_before_anything_is_trained(backbone, dataset, tmp_path, monkeypatch):
    full = dataset("coco2017")
    truth = datasets.detection(full, "val2017")
    for image in truth:
        for each in image["annotations"]:
            each["iscrowd"] = 1
    monkeypatch.setattr(datasets, "detection", lambda _, split: truth)
    with pytest.raises(BadInput, match="no test image has an object that is no crowd"):
        evaluate(backbone, full, Config(**TINY), tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("variant", ["fpn_1x", "c4_1x", "mmselfsup_fpn_1x"])
def test_a_miniature_run_with_masks(variant, backbone, dataset, tmp_path, monkeypatch):
    full = dataset("coco2017")
    cut = {"train2017": datasets.detection(full, "train2017")[:4]}
    cut["val2017"] = datasets.detection(full, "val2017")[:3]
    monkeypatch.setattr(datasets, "detection", lambda _, split: cut[split])
    metrics = evaluate(backbone, full, Config(**TINY, variant=variant), tmp_path / "work")
    assert metrics.details["variant"] == variant
    assert list(metrics) == list(COLUMNS)
    assert all(0 <= value <= 100 for value in metrics.values())
    assert "loss_mask" in metrics.details["last_losses"]
    assert metrics.details["load"]["unmatched"] == []
