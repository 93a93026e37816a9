"""What a linear evaluation or a fine-tuning sees of its images: crops, colours and order.

A loader's worker decodes an image, draws all that is random and crops; flip, colours and normalisation are
made of whole batches on the device that trains. `reference` makes the same of one image with PIL, as
published.

Every random number is a function of (seed, epoch, index of the image), so a training that was killed and
resumed, or that loads images in other processes, sees the same as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from simclr import BadInput, distributed, loading
from simclr.augment import augment
from simclr.benchmarks._training import Training
from simclr.datasets import Samples, decode, samples
from simclr.transforms import (
    HUE,
    View,
    crop_centre,
    draw_crop,
    draw_jitter,
    normalize,
    parameters,
    render,
    resize_short_edge,
    resized_crop,
    to_tensor,
)

if TYPE_CHECKING:
    from simclr.datasets import Dataset

# ---------------------------------------------------------------- what is made of an image

Box = tuple[int, int, int, int]  # left, top, width, height in pixels

# Principal components of ImageNet's RGB colours in [0, 1] (Krizhevsky et al. 2012; MMSelfSup, Lighting).
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


class Transform(NamedTuple):
    """`prepare` an image, `draw` a view of what is left of it, and resize that to `size` × `size`."""

    prepare: Callable[[Image.Image], Image.Image]
    draw: Callable[[int, int, np.random.Generator], View]
    size: int


def train_transform(
    config: Training, crop: str = "random_resized", jitter: float = 0, lighting: float = 0
) -> Transform:
    """Return the transform of training images: crop → flip → colour jitter → lighting.

    `crop` is "random_resized", of `crop_area` and an aspect ratio from 3/4 to 4/3, or "shifted": short edge
    and central crop to `resize`, then a random `image_size` of it (Places205). `jitter` is the range of the
    brightness, contrast and saturation factors around 1, always on, in random order; `lighting` the standard
    deviation of AlexNet's noise, before normalisation (MMSelfSup v0.11.0, mhead configs).
    """
    if crop == "shifted":
        prepare = partial(centred, resize=config.resize, size=config.resize)
        box = partial(shifted_box, size=config.image_size)
    else:
        prepare, box = unchanged, partial(draw_crop, area=config.crop_area, ratio=(3 / 4, 4 / 3))
    return Transform(
        prepare, partial(draw_view, box=box, jitter=jitter, lighting=lighting), config.image_size
    )


def test_transform(config: Training) -> Transform:
    """Return the transform of test images: short edge to `resize`, centre crop; nothing is random."""
    prepare = partial(centred, resize=config.resize, size=config.image_size)
    return Transform(prepare, whole_view, config.image_size)


def unchanged(image: Image.Image) -> Image.Image:
    """Return `image` as it is."""
    return image


def centred(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Return the central `size` × `size` pixels of `image` after its short edge was resized to `resize`."""
    return crop_centre(resize_short_edge(image, resize), size)


def whole_view(width: int, height: int, rng: np.random.Generator) -> View:
    """Return the view that is all of the image."""
    return View((0, 0, width, height))


def shifted_box(width: int, height: int, rng: np.random.Generator, size: int) -> Box:
    """Draw a square of `size` pixels in one of `width` pixels."""
    left, top = (int(edge) for edge in rng.integers(width - size + 1, size=2))
    return left, top, size, size


def draw_view(
    width: int,
    height: int,
    rng: np.random.Generator,
    box: Callable[..., Box],
    jitter: float,
    lighting: float,
) -> View:
    """Draw crop, flip, colour factors and light of a view."""
    view = View(box(width, height, rng=rng), flip=rng.random() < 0.5)
    if jitter:
        drawn = draw_jitter(jitter, jitter, jitter, 0, rng)
        # A hue that stays may as well come last: then a batch is blended in one go.
        order = (*(change for change in drawn.order if change != HUE), HUE)
        view = view._replace(jitter=drawn._replace(order=order))
    return view._replace(lighting=light(rng.normal(0, lighting, 3))) if lighting else view


def light(alpha: np.ndarray) -> tuple[float, ...]:
    """Return Σ alpha·eigenvalue·eigenvector: what lighting adds to R, G, B in [0, 1]; `alpha`: `(3,)`."""
    return tuple((EIGENVECTORS @ (alpha * EIGENVALUES)).tolist())


