"""The images of a pretraining in order: a function of seed, epoch, image and number of processes alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from simclr import BadInput, datasets, distributed
from simclr.config import Execution, Recipe
from simclr.loading import ending, pieces, workers
from simclr.paths import Unreachable
from simclr.transforms import read_pixels, two_crops, two_views

PIECE = 64  # images that a worker makes at one time
DECODED_BYTES = 256 * 2**20  # a dataset that is smaller in memory is decoded once

Batch = list[Tensor]  # what a loader gives of n images: `(n, 2, …)` each


def order(images: int, batch_size: int, seed: int, epoch: int, rank: int, world: int) -> list[np.ndarray]:
    """Return the images of each step of `epoch` for `rank`; the last step may be smaller.

    A step takes the same images whatever the number of processes, each of which has an equal share. For that
    the last step is filled up with the first images of the epoch, at most `world` − 1 of them.
    """
    shuffled = np.random.default_rng([seed, epoch]).permutation(images)
    shuffled = np.concatenate([shuffled, shuffled[: -images % world]])
    return [shuffled[i : i + batch_size][rank::world] for i in range(0, len(shuffled), batch_size)]


def keys(
    config: Recipe, images: int, steps_per_epoch: int, first_step: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield this process's (epoch, image) pairs of every step from `first_step` to the end of the run."""
    for epoch in range(first_step // steps_per_epoch, config.epochs):
        batches = order(
            images, config.batch_size, config.seed, epoch, distributed.rank(), distributed.world_size()
        )[:steps_per_epoch]
        done = max(first_step - epoch * steps_per_epoch, 0)
        for batch in batches[done:]:
            yield [(epoch, int(i)) for i in batch]


class Views:
    """Two views of an image as the item (epoch, image) of a map-style dataset; decoded beforehand if few."""

    def __init__(self, config: Recipe, execution: Execution, paths: Sequence[Path]):
        self.seed, self.paths, self.bear = config.seed, paths, execution.skip_images
        if config.pipeline == "device":
            self.read, self.draw = read_pixels, two_crops(config.augmentation)
        else:
            self.read, self.draw = datasets.decode, partial(_one, two_views(config.augmentation))
        self.decoded = decode_all(paths, self.read, DECODED_BYTES)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Sequence[Tensor], list[int]]:
        """Return what the pipeline makes of an image, and which images before it could not be decoded.

        One more than the run bears is replaced too: all ranks then give up together, and none waits for one.
        """
        epoch, i = key
        undecodable: list[int] = []
        while True:
            try:
                image = self.decoded[i] if self.decoded else self.read(self.paths[i])
                return self.draw(image, np.random.default_rng([self.seed, epoch, i])), undecodable
            except Unreachable:
                raise
            except BadInput as error:
                undecodable.append(i)
                if len(undecodable) > self.bear + 1:
                    raise
                print(f"{error}; the next image takes its place", file=sys.stderr)
                i = (i + 1) % len(self.paths)


def _one(draw: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor]:
    return (draw(*arguments),)


def decode_all(paths: Sequence[Path], read: Callable[[Path], Any], limit: int) -> list[Any]:
    """Return all images decoded, or none when they need more than `limit` bytes or one cannot be decoded."""
    images: list[Any] = []
    size = 0
    for path in paths:
        try:
            images.append(read(path))
        except BadInput:
            return []  # it is named when its turn comes
        size += np.asarray(images[-1]).nbytes
        if size > limit:
            return []
    return images


@contextmanager
def batches(
    config: Recipe,
    execution: Execution,
    paths: Sequence[Path],
    steps_per_epoch: int,
    first_step: int,
    device: torch.device,
    number: int,
) -> Iterator[Iterator[tuple[Batch, list[int]]]]:
    """Yield this process's batches, one per step to the end: images on `device`, and which had no image.

    A `number` of workers make a batch together, in pieces, so that what they hold does not grow with it.
    """
    steps = partial(keys, config, len(paths), steps_per_epoch, first_step)
    loader = DataLoader(
        Views(config, execution, paths),
        batch_sampler=(piece for step in steps() for piece in pieces(step, PIECE)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        **workers(number),
    )
    with ending(loader) as made:
        yield (_joined([next(made) for _ in pieces(step, PIECE)], device) for step in steps())


def _collate(items: list[tuple[Sequence[Tensor], list[int]]]) -> tuple[Batch, list[int]]:
    made, undecodable = zip(*items, strict=True)
    return default_collate(list(map(list, made))), [i for each in undecodable for i in each]


def _joined(pieces: list[tuple[Batch, list[int]]], device: torch.device) -> tuple[Batch, list[int]]:
    """Return one batch; its first tensor, the images, on `device`, the parameters where they are."""
    made, undecodable = zip(*pieces, strict=True)
    images, *parameters = zip(*made, strict=True)
    images = torch.cat([each.to(device, non_blocking=True) for each in images])
    return [images, *map(torch.cat, parameters)], [i for each in undecodable for i in each]
