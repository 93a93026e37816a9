"""The layouts of the datasets' own archives: one reader for each, of its lists, labels, boxes and masks.

`READERS[name]` is the `Layout` of a dataset: its class names, the `Listing` of a split, which lists to hash,
what to check. What is wrong with a file is said together with what to do about it.
"""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from simclr import BadInput, masks
from simclr.paths import IMAGE_SUFFIXES, Members, Paths, again, find_tars, key, scan, tar_name

if TYPE_CHECKING:
    from simclr.datasets import Dataset

CLASSES = "meta/classes.txt"  # of tar shards: the wnids, one a line, in the order of their labels

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle"),
    "bicycle",
)

# What must lie under the root of each dataset; said in every message about something that does not.
LAYOUTS = {
    "imagenet": "train/<wnid>/*.JPEG, val/<wnid>/*.JPEG (or val/*.JPEG with meta/val.txt), or the tar shards "
    "of `python -m simclr shards`",
    "voc2007": "VOC2007/JPEGImages, VOC2007/ImageSets/Main/<class>_{trainval,test}.txt",
    "places205": "data/vision/torralba/deeplearning/images256, "
    "trainvalsplit_places205/{train,val}_places205.csv",
    "inat18": "train_val2018/<super>/<category id>/*.jpg, train2018.json, val2018.json",
    "voc0712": "VOC2007 and VOC2012, each with JPEGImages, Annotations and ImageSets/Main",
    "coco2017": "train2017, val2017, annotations/instances_{train2017,val2017}.json",
    "voc12aug": "VOC2012/{JPEGImages,SegmentationClass,SegmentationClassAug}, "
    "VOC2012/ImageSets/Segmentation/{train,aug,val}.txt (SegmentationClassAug and aug.txt are made of "
    "benchmark_RELEASE, where that lies there)",
    "cityscapes": "leftImg8bit/{train,val}/<city>/*.png, gtFine/{train,val}/<city>/*_labelTrainIds.png or "
    "*_polygons.json, of which these are made",
}


class Listing(NamedTuple):
    """What the lists of one split name; `labels`, `boxes`, `masks`: what the dataset has of these.

    `sizes` `(N, 2)` are the (width, height) that the annotations state. `watched` are the folders and files,
    beside the lists of `Layout.lists`, on which names and labels depend: while they stay, so do these.
    """

    paths: Paths
    labels: np.ndarray | None = None
    boxes: list[dict[str, Any]] | None = None
    masks: Paths | None = None
    sizes: np.ndarray | None = None
    watched: Sequence[Path] = ()


def _imagenet_classes(root: Path) -> list[str]:
    if find_tars(_need(root / "train", "imagenet")):
        return _need(root / CLASSES, "imagenet").read_text().splitlines()
    return _folders(root / "train")


def _imagenet(dataset: Dataset, split: str) -> Listing:
    folder = _need(dataset.root / split, dataset.name)
    listed = dataset.root / "meta" / f"{split}.txt"
    if tars := find_tars(folder):
        return _imagenet_shards(dataset, split, listed, tars)
    foldered = split == "train" or _has_folders(folder)
    if listed.is_file():
        names, labels = _read_list(listed)
        if foldered:
            names = _into_folders(names, labels, dataset.class_names, folder)
    elif foldered:
        names = [f"{wnid}/{name}" for wnid in _folders(folder) for name in _image_names(folder / wnid)]
        labels = ranks(names, dataset.class_names, folder)
    else:
        raise BadInput(
            f"{listed}: no such list, and {folder} is flat: without the list its images have no labels; "
            "restore meta/val.txt or sort the images into wnid folders"
        )
    watched = [listed, folder, *(folder / wnid for wnid in _folders(folder))]
    return Listing(Paths(folder, names), labels, watched=watched)


