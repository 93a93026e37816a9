"""Datasets on disk: verified before anything is trained, then read; `layouts` has a reader for each.

`verify` looks at every file of a dataset once and writes a manifest; every later step opens the manifest with
`Dataset.open` and reads a split with `samples` (classification), `detection` or `segmentation`. A list, a
folder or a box that is no longer what was verified is refused.

The manifest has hashes of all that a result is measured against, names, labels, boxes and masks: the same
manifest, the same truth. The pixels of images are not hashed, and masks not again when they are read.

Beside the manifest lies an index of each classification split, `<manifest>.<split>.index`, from which a split
of a million images opens without its folders being listed. It is a cache: nothing is declared or asked of it,
and where it is missing, damaged or older than a folder, the folders are listed and it is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from simclr import BadInput
from simclr.config import Dataset as Block
from simclr.files import replacing, sha256
from simclr.layouts import LAYOUTS, READERS, Listing, ranks, wrong_label
from simclr.paths import Member, Paths, encoded, find_tars, from_arrays
from simclr.results import DatasetStamp

MANIFEST_VERSION = 1
VOID = 255  # the label of mask pixels that count for nothing

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# ---------------------------------------------------------------- a split


@dataclass(frozen=True)
class Samples:
    """Images and labels of a split: labels `(N,)` int64, or for VOC `(N, C)` int8.

    `decode` reads an item of `paths`, a `Path` or a `Member` of a tar file.

    VOC's are 1 present, 0 absent, −1 when every instance is marked difficult (MMSelfSup,
    create_voc_data_files.py).
    """

    paths: Sequence[Path]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images:
    """A map-style dataset for torch's DataLoader: `(transform(image), label, index)`."""

    paths: Sequence[Path]
    labels: np.ndarray
    transform: Callable[[Image.Image], Any]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        return self.transform(decode(self.paths[index])), self.labels[index], index


def decode(source: Path | Member, size: tuple[int, int] | None = None) -> Image.Image:
    """Return the image as RGB, turned upright as its EXIF orientation says.

    OpenCV, with which the published numbers were decoded, turns images too; PIL alone does not. `size` is the
    (width, height) that boxes or a mask refer to: an image that has it as stored is not turned.
    Raises `BadInput` for a file that is missing, truncated or no image.
    """
    content = encoded(source)
    try:
        with Image.open(BytesIO(content)) as image:
            rgb = image.convert("RGB")
            method = None if image.size == size else UPRIGHT.get(_orientation(image))
        return rgb if method is None else rgb.transpose(method)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BadInput(
            f"{source}: cannot be decoded ({_fault(error)}); replace it by an intact copy and verify the "
            "dataset again"
        ) from error


def _fault(error: Exception) -> str:
    """Return what PIL says is wrong with an image; its sentence for one of no known format names no file."""
    return "no image format is known" if isinstance(error, UnidentifiedImageError) else str(error)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image, 1 … 8; 1 when it has none that can be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, struct.error):
        return 1  # Damaged EXIF, which occurs in the published datasets, is no damage to the image.


