"""VOC12 + Aug: MMSegmentation is told every number of the published protocol."""

from __future__ import annotations

import math

import pytest
import torch
from mmengine.optim import PolyLR
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS, TRANSFORMS
from mmseg.structures import SegDataSample
from PIL import Image

from simclr.benchmarks import _segmentation_config
from simclr.benchmarks.voc12aug_segmentation import Config
from simclr.checkpoint import layout
from simclr.model import resnet


@pytest.fixture
def built(dataset, tmp_path):
    return _segmentation_config.settings(Config(), "resnet50", dataset("voc12aug"), tmp_path, "cpu")


def test_model(built):
    model = built.model
    assert model.pretrained is None
    backbone = model.backbone
    assert (backbone.type, backbone.depth, backbone.style) == ("ResNet", 50, "pytorch")
    assert backbone.strides == (1, 2, 1, 1)
    assert backbone.dilations == (1, 1, 2, 4)
    assert backbone.contract_dilation is True
    assert backbone.norm_eval is False
    assert "frozen_stages" not in backbone
    decode, auxiliary = model.decode_head, model.auxiliary_head
    assert (decode.in_index, decode.in_channels, decode.channels) == (3, 2048, 512)
    assert (decode.num_convs, decode.concat_input, decode.dropout_ratio) == (2, True, 0.1)
    assert (auxiliary.in_index, auxiliary.in_channels, auxiliary.channels) == (2, 1024, 256)
    assert (auxiliary.num_convs, auxiliary.concat_input, auxiliary.dropout_ratio) == (1, False, 0.1)
    assert decode.num_classes == auxiliary.num_classes == 21
    assert decode.align_corners is auxiliary.align_corners is False
    assert (decode.loss_decode.loss_weight, auxiliary.loss_decode.loss_weight) == (1.0, 0.4)
    assert not decode.loss_decode.use_sigmoid
    assert "class_weight" not in decode.loss_decode
    assert model.test_cfg == {"mode": "whole"}


