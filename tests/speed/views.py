"""Two views of an image, images/s on one thread: PIL as published, and its two halves, worker and device.

    python tests/speed/views.py

prints a Markdown table. The photographs are scikit-learn's, as JPEGs of 500 × 375 pixels (quality 90), read
from disk each time. Seconds are the process's own, in which waiting for other programs does not count; each
is the median of rounds in which the pipelines take turns. With a GPU, the device's half is measured there as
well, until the GPU has finished.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from simclr.augment import augment
from simclr.config import Augmentation
from simclr.datasets import decode
from simclr.transforms import read_pixels, two_crops, two_views

MINIATURE = {"image_size": 48, "crop_area": (0.5, 1), "hue": 0.5, "grayscale": 0.8, "flip": 0, "blur": 0}
SETTINGS = {
    "224 px, as published": Augmentation(),
    "48 px": Augmentation(image_size=48),
    "48 px, the miniature's": Augmentation(**MINIATURE),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32, help="per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--gpu-batch", type=int, default=1024, help="views that a GPU works on at once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| views | PIL | worker | device (CPU) | both | worker : PIL | both : PIL | device (GPU) |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder))
        for name, config in SETTINGS.items():
            pil, worker, device = (
                args.images / seconds for seconds in timed(config, paths, args.images, args.rounds)
            )
            both = 1 / (1 / worker + 1 / device)
            gpu = f"{on_gpu(config, paths, args):,.0f}" if torch.cuda.is_available() else "–"
            print(
                f"| {name} | {pil:.0f} | {worker:.0f} | {device:.0f} | {both:.0f} | {worker / pil:.1f} | "
                f"{both / pil:.1f} | {gpu} |",
                flush=True,
            )


def photographs(folder: Path) -> list[Path]:
    """Write scikit-learn's two photographs to `folder` as JPEGs of a usual size."""
    paths = []
    for i, photo in enumerate(load_sample_images().images):
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(photo).resize((500, 375), Image.Resampling.LANCZOS).save(paths[-1], quality=90)
    return paths


def timed(config: Augmentation, paths: list[Path], images: int, rounds: int) -> list[float]:
    """Return the seconds that `images` images take: with PIL, in the worker, on the CPU as device."""
    pil, crops = two_views(config), two_crops(config)
    batch = collated(config, paths, images)

    def with_pil() -> None:
        for path, rng in items(paths, images):
            pil(decode(path), rng)

    def in_worker() -> None:
        for path, rng in items(paths, images):
            crops(read_pixels(path), rng)

    turns = [with_pil, in_worker, partial(augment, *batch)]
    return [
        median(times)
        for times in zip(*([measure(turn) for turn in turns] for _ in range(rounds)), strict=True)
    ]


def on_gpu(config: Augmentation, paths: list[Path], args: argparse.Namespace) -> float:
    """Return the images/s, two views each, of the device's half on a GPU that holds the crops."""
    crops, parameters = collated(config, paths, args.gpu_batch // 2)
    crops = crops.cuda()

    def run() -> None:
        augment(crops, parameters)
        torch.cuda.synchronize()

    measure(run)
    return args.gpu_batch / 2 / median(measure(run, time.perf_counter) for _ in range(args.rounds))


def items(paths: list[Path], images: int) -> Iterator[tuple[Path, np.random.Generator]]:
    return ((paths[i % len(paths)], np.random.default_rng([0, i])) for i in range(images))


def collated(config: Augmentation, paths: list[Path], images: int) -> tuple[Tensor, Tensor]:
    """Return crops and parameters of both views of `images` images, as a loader would."""
    crops = two_crops(config)
    parts = [crops(read_pixels(path), rng) for path, rng in items(paths, images)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def measure(work: Callable[[], None], clock: Callable[[], float] = time.process_time) -> float:
    started = clock()
    work()
    return clock() - started


if __name__ == "__main__":
    main()