@dataclass(frozen=True)
class Dataset:
    """A dataset whose verify step has passed: what its manifest says."""

    name: str
    root: Path
    class_names: list[str]
    splits: dict[str, dict[str, Any]]
    lists: dict[str, str]
    dataset: DatasetStamp | None = None
    manifest: Path | None = None

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a manifest; raises `BadInput` when it is not one, or when the dataset is not where it was."""
        path = Path(path)
        again = "make it with `python -m simclr datasets --name … --config … --output …`"
        try:
            manifest = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise BadInput(f"{path}: no such manifest; {again}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
            raise BadInput(
                f"{path}: expected a manifest in JSON, found something else ({error}); {again}"
            ) from error
        if not isinstance(manifest, dict) or manifest.get("manifest_version") != MANIFEST_VERSION:
            raise BadInput(f"{path}: not a dataset manifest of version {MANIFEST_VERSION}; {again}")
        root = Path(manifest["root"])
        if not root.is_dir():
            raise BadInput(
                f"{root.resolve()}: no such folder, though {path} was made there; run from the folder in "
                "which the dataset was verified, or verify it again"
            )
        stamp = DatasetStamp(name=manifest["name"], manifest_sha256=sha256(path))
        entries = (manifest[key] for key in ("class_names", "splits", "lists"))
        return cls(manifest["name"], root, *entries, stamp, path)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def images(self) -> dict[str, int]:
        """Split → number of images."""
        return {split: entry["images"] for split, entry in self.splits.items()}


def samples(dataset: Dataset, split: str) -> Samples:
    """Return images and labels of a split of imagenet, voc2007, places205 or inat18, in its list's order.

    Raises `BadInput` for an unknown split and when the list is no longer the one that was verified.
    """
    listing = _verified(dataset, split)
    if listing.labels is None:
        raise BadInput(f"{dataset.name} has no labels of whole images; use its boxes or masks")
    return Samples(listing.paths, listing.labels)


def detection(dataset: Dataset, split: str) -> list[dict[str, Any]]:
    """Return a split of voc0712 or coco2017 in Detectron2's layout, one dict per image.

    Keys: `file_name`, `image_id`, `height`, `width` (pixels), `annotations`: each with `bbox`
    (x0, y0, x1, y1) in pixels from the top left corner, `category_id` from 0, `iscrowd`, `difficult`, and
    for COCO `segmentation` (polygons or RLE). VOC's xmin and ymin, 1-based, are lowered
    by one. Difficult objects and images without objects are kept.
    """
    listing = _verified(dataset, split)
    if listing.boxes is None:
        raise BadInput(f"{dataset.name} has no boxes; detection needs voc0712 or coco2017")
    return listing.boxes


def segmentation(dataset: Dataset, split: str) -> tuple[Sequence[Path], Sequence[Path]]:
    """Return the image paths and the mask paths of a split of voc12aug or cityscapes, in the same order."""
    listing = _verified(dataset, split)
    if listing.masks is None:
        raise BadInput(f"{dataset.name} has no masks; segmentation needs voc12aug or cityscapes")
    return listing.paths, listing.masks


def subset(dataset: Dataset, name: str) -> Samples:
    """Return the part of ImageNet's train split that `meta/` lists: `train_1percent` or `train_10percent`.

    Lines are `<wnid>/<file> <label>`, as MMSelfSup writes them, or `<wnid>_<number>.JPEG`, as in
    google-research/simclr, imagenet_subsets/. MMSelfSup 0.x called the second list train_10pct.txt.
    Raises `BadInput` when there is no such list or it names a wrong label.
    """
    _check_lists(dataset)
    names = (name, name.replace("percent", "pct"), name.removeprefix("train_"))
    lists = [dataset.root / "meta" / f"{each}.txt" for each in names]
    path = next((path for path in lists if path.is_file()), None)
    if path is None:
        raise BadInput(
            f"{lists[0]}: no such list; fetch imagenet_subsets/{names[2]}.txt of google-research/simclr and "
            "store it under this name"
        )
    entries = [line.split() for line in path.read_text().splitlines() if line.strip()]
    files = [entry[0] if "/" in entry[0] else f"{entry[0].split('_')[0]}/{entry[0]}" for entry in entries]
    labels = ranks(files, dataset.class_names, path)
    for entry, label in zip(entries, labels, strict=True):
        if len(entry) > 1 and entry[1] != str(label):
            raise BadInput(wrong_label(path, entry[0], entry[1], label))
    if find_tars(dataset.root / "train"):
        return Samples(samples(dataset, "train").paths.named(files), labels)
    return Samples(Paths(dataset.root / "train", files), labels)


# ---------------------------------------------------------------- verification


def verify(name: str, config: Block, output: Path) -> None:
    """Verify the dataset `name` and write its manifest to `output`, the same bytes for the same dataset.

    Looks at layout, class count, label order and image counts; then at every image and mask (header and end
    of file); decodes a seeded sample of `config.decode` images per split, and every mask. Masks that the
    archives do not hold are made first (`simclr.masks`). Raises `BadInput` with one sentence that names the
    path, what was expected, what was found, and the remedy.
    """
    if name not in READERS:
        raise BadInput(f"--name: expected one of {', '.join(READERS)}, found {name!r}")
    config = config.completed(name)
    dataset = replace(_unverified(name, config), manifest=output)
    splits = {
        split: _verify_split(dataset, split, expected, config.decode)
        for split, expected in config.images.items()
    }
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "name": name,
        "version": config.version,
        "root": str(config.root),
        "classes": dataset.classes,
        "class_names": dataset.class_names,
        "splits": splits,
        "lists": dataset.lists,
    }
    with replacing(output) as part:
        part.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _unverified(name: str, config: Block) -> Dataset:
    """Return the dataset as the config describes it, after a look at root, classes and lists."""
    if config.root is None:
        raise BadInput(f"datasets.{name}.root is not set; set it to the folder of the dataset")
    if not config.root.is_dir():
        raise BadInput(
            f"{config.root}: no such folder; set datasets.{name}.root to the folder that holds "
            f"{LAYOUTS[name]}"
        )
    if READERS[name].make:
        READERS[name].make(config.root)
    class_names = READERS[name].classes(config.root)
    if len(class_names) != config.classes:
        raise BadInput(
            f"{config.root}: expected {config.classes:,} classes (datasets.{name}.classes), found "
            f"{len(class_names):,}; complete the dataset or correct the number"
        )
    lists = {
        str(path.relative_to(config.root)): sha256(path)
        for pattern in READERS[name].lists
        for path in sorted(config.root.glob(pattern))
    }
    return Dataset(name, config.root, class_names, splits={split: {} for split in config.images}, lists=lists)


def _verify_split(dataset: Dataset, split: str, expected: int, decoded: int) -> dict[str, Any]:
    """Verify one split and return its entry in the manifest."""
    layout = READERS[dataset.name]
    began = time.time_ns()
    listing = layout.read(dataset, split)
    if len(listing.paths) != expected:
        raise BadInput(
            f"{dataset.root}: expected {expected:,} images in {split} "
            f"(datasets.{dataset.name}.images.{split}), found {len(listing.paths):,}; complete the dataset "
            "or correct the number"
        )
    if layout.check:
        layout.check(dataset, split, listing)
    sizes = _inspect_all(listing.paths, dataset.name)
    if listing.sizes is not None:
        _check_sizes(listing.paths, sizes, listing.sizes, "its annotation")
    chosen = np.sort(np.random.default_rng(0).permutation(expected)[:decoded])
    for index in chosen:
        decode(listing.paths[index])
    entry = {"images": expected, "decoded": len(chosen), "sha256": _digest(listing)}
    if listing.masks is not None:
        _check_sizes(listing.masks, _inspect_all(listing.masks, dataset.name), sizes, "its image")
        entry["masks_sha256"] = _check_masks(listing.masks, dataset)
    _write_index(dataset, split, listing, began)
    return entry


def _digest(listing: Listing) -> str:
    """Return the SHA-256 of the names, labels and boxes of a split, in their order.

    COCO's polygons are not in it: they are in a list, which is hashed as a whole.
    """
    digest = hashlib.sha256(listing.paths.names.tobytes())
    if listing.labels is not None:
        digest.update(listing.labels.tobytes())
    if listing.boxes is not None:
        digest.update(listing.sizes.tobytes())
        digest.update(_box_table(listing.boxes).tobytes())
    return digest.hexdigest()


def _box_table(boxes: list[dict[str, Any]]) -> np.ndarray:
    """Return image, corners, class, crowd and difficult of every object of a split, `(N, 8)` float64."""
    rows = [
        (image, *each["bbox"], each["category_id"], each["iscrowd"], each["difficult"])
        for image, entry in enumerate(boxes)
        for each in entry["annotations"]
    ]
    return np.array(rows, np.float64).reshape(-1, 8)


def _verified(dataset: Dataset, split: str) -> Listing:
    """Open or read a split; raise `BadInput` unless lists, names, labels and boxes are the manifest's."""
    if split not in dataset.splits:
        raise BadInput(f"{dataset.name} has the splits {', '.join(dataset.splits)}; found {split!r}")
    _check_lists(dataset)
    listing = _read_index(dataset, split)
    if listing is None:
        began = time.time_ns()
        listing = READERS[dataset.name].read(dataset, split)
        if _digest(listing) != dataset.splits[split]["sha256"]:
            what = "labels" if listing.boxes is None else "boxes"
            raise BadInput(_changed(dataset, dataset.root, f"the images or {what} of {split}"))
        _write_index(dataset, split, listing, began)
    return listing


