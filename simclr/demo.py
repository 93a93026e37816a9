"""Miniature versions of every dataset, in the published on-disk layouts, from images scikit-learn ships.

The 1,797 handwritten digits (`load_digits`) are the objects; the two photographs (`load_sample_images`) are
the backgrounds of the scenes for detection and segmentation. The classification images show a digit in
random colour, size and place on a two-colour gradient: with no photograph behind it, a network can only tell
images apart by looking at the digit. Everything follows from the seed, to the byte; no digit of a train split
appears in a val or test split.
"""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from simclr import BadInput
from simclr.datasets import VOID
from simclr.layouts import VOC_CLASSES

VERSION = 4  # raise it when the bytes change
FINISHED = "demo.json"  # written last
OURS = "README.txt"  # written first; only a folder that has it is ever replaced
README = "Miniature datasets, made by `python -m simclr demo`. It replaces this folder as a whole.\n"

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
            f"{path}: expected no folder, an empty one, or one that `python -m simclr demo` made; found "
            "other files; choose another folder for the miniature datasets"
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
    """Return a gradient of two random colours in a random direction, `(height, width, 3)` in [0, 255].

    The colours are not far from each other: a strong gradient alone would tell images apart.
    """
    angle = rng.uniform(0, 2 * np.pi)
    x, y = (np.arange(length, dtype=np.float32) / length for length in (width, height))
    along = np.cos(angle) * x + np.sin(angle) * y[:, None]
    along = (along - along.min()) / (along.max() - along.min())
    start = rng.uniform(0, 255, 3).astype(np.float32)
    end = np.clip(start + rng.uniform(-120, 120, 3), 0, 255).astype(np.float32)
    return start + along[..., None].astype(np.float32) * (end - start)


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
    region += opacity[..., None] * (colour.astype(np.float32) - region)