def _imagenet_shards(dataset: Dataset, split: str, listed: Path, tars: list[Path]) -> Listing:
    """Read a split from tar files: names and labels from its list, which both must agree with the files."""
    for number, tar in enumerate(tars):
        if tar.name != tar_name(split, number):
            missing = tar.with_name(tar_name(split, number))
            raise BadInput(f"{missing}: no such file, but {tar.name} is there; {again(missing)}")
    names, labels = _read_list(_need(listed, dataset.name))
    keys, found, where = scan(tars)
    _check_keys(keys, [key(name) for name in names], [tars[number] for number in where[:, 0]], listed)
    wrong = np.flatnonzero(found != labels)
    if len(wrong):
        row = wrong[0]
        raise BadInput(
            f"{tars[where[row, 0]]}: expected label {labels[row]} for {keys[row]}, as in {listed}, found "
            f"{found[row]}; {again(tars[where[row, 0]])}"
        )
    paths = Paths(dataset.root / split, names)
    paths = Members(paths.root, paths.names, [os.fsencode(tar.name) for tar in tars], where)
    return Listing(paths, labels, watched=[listed, paths.root, *tars])


def _check_keys(keys: list[str], expected: list[str], tars: list[Path], listed: Path) -> None:
    """Raise `BadInput` unless the images in the tar files are those of the list, in its order.

    `tars` holds for each of `keys` the file that it is in.
    """
    if keys == expected:
        return
    row = next((row for row, pair in enumerate(zip(keys, expected, strict=False)) if len({*pair}) == 2), None)
    if row is None and len(keys) < len(expected):
        raise BadInput(
            f"{tars[-1].parent}: expected the {len(expected):,} images of {listed} in its tar files, found "
            f"{len(keys):,}; make the others with the same `python -m simclr shards …`"
        )
    row = len(expected) if row is None else row
    wanted = expected[row] if row < len(expected) else "nothing more"
    twice = " a second time" if keys[row] in keys[:row] else ""
    raise BadInput(
        f"{tars[row]}: expected {wanted}, as in {listed}, found {keys[row]}{twice}; {again(tars[row])}"
    )


def _into_folders(names: list[str], labels: np.ndarray, wnids: list[str], folder: Path) -> list[str]:
    """Complete names of a list that names files without their wnid folder (the published val.txt does)."""
    if all("/" in name for name in names):
        return names
    where = {name: wnid for wnid in _folders(folder) for name in _image_names(folder / wnid)}
    return [
        name if "/" in name else f"{where.get(name, _named(wnids, label))}/{name}"
        for name, label in zip(names, labels, strict=True)
    ]