def _check_lists(dataset: Dataset) -> None:
    """Raise `BadInput` unless every list file is the one that was verified."""
    for name, expected in dataset.lists.items():
        path = dataset.root / name
        if not path.is_file() or sha256(path) != expected:
            raise BadInput(_changed(dataset, path, "the list"))


def _changed(dataset: Dataset, path: Path, what: str) -> str:
    return (
        f"{path}: expected {what} as when {dataset.name} was verified, found a change; restore it, or delete "
        "the manifest to verify the dataset again"
    )


# ---------------------------------------------------------------- the index of a split

INDEX_FORMAT = b"simclr index 1\n"  # hashed with the arrays: another format is as good as no index
ABSENT, UNSETTLED = -1, -2  # in place of a time of change
SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system ticks in 1 or 2 s


def _index(dataset: Dataset, split: str) -> Path:
    return dataset.manifest.with_suffix(f".{split}.index")


def _write_index(dataset: Dataset, split: str, listing: Listing, began: int) -> None:
    """Write names and labels of a split, and the state of what they depend on, beside the manifest.

    `began` is the time in ns at which the reading of the split began: what changed later, or so shortly
    before that the next change may bear the same time, will be listed again. A folder that cannot be written
    to gets no index.
    """
    if listing.labels is None or dataset.manifest is None or int(os.environ.get("RANK", 0)) > 0:
        return
    state = _state(listing.watched)
    state[state[:, 0] > began - SETTLED_NS, 0] = UNSETTLED
    content = BytesIO()
    np.savez(
        content,
        **listing.paths.arrays(),
        labels=listing.labels,
        folder=os.fsencode(os.path.relpath(listing.paths.root, dataset.root)),
        watched=np.array([os.fsencode(os.path.relpath(each, dataset.root)) for each in listing.watched], "S"),
        state=state,
    )
    with contextlib.suppress(OSError), replacing(_index(dataset, split)) as part, part.open("wb") as file:
        file.write(_seal(content.getbuffer()))
        file.write(content.getbuffer())


