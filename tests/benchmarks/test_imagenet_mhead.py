from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simclr import BadInput
from simclr.benchmarks import _linear, imagenet_mhead, inat18_mhead, places205_mhead
from simclr.model import GRID, SPECIFIED_POOLING, ResNet, pool_layer

CHANNELS = {"feature1": 3, "feature2": 3, "feature3": 4, "feature4": 5, "feature5": 6}
MINIATURE = imagenet_mhead.Config(
    image_size=32, resize=32, pooling="adaptive", batch_size=20, micro_batch=8, epochs=2, lr=0.05
)


def heads(classes=7):
    return imagenet_mhead.five_heads(CHANNELS, classes, torch.Generator().manual_seed(0))


def pooled(images=5):
    torch.manual_seed(1)
    return {layer: torch.randn(images, n, GRID[layer], GRID[layer]) * 3 + 1 for layer, n in CHANNELS.items()}


def test_defaults_are_those_of_resnet50_mhead_linear_8xb32_steplr_90e():
    """MMSelfSup v0.11.0, configs/benchmarks/classification/imagenet/, and its bases."""
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
    assert (config.precision, config.seed) == ("float32", 0)


def test_the_optimiser_is_nesterovs_and_decays_weights_and_biases():
    model = heads()
    optimizer = imagenet_mhead.sgd(imagenet_mhead.Config(), model.parameters())
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.01, 0.9, True)
    assert (group["weight_decay"], group["dampening"]) == (1e-4, 0)
    assert len(group["params"]) == 10


def test_learning_rates_fall_at_30_and_60():
    config = imagenet_mhead.Config()
    schedule = _linear.steps(config.milestones, 0.1)
    found = [config.lr * schedule(epoch) for epoch in (0, 29, 30, 59, 60, 89)]
    assert found == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


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


def test_pooled_sizes_are_those_of_multi_pooling():
    """MMSelfSup v0.11.0, mmselfsup/models/utils/multi_pooling.py: edge, kernel, stride, pad, edge then."""
    published = {
        "feature1": (112, 10, 10, 4, 12),
        "feature2": (56, 16, 8, 0, 6),
        "feature3": (28, 13, 5, 0, 4),
        "feature4": (14, 8, 3, 0, 3),
        "feature5": (7, 6, 1, 0, 2),
    }
    for layer, (edge, kernel, stride, pad, grid) in published.items():
        assert SPECIFIED_POOLING[layer] == (edge, (kernel, stride, pad))
        ones = pool_layer(layer, torch.ones(1, 1, edge, edge), "specified")[0, 0]
        assert ones.shape == (grid, grid)
        assert ones[0, 0].item() == pytest.approx(((kernel - pad) / kernel) ** 2)  # padded zeros count


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
    assert metrics.details == {
        "train_images": 40,
        "val_images": 30,
        "epoch": 2,
        "processes": 1,
        "precision": "float32",
    }
    # Finished before: only evaluated again. Afresh: the same numbers.
    assert imagenet_mhead.evaluate(small_backbone, dataset, MINIATURE, tmp_path / "a") == metrics
    assert imagenet_mhead.evaluate(small_backbone, dataset, MINIATURE, tmp_path / "b") == metrics


def test_all_heads_learn_from_one_forward_pass(few_images, small_backbone, tmp_path, monkeypatch):
    passes = []

    def counted(network, images):
        passes.append(len(images))
        return forward_features(network, images)

    forward_features = ResNet.forward_features
    monkeypatch.setattr(ResNet, "forward_features", counted)
    imagenet_mhead.evaluate(small_backbone, few_images(4, 3), MINIATURE, tmp_path)
    assert passes == [8, 8, 4] * 4 + [8, 8, 8, 6]  # two epochs of two steps, in pieces; and the test


@pytest.mark.parametrize(
    ("module", "views"),
    [
        (imagenet_mhead, (True, True, False)),
        (places205_mhead, (False, False, True)),
        (inat18_mhead, (False,) * 3),
    ],
)
def test_the_training_gets_the_images_and_rates_of_the_config(module, views, monkeypatch):
    """Colours and light changed; crops of one size; the rate at every milestone a tenth of that before."""
    given = {}
    monkeypatch.setattr(
        _linear, "linear_evaluation", lambda *_, **keywords: given.update(keywords) or ({}, {})
    )
    config = module.Config()
    module.evaluate(None, None, config, None)
    generators = map(np.random.default_rng, range(20))
    drawn = [given["transform"].draw(256, 256, generator) for generator in generators]
    assert {view.jitter is not None for view in drawn} == {views[0]}
    assert {any(view.lighting) for view in drawn} == {views[1]}
    assert ({view.box[2:] for view in drawn} == {(224, 224)}) == views[2]
    rates = [given["schedule"](epoch) for first in config.milestones for epoch in (first - 1, first)]
    assert rates == pytest.approx([0.1 ** (number // 2) for number in range(1, len(rates) + 1)])
    (group,) = given["optimizer"]([torch.zeros(1)]).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (
        0.01,
        0.9,
        True,
        1e-4,
    )


def test_a_backbone_that_moves_is_an_error(few_images, small_backbone, tmp_path, monkeypatch):
    def moving(network, images):
        network.layer1[0].conv1.bias.data[0] += 1e-6
        return forward_features(network, images)

    forward_features = ResNet.forward_features
    monkeypatch.setattr(ResNet, "forward_features", moving)
    with pytest.raises(RuntimeError, match="the frozen backbone changed"):
        imagenet_mhead.evaluate(small_backbone, few_images(2, 1), MINIATURE, tmp_path)


def test_a_backbone_file_that_was_replaced_is_an_error(few_images, small_backbone, tmp_path):
    stale = replace(small_backbone, checkpoint_sha256="0" * 64)
    with pytest.raises(BadInput, match=r"backbone\.safetensors: replaced during the training"):
        imagenet_mhead.evaluate(stale, few_images(2, 1), MINIATURE, tmp_path)


def test_the_learning_curve_is_written_beside_the_record(few_images, small_backbone, tmp_path):
    dataset, curve = few_images(2, 1), tmp_path / "m/imagenet_mhead.csv"
    imagenet_mhead.evaluate(small_backbone, dataset, MINIATURE, tmp_path / "work", curve)
    lines = curve.read_text().splitlines()
    assert lines[0] == "epoch,lr,feature1,feature2,feature3,feature4,feature5"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]
    assert curve.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
