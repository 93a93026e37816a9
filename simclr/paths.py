"""Where the images of a split lie: in files of their own, or together in tar files. No image is decoded here.

`Paths` gives a `Path` for each image, `Members` a `Member`; `encoded` returns the bytes of either.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from simclr import BadInput

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
LABEL_SUFFIX = ".cls"


class Unreachable(BadInput):
    """An image that no copy of it would bring back: its folder, or its file system, is gone."""


# ---------------------------------------------------------------- files


class Paths(Sequence[Path]):
    """Image paths of a split, kept in one block of memory.

    Worker processes share that block. A list of 1.28 million strings they would copy, page by page, as
    they touch its reference counts.
    """

    def __init__(self, root: Path, names: Iterable[str] | np.ndarray):
        self.root = Path(root)
        self.names = (
            names if isinstance(names, np.ndarray) else np.array([os.fsencode(name) for name in names], "S")
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        """Return one `Path` for an integer, `Paths` for a slice or an array of indices."""
        names = self.names[index]
        return Paths(self.root, names) if isinstance(names, np.ndarray) else self.root / os.fsdecode(names)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Paths):
            return self.root == other.root and np.array_equal(self.names, other.names)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r}, {len(self)} names)"

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all but the root, for `from_arrays`."""
        return {"names": self.names}


def from_arrays(root: Path, names: np.ndarray, **where: np.ndarray) -> Paths:
    """Return the `Paths` or `Members` under `root` whose `arrays` these are."""
    return Members(root, names, **where) if where else Paths(root, names)


def encoded(source: Path | Member) -> bytes:
    """Return the bytes of an image as they are stored.

    Raises `BadInput` for one that is missing, `Unreachable` where its folder is, which is what a file system
    leaves that is no longer mounted.
    """
    try:
        return source.read_bytes()
    except FileNotFoundError as error:
        gone = [folder for folder in Path(error.filename).parents if not os.path.exists(folder)]
        if not gone:
            raise BadInput(f"{source}: no such image; restore it, then verify the dataset again") from error
        raise Unreachable(
            f"{gone[-1].absolute()}: this folder of the dataset is gone, and {source} with it; see that its "
            "file system is mounted, then give the same command again"
        ) from error
    except OSError as error:
        raise Unreachable(
            f"{source}: cannot be read ({error.strerror or error}); see that its file system is mounted and "
            "the file readable, then give the same command again"
        ) from error


# ---------------------------------------------------------------- members of tar files


class Tar:
    """A tar file that is opened when something is first read from it; a pickled copy opens its own.

    Processes may share it after a fork, and threads always: a read has no position that another could move.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def __reduce__(self) -> tuple[type[Tar], tuple[Path]]:
        return Tar, (self.path,)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on; raises `OSError` when the file has fewer."""
        file = self._file
        if file is None:
            file = self._file = self.path.open("rb", buffering=0)
        content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise OSError(f"the tar file ends {size - len(content):,} bytes before the image does")
        return content


@dataclass(frozen=True)
class Member:
    """An image in a tar file, read as `Path` reads: `path` is where it would lie if it were unpacked."""

    path: Path
    tar: Tar
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar.path}: {self.path.relative_to(self.tar.path.parent)}"

    def read_bytes(self) -> bytes:
        return self.tar.read(self.offset, self.size)

    def open(self, mode: str = "rb") -> BytesIO:
        return BytesIO(self.read_bytes())

    def relative_to(self, root: Path) -> Path:
        return self.path.relative_to(root)


