"""Miniature versions of every dataset, in the published on-disk layouts, from images that scikit-learn ships.

The 1,797 handwritten digits (`load_digits`) are the objects; the two photographs (`load_sample_images`) are the
backgrounds of the scenes for detection and segmentation. The classification images show a digit in random
colour, size and place on a two-colour gradient, so that a network can only tell images apart by looking at the
digit. Everything follows from the seed, to the byte; no digit of a train split appears in a val or test split.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from simclr import BadInput

VERSION = 1  # raise it when the bytes change
FINISHED = "demo.json"  # written last
OURS = "README.txt"  # written first; only a folder that has it is ever replaced
README = (
    "Miniature datasets, made by `python -m simclr demo`. That command replaces this folder as a whole.\n"
)

# ---------------------------------------------------------------- the folder


def make(output: Path, seed: int = 0) -> None:
    """Make every miniature dataset in the folder `output`, whole or not at all.

    Raises `BadInput` when `output` holds something that this function did not make.
    """
    digits = load_digits()
    with _replacing_folder(Path(output)) as part:
        for number, (name, write) in enumerate(WRITERS.items()):
            write(part / name, digits, np.random.default_rng([seed, number]))
        (part / FINISHED).write_text(json.dumps({"seed": seed, "version": VERSION}) + "\n")


@contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success rename it to `path`, else remove it."""
    if path.exists() and not (path / OURS).exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(
            f"{path}: expected no folder, an empty one, or one that `python -m simclr demo` made; found other "
            "files; choose another folder for the miniature datasets"
        )
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        (part / OURS).write_text(README)
        yield part
        if path.exists():
            path.rename(old)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- digits


class Digits(NamedTuple):
    """The digits of the train and of the test splits: class → array `(n, 8, 8)` in [0, 1]."""

    train: list[np.ndarray]
    test: list[np.ndarray]


def load_digits(train: int = 140) -> Digits:
    """Return the digits: the first `train` of each class for train splits, the others for test splits."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    classes = [bunch.images[bunch.target == label] / 16 for label in range(10)]
    return Digits([digits[:train] for digits in classes], [digits[train:] for digits in classes])


def glyph(digit: np.ndarray, size: int, angle: float = 0.0) -> np.ndarray:
    """Return the digit as opacity `(h, w)` in [0, 1], `size` pixels wide before the empty rim is cut off.

    Its shape, for masks and boxes, is where the opacity is at least one half.
    """
    image = Image.fromarray((255 * digit).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    opacity = np.asarray(image.rotate(angle, Image.Resampling.BICUBIC), np.float32) / 255
    opacity = np.clip(3 * (opacity - 0.5) + 0.5, 0, 1)
    rows, columns = (np.flatnonzero((opacity >= 0.5).any(axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


# ---------------------------------------------------------------- pictures of one digit


def gradient(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return a linear gradient of two random colours in a random direction, `(height, width, 3)` in [0, 255]."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width]
    along = np.cos(angle) * x / width + np.sin(angle) * y / height
    along = (along - along.min()) / (along.max() - along.min())
    start, end = rng.uniform(0, 255, (2, 3))
    return (start + along[..., None] * (end - start)).astype(np.float32)


def contrasting_colour(rng: np.random.Generator, background: np.ndarray, distance: float = 120) -> np.ndarray:
    """Return a random colour at least `distance` away from the mean colour of `background`, `(h, w, 3)`."""
    mean = background.mean((0, 1))
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - mean) >= distance:
            return colour


def paint(image: np.ndarray, opacity: np.ndarray, x: int, y: int, colour: np.ndarray) -> None:
    """Paint `opacity` in `colour` on `image`, its top left corner at pixel (x, y)."""
    height, width = opacity.shape
    region = image[y : y + height, x : x + width]
    region += opacity[..., None] * (colour - region)


def picture(rng: np.random.Generator, digit: np.ndarray, edge: int = 48) -> np.ndarray:
    """Return one digit in random colour, size and place on a gradient, `(edge, edge, 3)` uint8."""
    image = gradient(rng, edge, edge)
    opacity = glyph(digit, int(rng.integers(edge * 5 // 8, edge + 1)), rng.uniform(-10, 10))
    y, x = (int(rng.integers(0, edge - length + 1)) for length in opacity.shape)
    here = image[y : y + opacity.shape[0], x : x + opacity.shape[1]]
    paint(image, opacity, x, y, contrasting_colour(rng, here))
    return as_bytes(image)


def as_bytes(image: np.ndarray) -> np.ndarray:
    """Round an image in [0, 255] to uint8."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def save_jpeg(image: np.ndarray, path: Path) -> None:
    """Write an RGB image `(h, w, 3)` uint8 as JPEG, colours not subsampled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "JPEG", quality=92, subsampling=0)


# ---------------------------------------------------------------- ImageNet

# In the form of wnids; sorted as the digits are.
WNIDS = tuple(f"n{number}" for number in (13742358, 13742573, 13743269, 13744044, 13744304)) + tuple(
    f"n{number}" for number in (13744521, 13744722, 13744916, 13745086, 13745270)
)


def imagenet(root: Path, digits: Digits, rng: np.random.Generator) -> None:
    """Write train/<wnid>/<wnid>_<n>.JPEG (2,800 images), val/<wnid>/ILSVRC2012_val_<n>.JPEG (400) and meta/."""
    train = [
        (f"{wnid}/{wnid}_{number}.JPEG", label, digits.train[label][number % len(digits.train[label])])
        for label, wnid in enumerate(WNIDS)
        for number in range(280)
    ]
    labels = rng.permutation(np.repeat(np.arange(10), 40))
    seen = [0] * 10
    val = []
    for number, label in enumerate(labels, start=1):
        digit = digits.test[label][seen[label] % len(digits.test[label])]
        seen[label] += 1
        val.append((f"{WNIDS[label]}/ILSVRC2012_val_{number:08d}.JPEG", label, digit))
    for split, samples in (("train", train), ("val", val)):
        for name, _, digit in samples:
            save_jpeg(picture(rng, digit), root / split / name)
    _write_lines(root / "meta/train.txt", [f"{name} {label}" for name, label, _ in train])
    # The published list of the validation images names them without a folder.
    _write_lines(root / "meta/val.txt", [f"{Path(name).name} {label}" for name, label, _ in val])
    for percent in (1, 10):
        chosen = [i for i in range(len(train)) if i % 280 * percent // 100 != (i % 280 + 1) * percent // 100]
        lines = [f"{train[i][0]} {train[i][1]}" for i in chosen]
        _write_lines(root / f"meta/train_{percent}percent.txt", lines)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


# Folder under `output` → the function that fills it. A writer's random numbers follow from the seed and its
# place here, so a change of one dataset leaves the others as they are: add new ones at the end.
WRITERS = {"imagenet": imagenet}