def test_norm_is_synchronised_over_gpus(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(_segmentation_config, "world_size", lambda: 4)
    built = _segmentation_config.settings(Config(), "resnet50", dataset("voc12aug"), tmp_path, "cuda")
    parts = (built.model.backbone, built.model.decode_head, built.model.auxiliary_head)
    assert [part.norm_cfg.type for part in parts] == ["SyncBN"] * 3
    assert built.train_dataloader.batch_size == 4
    assert built.launcher == "pytorch"
    assert built.model_wrapper_cfg.device_ids is None


def test_data(built, dataset):
    root = dataset("voc12aug").root / "VOC2012"
    train, aug = built.train_dataloader.dataset.dataset.datasets
    lists = [
        (part.ann_file, part.data_prefix.img_path, part.data_prefix.seg_map_path)
        for part in (train, aug, built.test_dataloader.dataset)
    ]
    assert lists == [
        ("ImageSets/Segmentation/train.txt", "JPEGImages", "SegmentationClass"),
        ("ImageSets/Segmentation/aug.txt", "JPEGImages", "SegmentationClassAug"),
        ("ImageSets/Segmentation/val.txt", "JPEGImages", "SegmentationClass"),
    ]
    assert {part.data_root for part in (train, aug, built.test_dataloader.dataset)} == {str(root)}
    assert train.pipeline == aug.pipeline
    assert [dict(step) for step in train.pipeline] == [
        {"type": "LoadImage"},
        {"type": "LoadMask", "classes": 21},
        {"type": "RandomResize", "scale": (2048, 512), "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (512, 512), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]
    assert [dict(step) for step in built.test_dataloader.dataset.pipeline] == [
        {"type": "LoadImage"},
        {"type": "Resize", "scale": (2048, 512), "keep_ratio": True},
        {"type": "LoadMask", "classes": 21},
        {"type": "PackSegInputs"},
    ]
    assert built.train_dataloader.batch_size == 16
    assert built.test_dataloader.batch_size == 1
    assert built.train_dataloader.sampler == {"type": "DrawSampler"}
    assert built.train_dataloader.dataset.seed == 0
    # Every image is tested once, whatever the number of processes.
    assert built.test_dataloader.sampler == {"type": "DefaultSampler", "shuffle": False, "round_up": False}


def test_steps_as_they_are_built(built):
    """What the config leaves to MMSegmentation's defaults is the protocol's, too."""
    steps = {step.type: step for step in built.train_dataloader.dataset.dataset.datasets[0].pipeline}
    built = {name: TRANSFORMS.build(step) for name, step in steps.items()}
    assert built["LoadImage"].color_type == "color"  # BGR, upright
    assert built["LoadImage"].imdecode_backend == "cv2"
    distortion = built["PhotoMetricDistortion"]
    assert (distortion.brightness_delta, distortion.hue_delta) == (32, 18)
    assert (distortion.contrast_lower, distortion.contrast_upper) == (0.5, 1.5)
    assert (distortion.saturation_lower, distortion.saturation_upper) == (0.5, 1.5)
    assert built["RandomResize"].resize.interpolation == "bilinear"
    assert built["RandomCrop"].ignore_index == 255
    assert built["RandomFlip"].direction == "horizontal"


def test_network_as_it_is_built(built):
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(built.model)
    decode, auxiliary = model.decode_head, model.auxiliary_head
    assert [conv.conv.kernel_size for conv in (*decode.convs, decode.conv_cat)] == [(3, 3)] * 3
    assert decode.conv_cat.conv.in_channels == 2048 + 512
    assert [conv.conv.dilation for conv in (*decode.convs, *auxiliary.convs)] == [(1, 1)] * 3
    assert [conv.conv.out_channels for conv in auxiliary.convs] == [256]
    for head in (decode, auxiliary):
        assert (head.conv_seg.out_channels, head.ignore_index) == (21, 255)
        assert head.init_cfg == {"type": "Normal", "std": 0.01, "override": {"name": "conv_seg"}}
    assert [block.conv2.dilation[0] for block in model.backbone.layer3] == [1, 2, 2, 2, 2, 2]
    assert [block.conv2.dilation[0] for block in model.backbone.layer4] == [2, 4, 4]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_loss_is_the_mean_over_all_pixels_the_ignored_included(built):
    head = MODELS.build(built.model.decode_head)
    truth = torch.zeros((1, 2, 2), dtype=torch.long)
    truth[0, 0] = 255
    loss = head.loss_decode(torch.zeros(1, 21, 2, 2), truth, ignore_index=255)
    assert float(loss) == pytest.approx(math.log(21) / 2)


def test_nothing_is_downloaded(built):
    def strings(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            return [each for item in value for each in strings(item)]
        return [value] if isinstance(value, str) else []

    assert not [each for each in strings(built.to_dict()) if "://" in each or each.startswith("http")]
    assert built.load_from is None
    assert "init_cfg" not in built.model.backbone


def test_images_are_normalised_as_rgb_and_small_crops_padded_after_it(built, tmp_path):
    Image.new("RGB", (4, 4), (200, 120, 30)).save(tmp_path / "orange.png")
    load = TRANSFORMS.build(built.test_dataloader.dataset.pipeline[0])
    pixels = torch.from_numpy(load({"img_path": str(tmp_path / "orange.png")})["img"]).permute(2, 0, 1)
    process = MODELS.build(built.model.data_preprocessor)
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.zeros((1, 4, 4), dtype=torch.long)))
    sample.set_metainfo({"img_shape": (4, 4)})
    batch = process({"inputs": [pixels], "data_samples": [sample]}, training=True)
    (image,), (truth,) = batch["inputs"], batch["data_samples"]
    assert image.shape == (3, 512, 512)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(image[:, 0, 0], (torch.tensor([200, 120, 30]) - mean) / std)
    assert (image[:, 4:] == 0).all()
    assert (truth.gt_sem_seg.data[:, 4:] == 255).all()


def test_schedule(built):
    assert (built.train_cfg.type, built.train_cfg.max_iters) == ("IterBasedTrainLoop", 20_000)
    optimizer = built.optim_wrapper.optimizer
    assert dict(optimizer) == {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    assert built.optim_wrapper.type == "OptimWrapper"
    assert not built.optim_wrapper.get("clip_grad")
    assert "paramwise_cfg" not in built.optim_wrapper  # decay on BatchNorm and biases, one rate for all
    assert len(built.param_scheduler) == 1  # no warm-up
    assert built.default_hooks.checkpoint is None  # ours writes them
    assert built.val_cfg is None


def test_learning_rate_follows_the_poly_policy(dataset, tmp_path):
    config = Config(iterations=50)
    built = _segmentation_config.settings(config, "resnet50", dataset("voc12aug"), tmp_path, "cpu")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    options = {key: value for key, value in built.param_scheduler[0].items() if key != "type"}
    scheduler = PolyLR(optimizer, **options)
    for t in range(50):
        expected = (0.01 - 1e-4) * (1 - t / 50) ** 0.9 + 1e-4
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_network_is_the_simclr_backbone(built):
    """Names and shapes of ResNet-50 are those of the backbone file, so that loading is exact."""
    with torch.device("meta"):
        found = MODELS.build(built.model.backbone).state_dict()
    expected = layout("resnet50")
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in expected.items()
    }


def test_undilated_stages_compute_what_the_backbone_does(dataset, tmp_path):
    architecture = "resnet18_w0.125"
    built = _segmentation_config.settings(Config(), architecture, dataset("voc12aug"), tmp_path, "cpu")
    network, ours = MODELS.build(built.model.backbone), resnet(architecture).eval()
    network.load_state_dict(ours.state_dict(), strict=True)
    network.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        stages, features = network(images), ours.forward_features(images)
    torch.testing.assert_close(stages[0], features["feature2"])
    torch.testing.assert_close(stages[1], features["feature3"])
    assert [tuple(stage.shape[1:]) for stage in stages] == [(8, 16, 16), (16, 8, 8), (32, 8, 8), (64, 8, 8)]
