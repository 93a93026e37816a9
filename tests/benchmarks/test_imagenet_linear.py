from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simclr.augment import augment
from simclr.benchmarks import _images, _linear, imagenet_linear
from simclr.datasets import decode, samples
from simclr.optim import LARS
from simclr.transforms import center_crop

MINIATURE = imagenet_linear.Config(image_size=32, resize=32, batch_size=30, micro_batch=7, epochs=3)


def test_defaults_are_those_of_resnet50_linear_8xb512_coslr_90e():
    """MMSelfSup v0.11.0, configs/benchmarks/classification/imagenet/, and its bases."""
    config = imagenet_linear.Config()
    assert (config.batch_size, config.epochs, config.lr) == (4096, 90, 1.6)
    assert (config.momentum, config.weight_decay, config.trust_coefficient) == (0.9, 0, 1e-3)
    assert (config.image_size, config.resize, config.crop_area) == (224, 256, (0.08, 1.0))
    assert (config.precision, config.seed) == ("float32", 0)


def test_lars_adapts_weight_and_bias_and_decays_neither():
    """MMSelfSup v0.11.0, mmselfsup/core/optimizer/optimizers.py; the config excludes nothing."""
    head = imagenet_linear.one_head({"avgpool": 8}, 3, torch.Generator().manual_seed(0))
    optimizer = imagenet_linear.lars(imagenet_linear.Config(), head.parameters())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1.6, 0.9, 0)
    assert (group["trust_coefficient"], group["eps"], group["lars_exclude"]) == (1e-3, 1e-8, False)
    assert len(group["params"]) == 2


def test_the_learning_rate_falls_as_half_a_cosine_per_epoch_without_warm_up():
    config = imagenet_linear.Config()
    schedule = _linear.cosine(config.epochs)
    found = [config.lr * schedule(epoch) for epoch in (0, 30, 45, 60, 89)]
    assert found == pytest.approx([1.6, 1.2, 0.8, 0.4, 4.87e-4], rel=1e-3)


def test_training_images_are_cropped_and_flipped_alone():
    transform = _images.train_transform(imagenet_linear.Config())
    views = [transform.draw(300, 200, np.random.default_rng(seed)) for seed in range(200)]
    assert {(view.jitter, view.grayscale, view.sigma, view.lighting) for view in views} == {
        (None, False, 0.0, (0.0, 0.0, 0.0))
    }


def test_the_head_begins_as_published():
    head = imagenet_linear.one_head({"avgpool": 2048}, 100, torch.Generator().manual_seed(0))["avgpool"]
    assert head.weight.shape == (100, 2048)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not head.bias.any()


@pytest.mark.parametrize("on", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_evaluation_equals_plain_full_batches(on, few_images, small_backbone, tmp_path):
    """Features of the whole batch at once, LARS on weight and bias, cosine per epoch, written out."""
    dataset = few_images(5, 4)
    found = imagenet_linear.evaluate(small_backbone, dataset, MINIATURE, tmp_path)

    network = small_backbone.model()
    images = _images.Images(samples(dataset, "train"), _images.train_transform(MINIATURE), MINIATURE.seed)
    head = _linear.classifier(network.channels["avgpool"], 10, torch.Generator().manual_seed(MINIATURE.seed))
    optimizer = LARS(head.parameters(), lr=1.6)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.8 * (1 + np.cos(np.pi * epoch / 3))
        order = np.random.default_rng((MINIATURE.seed, epoch)).permutation(50)
        for start in (0, 30):
            crops, rows, labels = zip(
                *(images[epoch, int(i)] for i in order[start : start + 30]), strict=True
            )
            with torch.no_grad():
                features = network(augment(torch.stack(crops), torch.stack(rows)))
            optimizer.zero_grad()
            F.cross_entropy(head(features), torch.tensor(labels)).backward()
            optimizer.step()
    (newest,) = tmp_path.glob("*/checkpoint-*.pt")
    state = torch.load(newest, map_location="cpu", weights_only=True)["model"]
    torch.testing.assert_close(state["avgpool.weight"], head.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["avgpool.bias"], head.bias.detach(), rtol=1e-4, atol=1e-6)

    val = samples(dataset, "val")
    crop = center_crop(MINIATURE.resize, MINIATURE.image_size)
    with torch.no_grad():
        scores = head(network(torch.stack([crop(decode(path)) for path in val.paths])))
    right = (scores.argmax(1).numpy() == val.labels).mean()
    assert found["avgpool"] == pytest.approx(100 * right)
    assert found["avgpool"] <= found["avgpool_top5"] <= 100
