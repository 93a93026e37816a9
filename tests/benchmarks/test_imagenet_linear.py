from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simclr.benchmarks import _linear, imagenet_linear
from simclr.datasets import samples
from simclr.optim import LARS

MINIATURE = imagenet_linear.Config(image_size=32, resize=32, batch_size=30, micro_batch=7, epochs=3)


def test_defaults_are_the_published_protocol():
    config = imagenet_linear.Config()
    assert (config.batch_size, config.epochs, config.lr) == (4096, 90, 1.6)
    assert (config.momentum, config.weight_decay, config.trust_coefficient) == (0.9, 0, 1e-3)
    assert (config.image_size, config.resize, config.crop_area) == (224, 256, (0.08, 1.0))


def test_the_head_begins_as_published():
    head = imagenet_linear.one_head({"avgpool": 2048}, 100, torch.Generator().manual_seed(0))["avgpool"]
    assert head.weight.shape == (100, 2048)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not head.bias.any()


def test_evaluation_equals_plain_full_batches(few_images, small_backbone, tmp_path):
    """Features of the whole batch at once, LARS on weight and bias, cosine per epoch, written out."""
    dataset = few_images(5, 4)
    found = imagenet_linear.evaluate(small_backbone, dataset, MINIATURE, tmp_path)

    network = small_backbone.model()
    images = _linear.Images(
        samples(dataset, "train"), _linear.train_transform(_linear.resized_crop(MINIATURE)), MINIATURE.seed
    )
    head = _linear.classifier(network.channels["avgpool"], 10, torch.Generator().manual_seed(MINIATURE.seed))
    optimizer = LARS(head.parameters(), lr=1.6)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.8 * (1 + np.cos(np.pi * epoch / 3))
        order = np.random.default_rng((MINIATURE.seed, epoch)).permutation(50)
        for start in (0, 30):
            items = [images[epoch, int(i)] for i in order[start : start + 30]]
            with torch.no_grad():
                features = network(torch.stack([image for image, _ in items]))
            optimizer.zero_grad()
            F.cross_entropy(head(features), torch.tensor([label for _, label in items])).backward()
            optimizer.step()
    state = torch.load(next(tmp_path.glob("*/state.pt")), weights_only=True)["model"]
    torch.testing.assert_close(state["avgpool.weight"], head.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state["avgpool.bias"], head.bias.detach(), rtol=1e-4, atol=1e-6)

    val = samples(dataset, "val")
    tests = _linear.Images(val, _linear.still_transform(MINIATURE), 0)
    with torch.no_grad():
        scores = head(network(torch.stack([tests[0, i][0] for i in range(len(tests))])))
    right = (scores.argmax(1).numpy() == val.labels).mean()
    assert found["avgpool"] == pytest.approx(100 * right)
    assert found["avgpool"] <= found["avgpool_top5"] <= 100
