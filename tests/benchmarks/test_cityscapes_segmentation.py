"""Cityscapes: MMSegmentation is told what differs from VOC12 + Aug, and the miniature runs."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from torch.nn.functional import interpolate

from simclr.benchmarks import _segmentation_config, voc12aug_segmentation
from simclr.benchmarks.cityscapes_segmentation import Config, evaluate
from simclr.checkpoint import Backbone, save_backbone
from simclr.model import resnet


def test_protocol(dataset, tmp_path):
    cityscapes = dataset("cityscapes")
    built = _segmentation_config.settings(Config(), "resnet50", cityscapes, tmp_path, "cpu")
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
    assert dict(built.optim_wrapper.optimizer) == {
        "type": "SGD",
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    train, test = built.train_dataloader.dataset.dataset, built.test_dataloader.dataset
    assert train.data_root == test.data_root == str(cityscapes.root)
    assert (train.data_prefix.img_path, train.data_prefix.seg_map_path) == (
        "leftImg8bit/train",
        "gtFine/train",
    )
    assert (test.data_prefix.img_path, test.data_prefix.seg_map_path) == ("leftImg8bit/val", "gtFine/val")
    assert [step.type for step in train.pipeline] == [
        *("LoadImage", "LoadMask", "RandomResize", "RandomCrop", "RandomFlip", "PhotoMetricDistortion"),
        "PackSegInputs",
    ]
    assert [step.type for step in test.pipeline] == ["LoadImage", "Resize", "LoadMask", "PackSegInputs"]
    steps = {step.type: step for step in train.pipeline}
    assert steps["LoadMask"].classes == 19
    assert steps["RandomFlip"].prob == 0.5
    assert (steps["RandomResize"].scale, steps["RandomResize"].ratio_range) == ((2049, 1025), (0.5, 2.0))
    assert (steps["RandomCrop"].crop_size, steps["RandomCrop"].cat_max_ratio) == ((769, 769), 0.75)
    assert {step.type: step for step in test.pipeline}["Resize"].scale == (2049, 1025)


def test_only_the_delta_is_restated():
    voc, cityscapes = voc12aug_segmentation.Config(), Config()
    differing = {key for key in Config.model_fields if getattr(voc, key) != getattr(cityscapes, key)}
    assert differing == {
        *("iterations", "batch_size", "resize", "crop", "align_corners", "slide_stride", "checkpoint_every")
    }


def test_sliding_windows_average_the_overlapping_logits(dataset, tmp_path):
    """Against windows cut by hand: every stride, the last one flush with the border."""
    config = Config(resize=(97, 49), crop=49, slide_stride=33, decode_channels=8)
    built = _segmentation_config.settings(config, "resnet18_w0.125", dataset("cityscapes"), tmp_path, "cpu")
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(built.model).eval()
    image = torch.randn(1, 3, 49, 97)
    total, count = torch.zeros(1, 19, 49, 97), torch.zeros(1, 1, 49, 97)
    with torch.no_grad():
        for left in (0, 33, 97 - 49):
            window = image[..., left : left + 49]
            logits = model.decode_head(model.backbone(window))
            logits = interpolate(logits, size=(49, 49), mode="bilinear", align_corners=True)
            total[..., left : left + 49] += logits
            count[..., left : left + 49] += 1
        meta = {"img_shape": (49, 97), "ori_shape": (49, 97)}
        found = model.inference(image, [meta])
    torch.testing.assert_close(found, total / count)


def test_miniature_runs_with_sliding_windows(dataset, tmp_path, predictions, scores_by_loop):
    torch.manual_seed(0)
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, resnet("resnet18_w0.125").state_dict(), {"architecture": "resnet18_w0.125"})
    cityscapes = dataset("cityscapes")
    config = Config(
        iterations=2, batch_size=2, workers=0, resize=(97, 49), crop=49, slide_stride=33, decode_channels=8
    )
    metrics = evaluate(Backbone.open(path), cityscapes, config, tmp_path / "work")
    assert metrics == pytest.approx(scores_by_loop(cityscapes, predictions), rel=1e-12)
    assert metrics.details["images"] == cityscapes.images["val"]
    counted = metrics.details["iou"].keys() | metrics.details["not_counted"].keys()
    assert counted == set(cityscapes.class_names)
    assert metrics["miou"] == pytest.approx(
        sum(metrics.details["iou"].values()) / len(metrics.details["iou"])
    )