def crop(transform: Transform, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return a view for the device: its crop `(3, S, S)` uint8, and what is still to be done to it, `(15,)`.

    From the same generator `reference` draws the same view.
    """
    image = transform.prepare(image)
    view = transform.draw(*image.size, rng)
    return resized_crop(np.asarray(image), view.box, transform.size)[0], parameters(view)[0]


def reference(transform: Transform, image: Image.Image, rng: np.random.Generator) -> Tensor:
    """Return a view, finished, `(3, S, S)`, made with PIL, which rounds to 8 bits after every change."""
    image = transform.prepare(image)
    view = transform.draw(*image.size, rng)
    return normalize(
        to_tensor(render(image, view, transform.size)) + torch.tensor(view.lighting)[:, None, None]
    )


# ---------------------------------------------------------------- splits


class Images(torch.utils.data.Dataset):
    """Crops of images; an item is asked for as (epoch, index), which decide all that is random in it."""

    def __init__(self, samples: Samples, transform: Transform, seed: int):
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Return crop, what is still to be done to it, and label."""
        return *crop(self.transform, *self.drawn(item)), int(self.samples.labels[item[1]])

    def drawn(self, item: tuple[int, int]) -> tuple[Image.Image, np.random.Generator]:
        """Return the decoded image of an item, and the generator that decides what is random in it."""
        epoch, index = item
        return decode(self.samples.paths[index]), np.random.default_rng((self.seed, epoch, index))


def train_and_val(dataset: Dataset, config: Training) -> tuple[Samples, Samples]:
    """Return both splits.

    Raises `BadInput` for another dataset than the config's, an empty split, and a label that the dataset does
    not have.
    """
    if dataset.name != config.dataset:
        raise BadInput(
            f"--dataset: expected the manifest of {config.dataset}, found that of {dataset.name}; give "
            f"{config.dataset}.json"
        )
    splits = samples(dataset, "train"), samples(dataset, "val")
    for name, split in zip(("train", "val"), splits, strict=True):
        check_labels(split, dataset.classes, f"{dataset.name} {name}")
    return splits


def check_labels(split: Samples, classes: int, where: str) -> None:
    """Raise `BadInput` unless `split` has images and all its labels are in 0 … `classes` - 1."""
    if len(split.labels) == 0:
        raise BadInput(f"{where}: expected at least one image, found none")
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise BadInput(
            f"{where}: expected labels 0…{classes - 1}, found {split.labels[first]} for "
            f"{split.paths[first]}; correct the list of the split, or `classes` of the dataset in the config"
        )


# ---------------------------------------------------------------- order


def steps_per_epoch(images: int, config: Training) -> int:
    """Return the steps of an epoch, of which the last has what is left of the images.

    Raises `BadInput` when that is too little for every process to have one.
    """
    last, world = (images - 1) % config.batch_size + 1, distributed.world_size()
    if last < world:
        raise BadInput(
            f"the last batch of an epoch has {last} images, fewer than the {world} processes; start fewer "
            "processes"
        )
    return math.ceil(images / config.batch_size)


def plan(images: int, config: Training, micro_batch: int, first_step: int = 0) -> Iterator[list]:
    """Yield this process's part of each step from `first_step` to the end, in pieces of (epoch, index).

    A piece has `micro_batch` images, the last one of a step may have fewer. The batches, a random permutation
    per epoch cut in pieces, are the same for any number of processes.
    """
    per_epoch = steps_per_epoch(images, config)
    for epoch in range(first_step // per_epoch, config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(images)
        for step in range(max(first_step - epoch * per_epoch, 0), per_epoch):
            batch = order[step * config.batch_size :][: config.batch_size]
            yield from loading.pieces([(epoch, index) for index in rank_share(batch.tolist())], micro_batch)


def rank_share(items: Sequence) -> Sequence:
    """Return this process's share of `items`."""
    return items[distributed.rank() :: distributed.world_size()]


@contextmanager
def load(
    images: Images, items: Iterable[list[tuple[int, int]]], device: torch.device
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Yield finished views `(n, 3, S, S)` and labels `(n,)` on `device`, for each list of (epoch, index).

    With a GPU, the other cores of the job decode and crop; on the CPU the network needs them itself.
    """
    cuda = device.type == "cuda"
    loader = DataLoader(
        images,
        batch_sampler=items,
        pin_memory=cuda,
        **loading.workers(loading.divide_cores(device) if cuda else 0),
    )
    with loading.ending(loader) as batches:
        yield (
            (augment(crops.to(device, non_blocking=True), rows), labels.to(device, non_blocking=True))
            for crops, rows, labels in batches
        )
