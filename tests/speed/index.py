"""How long opening the train split of ImageNet takes: by listing its folders, and from its index.

    uv run python tests/speed/index.py [folders] [images per folder]

Makes that many names (1,000 × 1,281 unless told otherwise; hard links, removed at the end) in a temporary
folder, writes manifest and index without looking into the images, and opens the split three times each way,
in turn. Prints the medians, their ratio and the size of the index. The names are in this machine's cache; on
a cluster's file system the listing asks a server for every folder, and takes minutes.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from simclr import datasets
from simclr.config import Dataset as Block


def make(root: Path, folders: int, images: int) -> None:
    """Make train/ of so many folders and images, and val/ of one image."""
    for folder in range(folders):
        train = root / f"train/n{folder:08d}"
        train.mkdir(parents=True)
        first = train / f"n{folder:08d}_0.JPEG"
        Image.new("RGB", (8, 8)).save(first)
        for number in range(1, images):
            os.link(first, train / f"n{folder:08d}_{number}.JPEG")
    (root / "val/n00000000").mkdir(parents=True)
    os.link(root / "train/n00000000/n00000000_0.JPEG", root / "val/n00000000/0.JPEG")


def seconds(dataset: datasets.Dataset) -> float:
    started = time.perf_counter()
    datasets.samples(dataset, "train")
    return time.perf_counter() - started


def main(folders: int = 1000, images: int = 1281) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        root, manifest = Path(temporary) / "imagenet", Path(temporary) / "imagenet.json"
        make(root, folders, images)
        time.sleep(datasets.SETTLED_NS / 1e9)
        block = Block(root=root, classes=folders, images={"train": folders * images, "val": 1}, decode=0)
        with mock.patch.object(datasets, "_inspect_all", lambda paths, name: np.zeros((len(paths), 2))):
            datasets.verify("imagenet", block, manifest)
        dataset, index = datasets.Dataset.open(manifest), manifest.with_name("imagenet.train.index")
        indexed, listed = [], []
        for _ in range(3):
            indexed.append(seconds(dataset))
            index.unlink()
            listed.append(seconds(dataset))  # and writes the index again
        listing, opening = statistics.median(listed), statistics.median(indexed)
        print(f"{folders:,} folders × {images:,} names: listing {listing:.2f} s, index {opening:.2f} s")
        print(f"ratio {listing / opening:.0f}; the index has {index.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
