"""Nearest-neighbour accuracy while a backbone is being pretrained: seen in its log, and deciding nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simclr import BadInput, datasets, distributed, loading, transforms
from simclr.benchmarks import imagenet_knn
from simclr.datasets import Dataset, Samples
from simclr.model import ResNet

BANK, QUERIES = 10_000, 2_000  # images at most, of the train and of the val split
NEIGHBOURS = 20
BATCH = 256


def accuracy(backbone: ResNet, dataset: Dataset, image_size: int, workers: int) -> float | None:
    """Return top-1 of part of the val split in percent, on the first rank; None on the others.

    The protocol is that of the benchmark imagenet_knn with k = 20, on evenly spaced images of both splits.
    Every rank encodes a share of them, with the first one's running statistics. Nothing of a training
    changes: BatchNorm is in evaluation mode meanwhile, and nothing is drawn.
    """
    bank = evenly(datasets.samples(dataset, "train"), BANK)
    queries = evenly(datasets.samples(dataset, "val"), QUERIES)
    training, statistics = backbone.training, [buffer.clone() for buffer in backbone.buffers()]
    distributed.from_first(backbone.buffers())
    backbone.eval()
    (train, labels), (test, truth) = (encode(backbone, each, image_size, workers) for each in (bank, queries))
    backbone.train(training)
    for buffer, own in zip(backbone.buffers(), statistics, strict=True):
        buffer.copy_(own)
    if distributed.rank() > 0 or min(len(train), len(test)) == 0:
        return None
    predicted = imagenet_knn.classify(train, labels, test, min(NEIGHBOURS, len(train)))
    return 100 * (predicted == truth).double().mean().item()


def evenly(samples: Samples, count: int) -> Samples:
    """Return `count` evenly spaced samples, or all where there are not more."""
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    return Samples(samples.paths[chosen], samples.labels[chosen])


@dataclass(frozen=True)
class Crops:
    """Centre crops of images for torch's DataLoader: `(crop, True)`, or `(zeros, False)` if undecodable."""

    paths: Sequence[Path]
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        try:
            image = datasets.decode(self.paths[index])
        except BadInput:
            return torch.zeros(3, self.size, self.size), False
        return transforms.center_crop(round(self.size * 256 / 224), self.size)(image), True


@torch.no_grad()
def encode(backbone: ResNet, samples: Samples, image_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Return features `(N, D)` and labels `(N,)` of all samples that can be decoded; ranks share the work."""
    mine = np.arange(len(samples))[distributed.rank() :: distributed.world_size()]
    device = next(backbone.parameters()).device
    loader = DataLoader(
        Crops(samples.paths[mine], image_size),
        BATCH,
        generator=torch.Generator(),  # a loader draws a seed even where nothing is random
        **loading.workers(workers),
    )
    width = backbone.channels["avgpool"]
    parts = [torch.empty(0, width + 1, device=device)]  # the last column: decoded or not
    with loading.ending(loader) as batches:
        for batch, decoded in batches:
            rows = backbone(batch.to(device, memory_format=torch.channels_last))
            parts.append(torch.cat([rows, decoded.to(device)[:, None]], 1))
    ranks = distributed.gather(torch.cat(parts))
    rows = torch.empty(len(samples), width + 1, device=device)
    for rank, part in enumerate(ranks):
        rows[rank :: len(ranks)] = part
    decoded = rows[:, -1] > 0
    return rows[decoded, :-1], torch.from_numpy(samples.labels)[decoded.cpu()]