def _read_index(dataset: Dataset, split: str) -> Listing | None:
    """Return what the index of a split holds; None unless it is whole, of this manifest, and still true."""
    if dataset.manifest is None:
        return None
    try:
        content = _index(dataset, split).read_bytes()
    except OSError:
        return None
    file = BytesIO(content)
    if file.read(32) != _seal(memoryview(content)[32:]):
        return None
    with np.load(file) as arrays:
        index = dict(arrays)
    labels, watched, state = (index.pop(name) for name in ("labels", "watched", "state"))
    listing = Listing(
        from_arrays(dataset.root / os.fsdecode(index.pop("folder").item()), **index),
        labels,
        watched=[dataset.root / os.fsdecode(each) for each in watched],
    )
    same = _digest(listing) == dataset.splits[split]["sha256"]
    return listing if same and np.array_equal(_state(listing.watched), state) else None


def _seal(content: memoryview) -> bytes:
    """Return the SHA-256 with which an index begins."""
    seal = hashlib.sha256(INDEX_FORMAT)
    seal.update(content)
    return seal.digest()


def _state(paths: Sequence[Path]) -> np.ndarray:
    """Return time of change in ns and size in bytes of every file or folder, `(N, 2)` int64.

    The time of change (ctime), unlike that of modification, cannot be set back, as unpacking an archive does.
    """
    state = np.full((len(paths), 2), ABSENT, np.int64)
    for row, path in enumerate(paths):
        with contextlib.suppress(OSError):
            found = path.stat()
            state[row] = found.st_ctime_ns, found.st_size
    return state


