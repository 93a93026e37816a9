"""Tar shards of ImageNet: a few large files instead of a million small ones, for file systems that want that.

The layout is WebDataset's (https://github.com/webdataset/webdataset, README: The WebDataset Format): a sample
is consecutive members of one key, here `<key>.<image suffix>`, the image's own bytes, and `<key>.cls`, its
label. Names, labels and order stand in meta/ as in the published lists, so training from shards is, bit for
bit, training from the folders that they were made of.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from simclr import BadInput
from simclr.datasets import Dataset, Samples, samples
from simclr.files import clear, locked, replacing
from simclr.layouts import CLASSES
from simclr.paths import LABEL_SUFFIX, Members, Paths, again, encoded, key, scan, tar_name

MAX_SHARDS = 1000  # a reader keeps all of them open, and may by default open 1,024 files
AHEAD = 256  # images read at a time, to hide the latency of a network file system
THREADS = 16


class Shard(NamedTuple):
    """One tar file to be: its name, the names of the images in it, the images, their sizes in bytes."""

    name: str
    members: list[str]
    images: Samples
    sizes: np.ndarray


def write(dataset: Dataset, split: str, output: Path, shard_bytes: int = 1_000_000_000) -> None:
    """Write a split of ImageNet as tar files `<output>/<split>/<split>-000000.tar` …

    The same images give the same bytes. No file is larger than `shard_bytes`, unless one image alone is.
    `output` is then a root of imagenet for this split; the other split may be written beside it. Each file is
    written whole or not at all: after a kill, the same command makes those that are missing. The lists of
    labelled subsets are copied.

    Raises `BadInput` when `output` holds anything else, for two names with one key, and for a full disk.
    """
    if dataset.name != "imagenet":
        raise BadInput(f"--dataset: expected a manifest of imagenet, found one of {dataset.name}")
    listed = samples(dataset, split)
    names = [os.fsdecode(name) for name in listed.paths.names]
    shards = plan(split, names, listed, shard_bytes)
    folder = Path(output) / split
    _check_folder(folder, {shard.name for shard in shards})
    with locked(folder):
        for name, content in _lists(dataset, split, names, listed.labels).items():
            _write_list(Path(output) / name, content)
        missing = [shard for shard in shards if not _is_there(folder, shard)]
        _prepare(folder, sum(int(shard.sizes.sum()) for shard in missing))
        with tqdm(total=len(names), desc=split, unit=" images", mininterval=1) as progress:
            progress.update(len(names) - sum(len(shard.images) for shard in missing))
            for shard in missing:
                write_tar(folder / shard.name, shard, progress)


# ---------------------------------------------------------------- what goes where


def plan(split: str, names: Sequence[str], listed: Samples, shard_bytes: int) -> list[Shard]:
    """Return which images go into which tar file: all in their order, as many into each as it may hold."""
    members, sizes = member_names(names), image_sizes(listed.paths)
    parts = [slice(*bounds) for bounds in pairwise(divide(sizes, members, shard_bytes))]
    return [
        Shard(
            tar_name(split, number),
            members[part],
            Samples(listed.paths[part], listed.labels[part]),
            sizes[part],
        )
        for number, part in enumerate(parts)
    ]


def member_names(names: Sequence[str]) -> list[str]:
    """Return the name in the tar file of each image: its key and its suffix in small letters.

    Raises `BadInput` for two names that make one key, and for one that no list can hold.
    """
    first: dict[str, str] = {}
    for name in names:
        if not name.isprintable() or name != name.strip():
            raise BadInput(f"{name!r}: expected a name that a line of a list can hold; rename the file")
        other = first.setdefault(key(name), name)
        if other != name:
            raise BadInput(f"{name}: expected a key of its own, found {key(name)}, as of {other}; rename one")
    return [key(name) + os.path.splitext(name)[1].lower() for name in names]


def image_sizes(paths: Paths) -> np.ndarray:
    """Return the size in bytes of every image, `(N,)` int64; raises `BadInput` for one that is missing."""
    if isinstance(paths, Members):
        return paths.where[:, 2]
    with ThreadPoolExecutor(THREADS) as pool:
        return np.array(list(pool.map(_size, paths)), np.int64)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return len(encoded(path))  # which says what is wrong


def divide(sizes: np.ndarray, members: Sequence[str], shard_bytes: int) -> list[int]:
    """Return the index of the first image of each tar file, and the number of images, in order.

    Raises `BadInput` when there would be more files than a reader can keep open.
    """
    longest = max(len(os.fsencode(name)) for name in members)
    header = tarfile.BLOCKSIZE
    if longest > tarfile.LENGTH_NAME:
        header += tarfile.BLOCKSIZE + _whole(longest + 1, tarfile.BLOCKSIZE)
    taken = np.cumsum(2 * header + tarfile.BLOCKSIZE + _whole(sizes, tarfile.BLOCKSIZE))
    room = shard_bytes // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE
    bounds = [0]
    while bounds[-1] < len(sizes):
        start = bounds[-1]
        before = taken[start - 1] if start else 0
        bounds.append(max(start + 1, int(np.searchsorted(taken, before + room, side="right"))))
    if len(bounds) - 1 > MAX_SHARDS:
        raise BadInput(
            f"--shard-bytes: expected at most {MAX_SHARDS:,} tar files, found {len(bounds) - 1:,} of "
            f"{shard_bytes:,} bytes; give at least {int(taken[-1]) // MAX_SHARDS * 11 // 10:,}"
        )
    return bounds


def _whole(size: np.ndarray | int, block: int) -> np.ndarray | int:
    """Return the bytes that `size` bytes take in whole blocks."""
    return -(-size // block) * block


# ---------------------------------------------------------------- the folder


def _check_folder(folder: Path, wanted: set[str]) -> None:
    """Raise `BadInput` for anything but tar files of this split."""
    found = os.listdir(folder) if folder.is_dir() else []
    foreign = sorted(name for name in found if not name.startswith(".") and name not in wanted | {"lock"})
    if foreign:
        raise BadInput(
            f"{folder / foreign[0]}: expected nothing in this folder but the {len(wanted):,} tar files of "
            f"{folder.name}; give an empty folder as --output, or the --shard-bytes that these were made with"
        )


def _is_there(folder: Path, shard: Shard) -> bool:
    """Return whether the tar file is there; raises `BadInput` when it does not hold these images."""
    path = folder / shard.name
    if not path.exists():
        return False
    keys, labels, where = scan([path])
    same = np.array_equal(labels, shard.images.labels) and np.array_equal(where[:, 2], shard.sizes)
    if not same or keys != [os.path.splitext(name)[0] for name in shard.members]:
        raise BadInput(
            f"{path}: expected {len(shard.members):,} images from {shard.members[0]} on, found others; give "
            f"the --shard-bytes that it was made with, or {again(path)}"
        )
    return True


def _prepare(folder: Path, needed: int) -> None:
    """Remove what a killed run left half-written; raise `BadInput` unless `needed` bytes are free."""
    clear(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"{folder.resolve()}: the images need {needed:,} bytes, found {free:,} bytes free; "
            "make room or give another folder as --output"
        )


def _lists(dataset: Dataset, split: str, names: Sequence[str], labels: np.ndarray) -> dict[str, bytes]:
    """Return path under the root → content of the lists that belong to the shards of a split."""
    own = {f"meta/{each}.txt" for each in dataset.splits} | {CLASSES}
    lines = [f"{name} {label}\n" for name, label in zip(names, labels.tolist(), strict=True)]
    return {
        **{each: (dataset.root / each).read_bytes() for each in dataset.lists if each not in own},
        CLASSES: "".join(f"{name}\n" for name in dataset.class_names).encode(),
        f"meta/{split}.txt": "".join(lines).encode(),
    }


def _write_list(path: Path, content: bytes) -> None:
    """Write a list, or find it written; raises `BadInput` for one with another content."""
    if not path.exists():
        with replacing(path) as part:
            part.write_bytes(content)
    elif path.read_bytes() != content:
        raise BadInput(
            f"{path}: expected the list of this dataset, found another; give the folder of its own shards as "
            "--output, or an empty one"
        )


# ---------------------------------------------------------------- one tar file


def write_tar(path: Path, shard: Shard, progress: tqdm) -> None:
    """Write images and labels as one tar file, whole or not at all; owner and time of each member are 0."""
    labels = shard.images.labels.tolist()
    with replacing(path) as part, tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, content, label in zip(shard.members, _read(shard.images.paths), labels, strict=True):
            _add(tar, member, content)
            _add(tar, os.path.splitext(member)[0] + LABEL_SUFFIX, str(label).encode())
            progress.update()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def _read(paths: Paths) -> Iterator[bytes]:
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(paths), AHEAD):
            yield from pool.map(encoded, paths[start : start + AHEAD])
