from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simclr.benchmarks import imagenet_mhead
from simclr.checkpoint import Backbone
from simclr.model import GRID

CHANNELS = {"feature1": 3, "feature2": 3, "feature3": 4, "feature4": 5, "feature5": 6}
MINIATURE = imagenet_mhead.Config(
    image_size=32, resize=32, pooling="adaptive", batch_size=20, micro_batch=8, epochs=2, lr=0.05
)


def heads(classes=7):
    return imagenet_mhead.five_heads(CHANNELS, classes, torch.Generator().manual_seed(0))


def pooled(images=5):
    torch.manual_seed(1)
    return {layer: torch.randn(images, n, GRID[layer], GRID[layer]) * 3 + 1 for layer, n in CHANNELS.items()}


def test_defaults_are_the_published_protocol():
    config = imagenet_mhead.Config()
    assert (config.batch_size, config.epochs, config.lr, config.milestones) == (256, 90, 0.01, (30, 60))
    assert (config.momentum, config.weight_decay) == (0.9, 1e-4)
    assert (config.jitter, config.lighting, config.crop, config.pooling) == (
        0.4,
        0.1,
        "random_resized",
        "specified",
    )
    assert (config.image_size, config.resize, config.crop_area) == (224, 256, (0.08, 1.0))


def test_specified_pooling_needs_224_pixels():
    with pytest.raises(ValueError, match="specified is defined for image_size: 224; at image_size: 64 use"):
        imagenet_mhead.Config(image_size=64, resize=64)


def test_heads_equal_slow_separate_heads():
    """Forward, loss and gradient of each head, written out image by image and alone."""
    model, inputs, labels = heads(), pooled(), torch.tensor([0, 1, 2, 6, 6])
    logits = model(inputs)
    sum(F.cross_entropy(x, labels) for x in logits.values()).backward()
    for layer, maps in inputs.items():
        channels = maps.shape[1]
        weight = model[layer][2].weight.detach().clone().requires_grad_()
        bias = model[layer][2].bias.detach().clone().requires_grad_()
        loss = 0.0
        for n in range(len(maps)):
            row = []
            for c in range(channels):
                values = maps[:, c].flatten()
                scale = math.sqrt(values.var(correction=0).item() + 1e-5)
                row.append((maps[n, c].flatten() - values.mean()) / scale)
            scores = weight @ torch.cat(row) + bias
            torch.testing.assert_close(logits[layer][n], scores, rtol=1e-4, atol=1e-5)
            loss = loss + (scores.exp().sum().log() - scores[labels[n]]) / len(maps)
        loss.backward()
        torch.testing.assert_close(model[layer][2].weight.grad, weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model[layer][2].bias.grad, bias.grad, rtol=1e-4, atol=1e-6)


def test_heads_have_no_affine_batchnorm_and_begin_as_published():
    model = heads(classes=100)
    for layer, channels in CHANNELS.items():
        norm, _, linear = model[layer]
        assert isinstance(norm, nn.BatchNorm2d)
        assert (norm.num_features, norm.affine, norm.momentum) == (channels, False, 0.1)
        assert linear.weight.shape == (100, channels * GRID[layer] ** 2)
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not linear.bias.any()
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters == {f"{layer}.2.{kind}" for layer in CHANNELS for kind in ("weight", "bias")}


def test_heads_use_running_statistics_in_the_test():
    model, inputs = heads(), pooled()
    model(inputs)
    model.eval()
    alone = model({layer: maps[:1] for layer, maps in inputs.items()})
    together = model(inputs)
    for layer in CHANNELS:
        torch.testing.assert_close(alone[layer], together[layer][:1])


def test_real_widths_are_those_of_the_published_heads():
    channels = {"feature1": 64, "feature2": 256, "feature3": 512, "feature4": 1024, "feature5": 2048}
    with torch.device("cpu"):
        model = imagenet_mhead.five_heads(channels, 2, torch.Generator().manual_seed(0))
    assert [model[layer][2].in_features for layer in channels] == [9216, 9216, 8192, 9216, 8192]


def test_the_miniature_runs_and_repeats(few_images, small_backbone, tmp_path):
    dataset = few_images(4, 3)
    metrics = imagenet_mhead.evaluate(small_backbone, dataset, MINIATURE, tmp_path / "a")
    assert list(metrics) == [f"feature{i}{top}" for i in range(1, 6) for top in ("", "_top5")]
    assert all(0 <= metrics[f"feature{i}"] <= metrics[f"feature{i}_top5"] <= 100 for i in range(1, 6))
    assert metrics.details == {"train_images": 40, "val_images": 30, "epoch": 2}
    # Finished before: only evaluated again. Afresh: the same numbers.
    assert imagenet_mhead.evaluate(small_backbone, dataset, MINIATURE, tmp_path / "a") == metrics
    assert imagenet_mhead.evaluate(small_backbone, dataset, MINIATURE, tmp_path / "b") == metrics


def test_a_backbone_that_moves_is_an_error(few_images, small_backbone, tmp_path, monkeypatch):
    network = small_backbone.model().train()  # BatchNorm's running statistics will follow the images
    monkeypatch.setattr(Backbone, "model", lambda self: network)
    with pytest.raises(RuntimeError, match="the frozen backbone changed"):
        imagenet_mhead.evaluate(small_backbone, few_images(2, 1), MINIATURE, tmp_path)
