"""Cityscapes: MMSegmentation is told what differs from VOC12 + Aug, and the miniature runs."""

from __future__ import annotations

import pytest
import torch

from simclr.benchmarks import _segmentation, voc12aug_segmentation
from simclr.benchmarks.cityscapes_segmentation import Config, evaluate
from simclr.checkpoint import Backbone, save_backbone
from simclr.model import resnet


def test_protocol(dataset, tmp_path):
    cityscapes = dataset("cityscapes")
    built = _segmentation.settings(Config(), "resnet50", cityscapes, tmp_path, "cpu")
    model = built.model
    assert model.backbone.type == "ResNet"
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 19
    assert model.decode_head.align_corners is model.auxiliary_head.align_corners is True
    assert model.data_preprocessor.size == (769, 769)
    assert model.test_cfg == {"mode": "slide", "crop_size": (769, 769), "stride": (513, 513)}
    assert built.train_cfg.max_iters == 40_000
    scheduler = built.param_scheduler[0]
    assert (scheduler.power, scheduler.eta_min, scheduler.end) == (0.9, 1e-4, 40_001)
    assert built.train_dataloader.batch_size == 8
    train, test = built.train_dataloader.dataset, built.test_dataloader.dataset
    assert train.data_root == test.data_root == str(cityscapes.root)
    assert (train.data_prefix.img_path, train.data_prefix.seg_map_path) == (
        "leftImg8bit/train",
        "gtFine/train",
    )
    assert (test.data_prefix.img_path, test.data_prefix.seg_map_path) == ("leftImg8bit/val", "gtFine/val")
    steps = {step.type: step for step in train.pipeline}
    assert (steps["RandomResize"].scale, steps["RandomResize"].ratio_range) == ((2049, 1025), (0.5, 2.0))
    assert (steps["RandomCrop"].crop_size, steps["RandomCrop"].cat_max_ratio) == ((769, 769), 0.75)
    assert {step.type: step for step in test.pipeline}["Resize"].scale == (2049, 1025)


def test_only_the_delta_is_restated():
    voc, cityscapes = voc12aug_segmentation.Config(), Config()
    differing = {key for key in Config.model_fields if getattr(voc, key) != getattr(cityscapes, key)}
    assert differing == {
        *("iterations", "batch_size", "resize", "crop", "align_corners", "slide_stride", "checkpoint_every")
    }


def test_miniature_runs_with_sliding_windows(dataset, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, resnet("resnet18_w0.125").state_dict(), {"architecture": "resnet18_w0.125"})
    cityscapes = dataset("cityscapes")
    config = Config(
        iterations=2, batch_size=2, workers=0, resize=(97, 49), crop=49, slide_stride=33, decode_channels=8
    )
    metrics = evaluate(Backbone.open(path), cityscapes, config, tmp_path / "work")
    assert 0 <= metrics["miou"] <= 100
    assert metrics.details["images"] == cityscapes.images["val"]
    counted = metrics.details["iou"].keys() | metrics.details["not_counted"].keys()
    assert counted == set(cityscapes.class_names)
    assert metrics["miou"] == pytest.approx(
        sum(metrics.details["iou"].values()) / len(metrics.details["iou"])
    )