class Members(Paths):
    """Images of a split that lie in tar files under `root`, named as if they were unpacked there.

    `tars` are the names of the files; a row of `where` `(N, 3)` int64 holds which of them, and the offset and
    size of the image in it, in bytes.
    """

    def __init__(self, root: Path, names: np.ndarray, tars: Iterable[bytes | Tar], where: np.ndarray):
        super().__init__(root, names)
        self.tars = [each if isinstance(each, Tar) else Tar(self.root / os.fsdecode(each)) for each in tars]
        self.where = where

    def __getitem__(self, index: Any) -> Any:
        """Return one `Member` for an integer, `Members` for a slice or an array of indices."""
        path = super().__getitem__(index)
        if isinstance(path, Paths):
            return Members(self.root, path.names, self.tars, self.where[index])
        tar, offset, size = self.where[index].tolist()
        return Member(path, self.tars[tar], offset, size)

    def arrays(self) -> dict[str, np.ndarray]:
        tars = np.array([os.fsencode(tar.path.name) for tar in self.tars])
        return {**super().arrays(), "tars": tars, "where": self.where}

    def named(self, names: Sequence[str]) -> Members:
        """Return the members with these names, in this order; raises `BadInput` for a name that none has."""
        wanted = np.array([os.fsencode(name) for name in names], "S")
        order = np.argsort(self.names)
        found = order[np.searchsorted(self.names, wanted, sorter=order).clip(max=len(order) - 1)]
        missing = np.flatnonzero(self.names[found] != wanted)
        if len(missing):
            raise BadInput(
                f"{self.root}: expected {names[missing[0]]} in the tar files, found none of this name; "
                "correct the list that names it, or make the shards again from the whole dataset"
            )
        return self[found]


# ---------------------------------------------------------------- the layout of a tar file


def key(name: str) -> str:
    """Return what joins an image and its label in a tar file: the name without suffix, and without a dot.

    In WebDataset's layout the key ends at the first dot of the file's name; one within it becomes "_".
    """
    folder, slash, file = name.rpartition("/")
    return folder + slash + os.path.splitext(file)[0].replace(".", "_")


def find_tars(folder: Path) -> list[Path]:
    """Return the tar files `<split>-<number>.tar` of the split whose folder this is, in their order."""
    return sorted(folder.glob(f"{folder.name}-[0-9]*.tar"))


def tar_name(split: str, number: int) -> str:
    """Return the name of one tar file of a split."""
    return f"{split}-{number:06d}.tar"


def scan(tars: Sequence[Path], threads: int = 8) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return keys, labels `(N,)` int64 and `where` `(N, 3)` int64 of all images in `tars`, in their order.

    Reads the headers and the labels, and skips the images. Raises `BadInput` for a file that is missing,
    truncated, or not of pairs `<key>.<image suffix>`, `<key>.cls`.
    """
    with ThreadPoolExecutor(threads) as pool:  # hides the latency of a network file system
        scanned = list(pool.map(_scan, tars))
    rows = [(number, *row) for number, some in enumerate(scanned) for row in some]
    numbers = np.array([(label, number, *where) for number, _, label, *where in rows], np.int64).reshape(
        -1, 4
    )
    return [row[1] for row in rows], numbers[:, 0], numbers[:, 1:]


def _scan(path: Path) -> list[tuple[str, int, int, int]]:
    """Return (key, label, offset, size) of every image in one tar file."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return list(_pairs(path, file, tar))
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path}: not a whole tar file ({_said(error)}); {again(path)}") from error


def _pairs(path: Path, file: BinaryIO, tar: tarfile.TarFile) -> Iterator[tuple[str, int, int, int]]:
    while (image := tar.next()) is not None:
        found, suffix = os.path.splitext(image.name)
        second = tar.next()
        if suffix not in IMAGE_SUFFIXES or second is None or second.name != found + LABEL_SUFFIX:
            after = "nothing" if second is None else second.name
            raise BadInput(
                f"{path}: expected an image and then its label, <key>.cls, found {image.name} and then "
                f"{after}; {again(path)}"
            )
        label = os.pread(file.fileno(), second.size, second.offset_data)
        if not label.isdigit():
            raise BadInput(f"{path}: {second.name}: expected a class number, found {label!r}; {again(path)}")
        yield found, int(label), image.offset_data, image.size
    # A damaged header ends the reading just as the end of the file does, which is a block of zeros.
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no readable header at byte {tar.offset:,}")


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def again(path: Path) -> str:
    """Return the remedy for a tar file that is not what it should be."""
    return f"delete {path.name} and make it again with the same `python -m simclr shards …`"