# ---------------------------------------------------------------- every image


def _inspect_all(paths: Paths, name: str, threads: int = 32, chunk: int = 1000) -> np.ndarray:
    """Return (width, height) of every image, `(N, 2)`; raises `BadInput` naming the first unreadable one.

    Threads hide the latency of a network file system; nothing of an image is kept but its size.
    """
    Image.preinit()
    chunks = [paths[start : start + chunk] for start in range(0, len(paths), chunk)]
    with ThreadPoolExecutor(threads) as pool:
        inspected = list(pool.map(_inspect_chunk, chunks))
    faults = [fault for _, some in inspected for fault in some]
    if faults:
        more = f" (and {len(faults) - 1:,} more of {len(paths):,} files)" if len(faults) > 1 else ""
        raise BadInput(f"{faults[0]}{more}; restore it from the archive of {name}")
    return np.concatenate([sizes for sizes, _ in inspected])


def _inspect_chunk(paths: Paths) -> tuple[np.ndarray, list[str]]:
    sizes, faults = [], []
    for path in paths:
        try:
            sizes.append(_inspect(path))
        except FileNotFoundError:
            faults.append(f"{path}: no such file, though the lists name it{_how_to_make(path)}")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            faults.append(f"{path}: cannot be read as an image ({_fault(error)})")
    return np.array(sizes, np.int32).reshape(-1, 2), faults


def _how_to_make(path: Path) -> str:
    """Say of what a missing file would have been made, had that been there."""
    if path.name.endswith("_labelTrainIds.png"):
        polygons = path.name.replace("_labelTrainIds.png", "_polygons.json")
        return f" (nor is there {polygons}, of which it is made)"
    return ""


def _inspect(path: Path) -> tuple[int, int]:
    """Return (width, height) from the header; an image that does not end as it must is decoded in full."""
    with path.open("rb") as file, Image.open(file) as image:
        tail = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}.get(image.format)
        if tail is not None:
            position = file.tell()
            file.seek(-len(tail), os.SEEK_END)
            if file.read() == tail:
                return image.size
            file.seek(position)
        image.load()
        return image.size


def _check_sizes(paths: Paths, found: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Raise `BadInput` for an image that has not the expected size, nor has it once turned upright."""
    for index in np.flatnonzero((found != expected).any(axis=1)):
        (w, h), (width, height) = found[index], expected[index]
        if decode(paths[index]).size != (width, height):
            raise BadInput(
                f"{paths[index]}: expected {width} × {height} pixels, the size of {what}, found {w} × {h}; "
                "restore both from the archive"
            )


def _check_masks(paths: Paths, dataset: Dataset, threads: int = 8) -> str:
    """Return the SHA-256 of all masks; raise `BadInput` unless each is one channel of class numbers and 255.

    Every mask is looked at: a label out of range may end a training on a GPU after hours, without a word of
    the image.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(threads) as pool:
        inspected = pool.map(partial(_inspect_mask, classes=dataset.classes), paths)
        for path, (content, fault) in zip(paths, inspected, strict=True):
            if fault:
                raise BadInput(f"{path}: {fault}; restore it from the archive")
            digest.update(content)
    return digest.hexdigest()


def _inspect_mask(path: Path, classes: int) -> tuple[bytes, str | None]:
    """Return the SHA-256 of a mask's file, and what is wrong with it, or None."""
    content = path.read_bytes()
    return hashlib.sha256(content).digest(), _mask_fault(content, classes)


def _mask_fault(content: bytes, classes: int) -> str | None:
    """Return what was expected of a mask and what was found, or None where it is right."""
    try:
        with Image.open(BytesIO(content)) as image:
            if image.mode not in ("P", "L"):
                return f"expected a palette or greyscale image of class numbers, found mode {image.mode}"
            pixels = image.histogram()
    except (OSError, SyntaxError, ValueError) as error:
        return f"cannot be decoded ({_fault(error)})"
    wrong = next((label for label in range(classes, VOID) if pixels[label]), None)
    return None if wrong is None else f"expected class numbers 0 to {classes - 1} or {VOID}, found {wrong}"