def picture(rng: np.random.Generator, digit: np.ndarray, edge: int = 48) -> np.ndarray:
    """Return one digit in random colour, size and place on a gradient, `(edge, edge, 3)` uint8."""
    image = gradient(rng, edge, edge)
    opacity = glyph(digit, int(rng.integers(edge * 4 // 5, edge + 1)), rng.uniform(-5, 5))
    y, x = (int(rng.integers(0, edge - length + 1)) for length in opacity.shape)
    here = image[y : y + opacity.shape[0], x : x + opacity.shape[1]]
    paint(image, opacity, x, y, contrasting_colour(rng, here, 90))
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
    """Write train/<wnid>/<wnid>_<n>.JPEG (2,800), val/<wnid>/ILSVRC2012_val_<n>.JPEG (400) and meta/."""
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
        lines = [f"{name} {label}" for name, label, _ in train[:: 100 // percent]]
        _write_lines(root / f"meta/train_{percent}percent.txt", lines)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


# ---------------------------------------------------------------- Places205 and iNaturalist 2018

# Places205's first categories, one of them with a subfolder; digit d takes the place of number d.
PLACES = (
    *("abbey", "airport_terminal", "alley", "amphitheater", "amusement_park"),
    *("apartment_building/outdoor", "aquarium", "aqueduct", "arch", "art_gallery"),
)


def places205(root: Path, digits: Digits, rng: np.random.Generator) -> None:
    """Write 400 train and 200 val images and the lists trainvalsplit_places205/{train,val}_places205.csv."""
    for split, pool, count in (("train", digits.train, 400), ("val", digits.test, 200)):
        lines = []
        for label in rng.permutation(np.arange(count) % 10):
            folder = f"data/vision/torralba/deeplearning/images256/{PLACES[label][0]}/{PLACES[label]}"
            name = f"{folder}/gsun_{rng.bytes(16).hex()}.jpg"
            save_jpeg(picture(rng, rng.choice(pool[label]), edge=56), root / name)
            lines.append(f"{name} {label}")
        _write_lines(root / f"trainvalsplit_places205/{split}_places205.csv", lines)


SUPERCATEGORIES = ("Plantae", "Insecta", "Aves", "Mammalia")


def inat18(root: Path, digits: Digits, rng: np.random.Generator) -> None:
    """Write 400 train images (22 to 58 per class: a long tail), 200 val images, {train,val}2018.json."""
    per_class = {"train": np.arange(58, 21, -4), "val": np.full(10, 20)}
    categories = [
        {"id": label, "name": f"{label:04d}", "supercategory": SUPERCATEGORIES[label % 4]}
        for label in range(10)
    ]
    number = 0
    for split, pool in zip(("train", "val"), digits, strict=True):
        images, annotations = [], []
        for label in rng.permutation(np.repeat(np.arange(10), per_class[split])).tolist():
            number += 1
            folder = f"train_val2018/{SUPERCATEGORIES[label % 4]}/{label}"
            name = f"{folder}/{rng.bytes(16).hex()}.jpg"
            save_jpeg(picture(rng, rng.choice(pool[label]), edge=56), root / name)
            images.append({"id": number, "file_name": name, "width": 56, "height": 56})
            annotations.append({"id": number, "image_id": number, "category_id": label})
        content = {"images": images, "annotations": annotations, "categories": categories}
        _write_json(root / f"{split}2018.json", content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


# ---------------------------------------------------------------- scenes of several digits


class Thing(NamedTuple):
    """One object of a scene: its class, its exact pixels `(H, W)` bool, and VOC's and COCO's flags."""

    label: int
    mask: np.ndarray
    truncated: bool = False
    difficult: bool = False
    crowd: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The least box (x0, y0, x1, y1) around the pixels; x1 and y1 are exclusive."""
        rows, columns = (np.flatnonzero(self.mask.any(axis)).tolist() for axis in (1, 0))
        return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Return the two photographs that ship inside scikit-learn."""
    from sklearn import datasets

    return tuple(Image.fromarray(image) for image in datasets.load_sample_images().images)


def backdrop(
    rng: np.random.Generator, width: int, height: int, blur: float, photographs: tuple[Image.Image, ...]
) -> np.ndarray:
    """Return a random part of a photograph, `(height, width, 3)` in [0, 255], blurred by `blur` pixels."""
    photograph = photographs[rng.integers(len(photographs))]
    scale = rng.uniform(1, min(photograph.width / width, photograph.height / height))
    x = rng.uniform(0, photograph.width - scale * width)
    y = rng.uniform(0, photograph.height - scale * height)
    box = (x, y, x + scale * width, y + scale * height)
    image = photograph.resize((width, height), Image.Resampling.BILINEAR, box)
    return np.array(image.filter(ImageFilter.GaussianBlur(blur)), np.float32)


def place(
    rng: np.random.Generator, image: np.ndarray, things: list[Thing], label: int, opacity: np.ndarray, **flags
) -> Thing | None:
    """Paint `opacity` on `image` where no other thing's box is; return the thing, or None without room.

    A truncated thing sticks out of the image by up to a third, a difficult one hardly differs in colour.
    """
    height, width = opacity.shape
    out = [length // 3 if flags.get("truncated") else 0 for length in (height, width)]
    for _ in range(30):
        y, x = (
            int(rng.integers(-over, max(edge - length + over, -over) + 1))
            for edge, length, over in zip(image.shape, (height, width), out, strict=False)
        )
        layer = _on_canvas(opacity, x, y, image.shape[:2])
        thing = Thing(label, layer >= 0.5, **flags)
        if not thing.mask.any() or any(_touch(thing.box, other.box) for other in things):
            continue
        x0, y0, x1, y1 = thing.box
        distance = 60 if thing.difficult else 140
        colour = contrasting_colour(rng, image[y0:y1, x0:x1], distance)
        paint(image, layer, 0, 0, colour)
        return thing._replace(truncated=bool((opacity >= 0.5).sum() > thing.mask.sum()))
    return None


def _on_canvas(opacity: np.ndarray, x: int, y: int, shape: tuple[int, int]) -> np.ndarray:
    """Return a canvas of `shape` that shows `opacity` at (x, y), cut at the borders."""
    canvas = np.zeros(shape, np.float32)
    top, left = max(y, 0), max(x, 0)
    part = opacity[top - y : shape[0] - y, left - x : shape[1] - x]
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
    return canvas


def _touch(a: tuple[int, ...], b: tuple[int, ...], gap: int = 2) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def scene(
    rng: np.random.Generator,
    image: np.ndarray,
    pool: list[np.ndarray],
    labels: Iterable[int],
    sizes: tuple[int, int],
    things: Iterable[Thing] = (),
) -> tuple[np.ndarray, list[Thing]]:
    """Paint one digit per label beside `things`; return the image and all its things.

    A digit's size before trimming is drawn from `sizes`. The first thing is plain; of the others 8 % are
    truncated and 8 % difficult.
    """
    things = list(things)
    for label in labels:
        opacity = glyph(rng.choice(pool[label]), int(rng.integers(*sizes)), rng.uniform(-10, 10))
        truncated, difficult = (bool(things) and rng.random() < 0.08 for _ in range(2))
        thing = place(rng, image, things, label, opacity, truncated=truncated, difficult=difficult)
        things += [thing] if thing else []
    return as_bytes(image), things


# ---------------------------------------------------------------- Pascal VOC


def vocdevkit(root: Path, digits: Digits, rng: np.random.Generator) -> None:
    """Write VOC2007 (trainval 360, test 160) and VOC2012 (trainval 80; train 40, aug 40, val 16 with masks).

    Digit d bears VOC's class name number d. Unlike VOC's, segmentation's val images are not in the trainval
    of detection, so that their digits stay unseen.
    """
    _voc_year(root / "VOC2007", {"train": 180, "val": 180, "test": 160}, "{:06d}", digits, rng)
    things = _voc_year(root / "VOC2012", {"train": 40, "val": 40, "test": 16}, "2008_{:06d}", digits, rng)
    _voc_masks(root / "VOC2012", *things.values())


def _voc_year(
    root: Path, counts: dict[str, int], pattern: str, digits: Digits, rng: np.random.Generator
) -> dict[str, dict[str, list[Thing]]]:
    """Write images, annotations and lists of one year; return split → image id → things."""
    numbers = iter(rng.permutation(sum(counts.values())).tolist())
    splits = {
        split: sorted(pattern.format(next(numbers) + 1) for _ in range(count))
        for split, count in counts.items()
    }
    things: dict[str, dict[str, list[Thing]]] = {}
    for split, ids in splits.items():
        pool = digits.test if split == "test" else digits.train
        things[split] = {each: _voc_image(root, each, number, pool, rng) for number, each in enumerate(ids)}
    _voc_lists(root / "ImageSets/Main", {**things, "trainval": things["train"] | things["val"]})
    return things


def _voc_image(
    root: Path, name: str, number: int, pool: list[np.ndarray], rng: np.random.Generator
) -> list[Thing]:
    width, height = ((64, 64), (72, 64), (64, 72))[rng.integers(3)]
    labels = [number % 10, *rng.integers(0, 10, rng.choice(3, p=(0.8, 0.15, 0.05)))]
    longest = min(width, height) if len(labels) == 1 else round(0.62 * min(width, height))
    image = backdrop(rng, width, height, 20, photographs())
    pixels, things = scene(rng, image, pool, map(int, labels), (longest * 3 // 4, longest + 1))
    save_jpeg(pixels, root / "JPEGImages" / f"{name}.jpg")
    _write_lines(root / "Annotations" / f"{name}.xml", [_voc_xml(root.name, name, pixels, things)])
    return things


def _voc_xml(year: str, name: str, pixels: np.ndarray, things: list[Thing]) -> str:
    """Return the annotation; VOC's boxes are 1-based and inclusive, hence (x0 + 1, y0 + 1, x1, y1)."""
    root = ET.Element("annotation")
    ET.SubElement(root, "folder").text = year
    ET.SubElement(root, "filename").text = f"{name}.jpg"
    ET.SubElement(ET.SubElement(root, "source"), "database").text = "digits of scikit-learn"
    _add(ET.SubElement(root, "size"), width=pixels.shape[1], height=pixels.shape[0], depth=3)
    ET.SubElement(root, "segmented").text = str(int(year == "VOC2012"))
    for thing in things:
        element = ET.SubElement(root, "object")
        flags = {"truncated": int(thing.truncated), "difficult": int(thing.difficult)}
        _add(element, name=VOC_CLASSES[thing.label], pose="Unspecified", **flags)
        x0, y0, x1, y1 = thing.box
        _add(ET.SubElement(element, "bndbox"), xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
    ET.indent(root, "\t")
    return ET.tostring(root, encoding="unicode")


def _add(element: ET.Element, **children: Any) -> None:
    for tag, text in children.items():
        ET.SubElement(element, tag).text = str(text)


def _voc_lists(folder: Path, things: dict[str, dict[str, list[Thing]]]) -> None:
    """Write <split>.txt and, with 1, −1 or 0 (present, absent, only difficult), <class>_<split>.txt."""
    for split, images in things.items():
        _write_lines(folder / f"{split}.txt", sorted(images))
        for label, name in enumerate(VOC_CLASSES[:10]):
            lines = [f"{each} {_presence(images[each], label):2d}" for each in sorted(images)]
            _write_lines(folder / f"{name}_{split}.txt", lines)


def _presence(things: list[Thing], label: int) -> int:
    difficult = [thing.difficult for thing in things if thing.label == label]
    return -1 if not difficult else int(not all(difficult))


def _voc_masks(
    root: Path,
    train: dict[str, list[Thing]],
    aug: dict[str, list[Thing]],
    val: dict[str, list[Thing]],
) -> None:
    """Write lists and masks of segmentation: VOC's with void rims for train and val, SBD's without."""
    lists = {"train": train, "aug": aug, "val": val, "trainaug": train | aug, "trainval": train | val}
    for split, images in lists.items():
        _write_lines(root / f"ImageSets/Segmentation/{split}.txt", sorted(images))
    for name, things in (train | val).items():
        _save_mask(_class_mask(things, rim=True), root / f"SegmentationClass/{name}.png")
    for name, things in (train | aug).items():
        _save_mask(_class_mask(things, rim=False), root / f"SegmentationClassAug/{name}.png")


def _class_mask(things: list[Thing], rim: bool) -> np.ndarray:
    """Return `(H, W)` uint8: 0 background, digit d as d + 1; with `rim` 255 around and on difficult ones."""
    from scipy.ndimage import binary_dilation

    mask = np.zeros(things[0].mask.shape, np.uint8)
    if rim:
        for thing in things:
            mask[binary_dilation(thing.mask)] = VOID
    for thing in things:
        mask[thing.mask] = VOID if rim and thing.difficult else thing.label + 1
    return mask


def _save_mask(mask: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    image.save(path)


@cache
def voc_palette() -> np.ndarray:
    """Return VOC's colour map, `(256, 3)` uint8 (VOCdevkit, VOCcode/VOClabelcolormap.m)."""
    palette = np.zeros((256, 3), np.uint8)
    for number in range(256):
        for bit in range(8):
            for channel in range(3):
                palette[number, channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    return palette


# ---------------------------------------------------------------- COCO

COCO_IDS = (1, 2, 4, 7, 11, 16, 22, 44, 67, 90)  # with gaps, as COCO's own
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def coco(root: Path, digits: Digits, rng: np.random.Generator) -> None:
    """Write train2017 (60 images), val2017 (20) and annotations/instances_*.json.

    In every tenth image one thing is a crowd; one in thirty has nothing on it.
    """
    categories = [
        {"id": each, "name": name, "supercategory": "digit"}
        for each, name in zip(COCO_IDS, DIGIT_NAMES, strict=True)
    ]
    ids = np.cumsum(rng.integers(1, 9, 80)).tolist()
    for split, pool, here in (("train2017", digits.train, ids[:60]), ("val2017", digits.test, ids[60:])):
        images, annotations = [], []
        for number, image_id in enumerate(here):
            pixels, things = _coco_scene(rng, number, pool)
            name = f"{image_id:012d}.jpg"
            save_jpeg(pixels, root / split / name)
            height, width = pixels.shape[:2]
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for thing in things:
                annotations.append(_coco_annotation(thing, image_id, 1000 * image_id + len(annotations)))
        content = {"images": images, "annotations": annotations, "categories": categories}
        _write_json(root / f"annotations/instances_{split}.json", content)


def _coco_scene(
    rng: np.random.Generator, number: int, pool: list[np.ndarray]
) -> tuple[np.ndarray, list[Thing]]:
    width, height = ((128, 96), (96, 112), (112, 84))[rng.integers(3)]
    image = backdrop(rng, width, height, 3, photographs())
    crowd = [_crowd(rng, image, pool)] if number % 10 == 5 else []
    count = 0 if number % 30 == 17 else int(rng.integers(2, 5)) - len(crowd)
    labels = [(number + step) % 10 if step == 0 else int(rng.integers(10)) for step in range(count)]
    pixels, things = scene(rng, image, pool, labels, (32, 60), crowd)
    return pixels, [thing._replace(truncated=False, difficult=False) for thing in things]


def _crowd(rng: np.random.Generator, image: np.ndarray, pool: list[np.ndarray]) -> Thing:
    """Paint six small digits of one class side by side; together they are one crowd."""
    label = int(rng.integers(10))
    glyphs = [glyph(digit, 16) for digit in rng.choice(pool[label], 6)]
    strip = np.concatenate([np.pad(each, ((0, 16 - len(each)), (0, 2))) for each in glyphs], axis=1)
    return place(rng, image, [], label, strip[:, : image.shape[1]], crowd=True)


def _coco_annotation(thing: Thing, image_id: int, annotation_id: int) -> dict[str, Any]:
    x0, y0, x1, y1 = thing.box
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": COCO_IDS[thing.label],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(thing.mask.sum()),
        "iscrowd": int(thing.crowd),
        "segmentation": run_lengths(thing.mask) if thing.crowd else polygons(thing.mask),
    }


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Return COCO's uncompressed RLE: runs of 0 and 1 in turn, 0 first, down the columns."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    return {"counts": np.diff([0, *changes, flat.size]).tolist(), "size": list(mask.shape)}


def polygons(mask: np.ndarray) -> list[list[int]]:
    """Return one polygon [x, y, x, y, …] along the pixel borders of every connected part of `mask`.

    A hole is joined to the outline by a line walked forth and back, which cancels in COCO's rasteriser:
    decoding gives `mask` again, to the pixel.
    """
    from scipy.ndimage import label

    parts, count = label(mask)
    result = []
    for number in range(1, count + 1):
        outline, *holes = sorted(_outlines(parts == number), key=_enclosed, reverse=True)
        chain = list(outline)
        for hole in holes:
            chain += [outline[0], *hole, hole[0]]
        result.append([coordinate for point in chain for coordinate in point])
    return result


Point = tuple[int, int]


def _outlines(mask: np.ndarray) -> list[list[Point]]:
    """Return the closed lines between `mask` and its surroundings as their corners (x, y)."""
    padded = np.pad(mask, 1)
    following: dict[Point, list[Point]] = {}
    # The four sides of a pixel, walked clockwise: where they start and end, and the neighbour behind them.
    for start, end, (dy, dx) in (
        ((0, 0), (1, 0), (-1, 0)),
        ((1, 0), (1, 1), (0, 1)),
        ((1, 1), (0, 1), (1, 0)),
        ((0, 1), (0, 0), (0, -1)),
    ):
        neighbour = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for y, x in np.argwhere(mask & ~neighbour).tolist():
            following.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    lines = []
    while following:
        line = [next(iter(following))]
        while line[-1] in following:
            ends = following[line[-1]]
            line.append(ends.pop())
            if not ends:
                del following[line[-2]]
        lines.append(_corners(line[:-1]))
    return lines


def _corners(line: list[Point]) -> list[Point]:
    """Drop the points of a closed line at which it goes straight on."""
    around = zip(line[-1:] + line[:-1], line, line[1:] + line[:1], strict=True)
    return [here for (x0, y0), here, (x1, y1) in around if x0 != x1 and y0 != y1]


def _enclosed(line: list[Point]) -> float:
    """Return the area that a closed line encloses, in pixels."""
    x, y = np.array(line).T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


# ---------------------------------------------------------------- Cityscapes

SKY, ROAD = 10, 0
# Digit d as a train id: the eight that move, and two that stand.
CITYSCAPES_IDS = (11, 12, 13, 14, 15, 16, 17, 18, 5, 7)
# Train id → id in *_labelIds.png (cityscapesScripts, helpers/labels.py); 1 is the ego vehicle, which is void.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
EGO_VEHICLE = 1


def cityscapes(root: Path, digits: Digits, rng: np.random.Generator) -> None:
    """Write leftImg8bit and gtFine: 40 train images of two cities, 12 val images of one, 144 × 72 pixels."""
    for split, city, pool, count in (
        ("train", "aachen", digits.train, 20),
        ("train", "bochum", digits.train, 20),
        ("val", "frankfurt", digits.test, 12),
    ):
        for number in range(count):
            stem = f"{split}/{city}/{city}_{number:06d}_000019"
            pixels, train_ids = _street(rng, number, pool)
            _save_png(pixels, root / f"leftImg8bit/{stem}_leftImg8bit.png")
            _save_png(train_ids, root / f"gtFine/{stem}_gtFine_labelTrainIds.png")
            label_ids = np.full(256, EGO_VEHICLE, np.uint8)
            label_ids[: len(LABEL_IDS)] = LABEL_IDS
            _save_png(label_ids[train_ids], root / f"gtFine/{stem}_gtFine_labelIds.png")


def _street(
    rng: np.random.Generator, number: int, pool: list[np.ndarray], width: int = 144, height: int = 72
) -> tuple[np.ndarray, np.ndarray]:
    """Return a street, sky over road with digits on them, and its train ids `(height, width)` uint8."""
    sky, road = photographs()
    horizon = int(rng.integers(height * 2 // 5, height * 3 // 5))
    image = backdrop(rng, width, height, 3, (sky,))
    image[horizon:] = backdrop(rng, width, height - horizon, 3, (road,))
    train_ids = np.full((height, width), SKY, np.uint8)
    train_ids[horizon:] = ROAD
    labels = [number % 10, *rng.integers(0, 10, 3).tolist()]
    pixels, things = scene(rng, image, pool, labels, (32, 56))
    for thing in things:
        train_ids[thing.mask] = CITYSCAPES_IDS[thing.label]
    train_ids[-height // 18 :] = VOID
    return pixels, train_ids


def _save_png(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


# ---------------------------------------------------------------- all of them

# Folder under `output` → the function that fills it. A writer's random numbers follow from the seed and its
# place here, so a change of one dataset leaves the others as they are: add new ones at the end.
WRITERS = {
    "imagenet": imagenet,
    "places205": places205,
    "inat18": inat18,
    "VOCdevkit": vocdevkit,
    "coco": coco,
    "cityscapes": cityscapes,
}