def _named(names: list[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else str(label)


def _check_imagenet(dataset: Dataset, split: str, listing: Listing) -> None:
    """Raise `BadInput` unless every label is the rank of the image's wnid in sorted order."""
    listed = dataset.root / "meta" / f"{split}.txt"
    names = [os.fsdecode(name) for name in listing.paths.names]
    _check_range(dataset, split, listing)
    if "/" in names[0]:
        expected = ranks(names, dataset.class_names, listed)
    else:
        expected = _known_val_labels(names, listing.labels, dataset.classes)
    wrong = np.flatnonzero(listing.labels != expected)
    if len(wrong):
        row = wrong[0]
        raise BadInput(wrong_label(listed, names[row], listing.labels[row], expected[row]))


# The first images of the validation set and their labels in sorted wnid order. The devkit's own ground truth
# numbers the classes otherwise (ILSVRC2012_ID); in a flat folder nothing else tells the two orders apart.
KNOWN_VAL = dict(enumerate((65, 970, 230, 809, 516), start=1))


def _known_val_labels(names: list[str], labels: np.ndarray, classes: int) -> np.ndarray:
    if classes != 1000:
        return labels
    known = {f"ILSVRC2012_val_{number:08d}.JPEG": label for number, label in KNOWN_VAL.items()}
    return np.array([known.get(name, label) for name, label in zip(names, labels, strict=True)])


def wrong_label(path: Path, name: str, found: Any, expected: Any) -> str:
    return (
        f"{path}: expected label {expected} for {name}, the rank of its wnid in sorted order, found {found}; "
        "use the list whose labels follow the sorted wnids"
    )


def _voc_classes(root: Path, name: str = "voc2007") -> list[str]:
    """Return the classes that have a list, in alphabetical order, which is VOC's."""
    folder = _need(root / "VOC2007/ImageSets/Main", name)
    return sorted(path.name.removesuffix("_trainval.txt") for path in folder.glob("*_trainval.txt"))


def _voc_ids(root: Path, year: str, kind: str, split: str, name: str) -> list[str]:
    path = _need(root / year / "ImageSets" / kind / f"{split}.txt", name)
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def _voc_images(root: Path, year: str, ids: list[str]) -> Paths:
    return Paths(root, [f"{year}/JPEGImages/{each}.jpg" for each in ids])


def _voc2007(dataset: Dataset, split: str) -> Listing:
    ids = _voc_ids(dataset.root, "VOC2007", "Main", split, dataset.name)
    folder = dataset.root / "VOC2007/ImageSets/Main"
    columns = [
        _voc_class_list(_need(folder / f"{each}_{split}.txt", dataset.name), ids)
        for each in dataset.class_names
    ]
    labels = np.stack(columns, axis=1) if ids else np.zeros((0, dataset.classes), np.int8)
    return Listing(_voc_images(dataset.root, "VOC2007", ids), labels)


def _voc_class_list(path: Path, ids: list[str]) -> np.ndarray:
    """Return `(N,)` int8 of a class list: its 1, −1, 0 (present, absent, difficult) become 1, 0, −1."""
    entries = [line.split() for line in path.read_text().splitlines() if line.strip()]
    stored = {"1": 1, "-1": 0, "0": -1}
    for row, entry in enumerate(entries):
        if len(entry) != 2 or entry[1] not in stored:
            raise BadInput(
                f"{path}: line {row + 1}: expected `<image id> 1`, `-1` or `0`, found {' '.join(entry)!r}; "
                "unpack the list again"
            )
    if [entry[0] for entry in entries] != ids:
        raise BadInput(
            f"{path}: expected the {len(ids)} image ids of {path.name.split('_')[-1]}, in its order, found "
            f"{len(entries)} others; unpack ImageSets again"
        )
    return np.array([stored[entry[1]] for entry in entries], np.int8)


VOC0712_SPLITS = {
    "trainval07": ("VOC2007", "trainval"),
    "trainval12": ("VOC2012", "trainval"),
    "test07": ("VOC2007", "test"),
}


def _voc0712(dataset: Dataset, split: str) -> Listing:
    year, listed = VOC0712_SPLITS[split]
    ids = _voc_ids(dataset.root, year, "Main", listed, dataset.name)
    paths = _voc_images(dataset.root, year, ids)
    categories = {name: number for number, name in enumerate(dataset.class_names)}
    annotations = dataset.root / year / "Annotations"
    listing = dataset.root / year / f"ImageSets/Main/{listed}.txt"
    for each in ids:
        if not (annotations / f"{each}.xml").is_file():
            raise BadInput(
                f"{listing}: it names {each}, but {annotations / each}.xml was not found; unpack both again"
            )
    boxes = [
        {"file_name": str(path), "image_id": each, **_voc_objects(annotations / f"{each}.xml", categories)}
        for each, path in zip(ids, paths, strict=True)
    ]
    return Listing(paths, boxes=boxes, sizes=_sizes(boxes))


def _voc_objects(path: Path, categories: dict[str, int]) -> dict[str, Any]:
    try:
        tree = ET.parse(path).getroot()
        size = {key: int(tree.findtext(f"size/{key}")) for key in ("height", "width")}
        objects = [_voc_object(each, categories) for each in tree.iterfind("object")]
    except (ET.ParseError, TypeError, ValueError, KeyError) as error:
        raise BadInput(
            f"{path}: expected a VOC annotation with size and objects of the classes "
            f"{', '.join(categories)}; found {type(error).__name__}: {error}; unpack Annotations again"
        ) from error
    for each in objects:
        _check_box(each["bbox"], size["width"], size["height"], f"{path}: an object")
    return {**size, "annotations": objects}


def _check_box(box: list[float], width: int, height: int, what: str) -> None:
    """Raise `BadInput` for a box without area, or that leaves the image by more than a pixel.

    A pixel is left to roundings: the published boxes are drawn within the images.
    """
    x0, y0, x1, y1 = box
    said = f"x {x0:g} to {x1:g}, y {y0:g} to {y1:g}"
    if not (x0 < x1 and y0 < y1):
        raise BadInput(f"{what} has a box without area ({said}); unpack the annotations again")
    if not (x0 >= -1 and y0 >= -1 and x1 <= width + 1 and y1 <= height + 1):
        raise BadInput(
            f"{what} has a box ({said}) outside its image of {width} × {height} pixels; unpack the "
            "annotations again"
        )


def _voc_object(element: ET.Element, categories: dict[str, int]) -> dict[str, Any]:
    x0, y0, x1, y1 = (float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    return {
        "bbox": [x0 - 1, y0 - 1, x1, y1],
        "category_id": categories[element.findtext("name")],
        "iscrowd": 0,
        "difficult": int(element.findtext("difficult", "0")),
    }


def _coco_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(_need(path, name).read_bytes())
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON ({error}); unpack it again") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise BadInput(f"{path}: expected the keys {', '.join(keys)}; unpack that of {name}")
    for each in keys:
        if not isinstance(content[each], list):
            raise BadInput(
                f"{path}: expected a list as `{each}`, found {content[each]!r:.80}; unpack it again"
            )
    return content


def _coco_categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    """Return id → name in the order of the ids, by which classes are numbered from 0."""
    for each in content["categories"]:
        if not isinstance(each, dict) or type(each.get("id")) is not int or type(each.get("name")) is not str:
            raise BadInput(
                f"{path}: expected categories with a whole number `id` and a `name`, found {each!r:.80}; "
                "unpack the file again"
            )
    categories = sorted((each["id"], each["name"]) for each in content["categories"])
    if len(dict(categories)) < len(categories):
        raise BadInput(f"{path}: expected each id once among its categories; unpack the file again")
    return dict(categories)


def _coco_classes(root: Path) -> list[str]:
    path = _coco_file(root, "val2017")
    return list(_coco_categories(path, _read_json(path, "coco2017")).values())


def _check_categories(root: Path, path: Path, found: dict[int, str]) -> None:
    """Raise `BadInput` unless the categories are val2017's, so that a class has one number in all splits."""
    val = _coco_file(root, "val2017")
    expected = found if path == val else _coco_categories(val, _read_json(val, "coco2017"))
    for each in sorted(found.keys() | expected.keys()):
        if found.get(each) != expected.get(each):
            said = [f"{names[each]!r}" if each in names else "none" for names in (expected, found)]
            raise BadInput(
                f"{path}: expected {said[0]} as category {each}, as in {val}, found {said[1]}; unpack both "
                "again from one archive"
            )


# The two annotations of the published train2017 whose boxes have no height (cocodataset/cocoapi, issue 355).
COCO_FLAT = {918, 2206849}


def _coco2017(dataset: Dataset, split: str) -> Listing:
    path = _coco_file(dataset.root, split)
    content = _read_json(path, dataset.name)
    named = _coco_categories(path, content)
    _check_categories(dataset.root, path, named)
    images = _coco_images(path, content)
    objects = _coco_objects(path, content, images, {each: number for number, each in enumerate(named)})
    paths = Paths(dataset.root, [f"{split}/{image['file_name']}" for image in images.values()])
    boxes = [
        {
            "file_name": str(path),
            "image_id": number,
            "height": image["height"],
            "width": image["width"],
            "annotations": objects[number],
        }
        for (number, image), path in zip(images.items(), paths, strict=True)
    ]
    return Listing(paths, boxes=boxes, sizes=_sizes(boxes))


COCO_IMAGE = {"id": int, "file_name": str, "width": int, "height": int}


def _coco_images(path: Path, content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return id → image in the order of the ids."""
    for each in content["images"]:
        if not isinstance(each, dict) or {name: type(each.get(name)) for name in COCO_IMAGE} != COCO_IMAGE:
            raise BadInput(
                f"{path}: expected images with whole numbers `id`, `width` and `height` and a `file_name`, "
                f"found {each!r:.120}; unpack the file again"
            )
    images = {each["id"]: each for each in sorted(content["images"], key=lambda each: each["id"])}
    if len(images) < len(content["images"]):
        raise BadInput(f"{path}: expected each id once among its images; unpack the file again")
    return images


def _coco_objects(
    path: Path, content: dict[str, Any], images: dict[int, dict[str, Any]], categories: dict[int, int]
) -> dict[int, list[dict[str, Any]]]:
    """Return the objects of each image; raises `BadInput` for the first annotation that is not one."""
    objects: dict[int, list[dict[str, Any]]] = {each: [] for each in images}
    seen = set()
    for annotation in content["annotations"]:
        number = annotation.get("id") if isinstance(annotation, dict) else None
        if type(number) is not int:
            raise BadInput(
                f"{path}: expected annotations with a whole number `id`, found {annotation!r:.120}; unpack "
                "the file again"
            )
        where = f"{path}: annotation {number}"
        if number in seen:
            raise BadInput(f"{where}: expected each id once, found a second; unpack the file again")
        seen.add(number)
        fault = _coco_fault(annotation, images, categories)
        if fault:
            raise BadInput(f"{where}: {fault}; unpack the file again")
        if number in COCO_FLAT and annotation["bbox"][3] == 0:
            continue
        image, found = images[annotation["image_id"]], _coco_object(annotation, categories)
        _check_box(found["bbox"], image["width"], image["height"], where)
        objects[image["id"]].append(found)
    return objects


def _coco_fault(
    annotation: dict[str, Any], images: dict[int, dict[str, Any]], categories: dict[int, int]
) -> str | None:
    """Return what was expected of an annotation and what was found, or None where it is right."""
    for reference, known in (("image_id", images), ("category_id", categories)):
        value = annotation.get(reference)
        if type(value) is not int or value not in known:
            return f"expected one that the file has as `{reference}`, found {value!r:.80}"
    crowd, box = annotation.get("iscrowd"), annotation.get("bbox")
    if crowd not in (0, 1):
        return f"expected 0 or 1 as `iscrowd`, found {crowd!r:.80}"
    if not _are_numbers(box) or len(box) != 4:
        return f"expected four numbers x, y, width, height as `bbox`, found {box!r:.80}"
    return _shape_fault(annotation.get("segmentation"), bool(crowd), images[annotation["image_id"]])


def _shape_fault(shape: Any, crowd: bool, image: dict[str, Any]) -> str | None:
    """Return what was expected of a segmentation and what was found, or None where it is right.

    Polygons of less than three points pass: Detectron2 leaves them out (coco.py), as training here does.
    """
    if not crowd or not isinstance(shape, dict):
        if isinstance(shape, list) and shape and all(_is_polygon(each) for each in shape):
            return None
        return f"expected polygons, lists of x and y in turn, as `segmentation`, found {shape!r:.80}"
    size, runs = [image["height"], image["width"]], shape.get("counts")
    if shape.get("size") == size and _are_numbers(runs) and min(runs) >= 0 and sum(runs) == size[0] * size[1]:
        return None
    return f"expected an RLE of {size} as `segmentation`, with runs that add up, found {shape!r:.80}"


def _is_polygon(values: Any) -> bool:
    return _are_numbers(values) and len(values) % 2 == 0


def _are_numbers(values: Any) -> bool:
    """Return whether `values` is a list of finite numbers, at least one."""
    if not isinstance(values, list) or not values or not set(map(type, values)) <= {int, float}:
        return False
    try:
        return math.isfinite(sum(values))
    except OverflowError:
        return False


def _coco_object(annotation: dict[str, Any], categories: dict[int, int]) -> dict[str, Any]:
    x, y, width, height = annotation["bbox"]
    return {
        "bbox": [x, y, x + width, y + height],
        "category_id": categories[annotation["category_id"]],
        "iscrowd": annotation["iscrowd"],
        "difficult": 0,
        "segmentation": annotation["segmentation"],
    }


def _sizes(boxes: list[dict[str, Any]]) -> np.ndarray:
    return np.array([(entry["width"], entry["height"]) for entry in boxes], np.int64).reshape(-1, 2)


PLACES_IMAGES = "data/vision/torralba/deeplearning/images256"


def _places_list(root: Path, split: str) -> Path:
    return root / "trainvalsplit_places205" / f"{split}_places205.csv"


def _places_classes(root: Path) -> list[str]:
    """Return the category folders in the order of their labels in the val list."""
    path = _need(_places_list(root, "val"), "places205")
    names, labels = _read_list(path)
    found: dict[int, str] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        category = _places_category(name)
        if found.setdefault(label, category) != category:
            raise BadInput(
                f"{path}: expected one category per label, found {found[label]} and {category} with label "
                f"{label}; unpack trainvalsplit_places205 again"
            )
    return [found[label] for label in sorted(found)]


def _places_category(name: str) -> str:
    """Return "abbey" for …/images256/a/abbey/gsun_….jpg; some categories have two levels."""
    return name.removeprefix(f"{PLACES_IMAGES}/").rpartition("/")[0].partition("/")[2]


def _places205(dataset: Dataset, split: str) -> Listing:
    names, labels = _read_list(_need(_places_list(dataset.root, split), dataset.name))
    return Listing(Paths(dataset.root, names), labels)


def _check_places205(dataset: Dataset, split: str, listing: Listing) -> None:
    _check_range(dataset, split, listing)
    for name, label in zip(map(os.fsdecode, listing.paths.names), listing.labels.tolist(), strict=True):
        if _places_category(name) != dataset.class_names[label]:
            raise BadInput(
                f"{_places_list(dataset.root, split)}: expected images of {dataset.class_names[label]} for "
                f"label {label}, as in the val list, found {name}; unpack trainvalsplit_places205 again"
            )


def _inat_file(root: Path, split: str) -> Path:
    return root / f"{split}2018.json"


def _inat_classes(root: Path) -> list[str]:
    content = _read_json(_inat_file(root, "val"), "inat18")
    return [category["name"] for category in sorted(content["categories"], key=lambda each: each["id"])]


def _inat18(dataset: Dataset, split: str) -> Listing:
    """Return the images of a split; the label is the category id as it stands (convert_inaturalist.py)."""
    path = _inat_file(dataset.root, split)
    content = _read_json(path, dataset.name)
    category = {each["image_id"]: each["category_id"] for each in content["annotations"]}
    try:
        labels = np.array([category[image["id"]] for image in content["images"]], np.int64)
    except KeyError as error:
        raise BadInput(f"{path}: image {error} has no annotation; unpack the file again") from error
    return Listing(Paths(dataset.root, [image["file_name"] for image in content["images"]]), labels)


def _check_inat18(dataset: Dataset, split: str, listing: Listing) -> None:
    _check_range(dataset, split, listing)
    for name, label in zip(map(os.fsdecode, listing.paths.names), listing.labels.tolist(), strict=True):
        if Path(name).parent.name != str(label):
            raise BadInput(
                f"{_inat_file(dataset.root, split)}: expected the category id that {name} lies in, found "
                f"{label}; unpack the file again"
            )


def _voc12aug_classes(root: Path) -> list[str]:
    return ["background", *VOC_CLASSES]


def _voc12aug(dataset: Dataset, split: str) -> Listing:
    """Return images and masks: VOC's own for train and val, SBD's for aug, whose borders differ."""
    ids = _voc_ids(dataset.root, "VOC2012", "Segmentation", split, dataset.name)
    masks = "SegmentationClassAug" if split == "aug" else "SegmentationClass"
    return Listing(
        _voc_images(dataset.root, "VOC2012", ids),
        masks=Paths(dataset.root, [f"VOC2012/{masks}/{each}.png" for each in ids]),
    )


def _cityscapes_classes(root: Path) -> list[str]:
    return list(CITYSCAPES_CLASSES)


def _cityscapes(dataset: Dataset, split: str) -> Listing:
    folder = _need(dataset.root / "leftImg8bit" / split, dataset.name)
    stems = [
        f"{split}/{city}/{name.removesuffix('_leftImg8bit.png')}"
        for city in _folders(folder)
        for name in _image_names(folder / city)
        if name.endswith("_leftImg8bit.png")
    ]
    return Listing(
        Paths(dataset.root, [f"leftImg8bit/{stem}_leftImg8bit.png" for stem in stems]),
        masks=Paths(dataset.root, [f"gtFine/{stem}_gtFine_labelTrainIds.png" for stem in stems]),
    )


def _check_range(dataset: Dataset, split: str, listing: Listing) -> None:
    """Raise `BadInput` unless every label lies in [0, classes)."""
    wrong = np.flatnonzero((listing.labels < 0) | (listing.labels >= dataset.classes))
    if len(wrong):
        raise BadInput(
            f"{listing.paths[int(wrong[0])]}: expected a label of 0 to {dataset.classes - 1}, found "
            f"{listing.labels[wrong[0]]} in the {split} list of {dataset.name}; unpack the list again"
        )


class Layout(NamedTuple):
    """How a dataset is read: its class names, its splits, the list files to hash, a check of its labels.

    `make` makes under a root what the archives do not hold as it is read, and is not there yet.
    """

    classes: Callable[[Path], list[str]]
    read: Callable[[Dataset, str], Listing]
    lists: tuple[str, ...]  # glob patterns
    check: Callable[[Dataset, str, Listing], None] | None = None
    make: Callable[[Path], None] | None = None


READERS = {
    "imagenet": Layout(_imagenet_classes, _imagenet, ("meta/*.txt",), _check_imagenet),
    "voc2007": Layout(_voc_classes, _voc2007, ("VOC2007/ImageSets/Main/*.txt",)),
    "places205": Layout(_places_classes, _places205, ("trainvalsplit_places205/*.csv",), _check_places205),
    "inat18": Layout(_inat_classes, _inat18, ("train2018.json", "val2018.json"), _check_inat18),
    "voc0712": Layout(
        partial(_voc_classes, name="voc0712"),
        _voc0712,
        ("VOC20*/ImageSets/Main/trainval.txt", "VOC2007/ImageSets/Main/test.txt"),
    ),
    "coco2017": Layout(_coco_classes, _coco2017, ("annotations/instances_*2017.json",)),
    "voc12aug": Layout(
        _voc12aug_classes,
        _voc12aug,
        tuple(f"VOC2012/ImageSets/Segmentation/{split}.txt" for split in ("train", "aug", "val")),
        make=masks.make_voc12aug,
    ),
    "cityscapes": Layout(_cityscapes_classes, _cityscapes, (), make=masks.make_cityscapes),
}

# ---------------------------------------------------------------- files and lists


def _need(path: Path, name: str) -> Path:
    """Return `path` if it exists; else raise `BadInput` that names what the dataset needs."""
    if not path.exists():
        raise BadInput(
            f"{path}: not found; {name} needs under its root: {LAYOUTS[name]}; unpack or link it there, or "
            f"correct datasets.{name}.root"
        )
    return path


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, sorted; those with a leading dot do not count."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and entry.name[0] != "." for entry in entries)


def _image_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name[0] != "."]
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))


def _read_list(path: Path) -> tuple[list[str], np.ndarray]:
    """Read lines of `relative/path label`, split at the last space; labels are `(N,)` int64."""
    names, labels = [], []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")
        if name and label.isdecimal():
            names.append(name.rstrip())
            labels.append(int(label))
        elif line.strip():
            raise BadInput(
                f"{path}: line {number}: expected `relative/path label`, found {line!r}; restore the list"
            )
    return names, np.array(labels, np.int64)


def ranks(names: Iterable[str], wnids: list[str], where: Path) -> np.ndarray:
    """Return for each `<wnid>/<file>` the rank of its wnid, `(N,)` int64."""
    rank = {wnid: number for number, wnid in enumerate(wnids)}
    folders = [name.split("/", 1)[0] for name in names]
    try:
        return np.array([rank[folder] for folder in folders], np.int64)
    except KeyError as error:
        raise BadInput(
            f"{where}: {error} is not one of the {len(wnids)} wnid folders of train/; restore the missing "
            "folder or the list"
        ) from error
