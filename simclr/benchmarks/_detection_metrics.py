"""Average precision of detections: VOC's as Detectron2 evaluates it, COCO's by pycocotools.

Truth and detections are as `_detection` says; percent throughout.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from simclr import BadInput
from simclr.protocol import Metrics

Json = dict[str, Any]
IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))


def measured(
    measure: Callable[..., Metrics], truth: list[Json], detections: list[Json], classes: list[str]
) -> Metrics:
    """Return what `measure`, one of those below, finds; raises `BadInput` where there is nothing to count."""
    if not detections:
        raise BadInput(
            f"the detector found nothing above score_threshold in {len(truth)} test images, so there is no "
            "AP; train for more iterations or with another lr"
        )
    numbers = np.array([[*each["bbox"], each["score"]] for each in detections])
    wrong = np.flatnonzero(~np.isfinite(numbers).all(1))
    if len(wrong):
        raise BadInput(
            f"{len(wrong)} of {len(detections)} detections are no finite numbers, the first in image "
            f"{detections[wrong[0]]['image_id']}, so there is no AP; train again with a lower lr"
        )
    return measure(truth, detections, classes)


def check_truth(measure: Callable[..., Metrics], truth: list[Json], classes: list[str]) -> None:
    """Raise `BadInput` for a truth on which `measure` has no number whatever is detected.

    To be asked before anything is trained.
    """
    {voc_metrics: _check_voc, coco_metrics: _check_coco}[measure](truth, classes)


def _check_voc(truth: list[Json], classes: list[str]) -> None:
    sure = {each["category_id"] for i in truth for each in i["annotations"] if not each["difficult"]}
    absent = [name for index, name in enumerate(classes) if index not in sure]
    if absent:
        raise BadInput(
            f"no test image has an object of class {absent[0]} that is not difficult, so its average "
            "precision is undefined; unpack the annotations of the test images again"
        )


def _check_coco(truth: list[Json], classes: list[str]) -> None:
    objects = [(image, each) for image in truth for each in image["annotations"]]
    if all(each["iscrowd"] for _, each in objects):
        raise BadInput(
            "no test image has an object that is no crowd, so average precision is undefined; unpack the "
            "annotations of the test images again"
        )
    for image, each in objects:
        shape = each["segmentation"]
        # By the first polygon, pycocotools tells polygons from boxes, which it then cannot read.
        if isinstance(shape, list) and len(shape[0]) < 6:
            raise BadInput(
                f"{image['file_name']}: an object has a first polygon of less than three points, "
                f"{shape[0]}, from which pycocotools makes no mask; unpack the annotations again"
            )


def voc_metrics(truth: list[Json], detections: list[Json], classes: list[str]) -> Metrics:
    """Return VOC2007's `ap50`, `ap`, `ap75` of `detections`, in percent, averaged over `classes`.

    As Detectron2's PascalVOCDetectionEvaluator: scores are rounded to 3 decimals and coordinates, counted
    from 1, to one. Equal scores are ranked in the order of `detections`; by Detectron2 in that of numpy's
    quicksort, which promises none and moved AP by 0.01 in the mean of made scenes, 0.06 at most. Details have
    the same by the rule of VOC2010 and later, `area`. Raises `BadInput` for a class of which `truth` has no
    object that is not difficult.
    """
    _check_voc(truth, classes)
    table = np.array([_class_ap(truth, detections, i) for i in range(len(classes))])
    eleven_points, area = np.moveaxis(100 * table.mean(0), 1, 0)
    return Metrics(_voc_columns(eleven_points), details={"area": _voc_columns(area)})


def _voc_columns(means: np.ndarray) -> dict[str, float]:
    at = dict(zip(IOU_THRESHOLDS, means.tolist(), strict=True))
    return {"ap50": at[0.5], "ap": float(means.mean()), "ap75": at[0.75]}


def _class_ap(truth: list[Json], detections: list[Json], index: int) -> list[tuple[float, float]]:
    """Return the average precisions of one class at every IoU threshold, by either rule, between 0 and 1."""
    boxes, difficult = {}, {}
    for image in truth:
        objects = [each for each in image["annotations"] if each["category_id"] == index]
        corners = np.array([each["bbox"] for each in objects]).reshape(-1, 4)
        boxes[image["image_id"]] = corners + np.array([1, 1, 0, 0])
        difficult[image["image_id"]] = np.array([each["difficult"] for each in objects], bool)
    positives = sum(int((~each).sum()) for each in difficult.values())
    found = [each for each in detections if each["category_id"] == index]
    found = [(float(f"{each['score']:.3f}"), each["image_id"], _rounded(each["bbox"])) for each in found]
    found.sort(key=lambda each: -each[0])
    overlaps = [_overlaps(box, boxes[image]) for _, image, box in found]
    images = [image for _, image, _ in found]
    curves = [_curve(images, overlaps, difficult, positives, threshold) for threshold in IOU_THRESHOLDS]
    return [(eleven_point_ap(*curve), area_ap(*curve)) for curve in curves]


def _rounded(box: list[float]) -> np.ndarray:
    shifted = np.array(box, np.float32) + np.array([1, 1, 0, 0], np.float32)
    # The evaluator writes x0 + 1, y0 + 1, x1, y1: the inverse of how the annotations are read.
    return np.array([float(f"{value:.1f}") for value in shifted])


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of `box` with each of `boxes` `(n, 4)`; edges count their last pixel."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    common = np.prod(np.maximum(high - low + 1, 0), 1)
    return common / (np.prod(box[2:] - box[:2] + 1) + np.prod(boxes[:, 2:] - boxes[:, :2] + 1, 1) - common)


def _curve(
    images: list[Any],
    overlaps: list[np.ndarray],
    difficult: dict[Any, np.ndarray],
    positives: int,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision of the first, the first two … detections, in descending order of score.

    A detection is right when the object that it overlaps most does so by more than `threshold` and has not
    been found before. Where that object is difficult, it counts neither way.
    """
    taken = {image: np.zeros(len(flags), bool) for image, flags in difficult.items()}
    right, wrong = np.zeros(len(images)), np.zeros(len(images))
    for i, (image, overlap) in enumerate(zip(images, overlaps, strict=True)):
        best = int(overlap.argmax()) if len(overlap) else -1
        if best < 0 or overlap[best] <= threshold or taken[image][best]:
            wrong[i] = 1
        elif not difficult[image][best]:
            right[i] = taken[image][best] = True
    right, wrong = right.cumsum(), wrong.cumsum()
    return right / positives, right / np.maximum(right + wrong, np.finfo(float).eps)


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the mean of the best precision from recall 0, 0.1 … 1 on (VOC2007)."""
    return float(np.mean([precision[recall >= r].max(initial=0) for r in np.arange(0, 1.1, 0.1)]))


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the area under the curve of the best precision from a recall on (VOC2010)."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * best))


def coco_metrics(truth: list[Json], detections: list[Json], classes: list[str]) -> Metrics:
    """Return COCO's box and mask AP, AP50 and AP75 of `detections`, in percent, by pycocotools.

    All areas, 100 detections per image. Details name the `absent_classes`, which the means leave out, as
    `truth` has no object of them. Raises `BadInput` when `truth` has no object that counts, or one of which
    pycocotools makes no mask.
    """
    _check_coco(truth, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = coco_of(truth, classes)
        found = {kind: _coco_stats(dataset, detections, kind) for kind in ("bbox", "segm")}
    keys = {"bbox": "box", "segm": "mask"}
    values = {
        f"{keys[kind]}_{name}": 100 * float(value)
        for kind, each in found.items()
        for name, value in zip(("ap", "ap50", "ap75"), each, strict=True)
    }
    present = {each["category_id"] for i in truth for each in i["annotations"] if not each["iscrowd"]}
    absent = [name for index, name in enumerate(classes) if index not in present]
    return Metrics(values, details={"absent_classes": absent})


def coco_of(truth: list[Json], classes: list[str]) -> Any:
    """Return `truth` as pycocotools' COCO; ids of categories and annotations count from 1."""
    from pycocotools.coco import COCO

    annotations = [
        {
            "image_id": image["image_id"],
            "category_id": each["category_id"] + 1,
            "bbox": _xywh(each["bbox"]),
            "area": _area(each["bbox"]),  # any positive number: areas only sort objects into small and large
            "iscrowd": int(each["iscrowd"]),
            "segmentation": each["segmentation"],
        }
        for image in truth
        for each in image["annotations"]
    ]
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [
            {"id": image["image_id"], "height": image["height"], "width": image["width"]} for image in truth
        ],
        "annotations": [{"id": i, **each} for i, each in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }
    coco.createIndex()
    return coco


def _coco_stats(dataset: Any, detections: list[Json], kind: str) -> list[float]:
    from pycocotools.cocoeval import COCOeval

    shape = {"bbox": lambda each: _xywh(each["bbox"]), "segm": lambda each: each["segmentation"]}[kind]
    name = {"bbox": "bbox", "segm": "segmentation"}[kind]
    found = [
        {
            "image_id": each["image_id"],
            "category_id": each["category_id"] + 1,
            "score": each["score"],
            name: shape(each),
        }
        for each in detections
    ]
    evaluation = COCOeval(dataset, dataset.loadRes(found), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return list(evaluation.stats[:3])


def _xywh(box: list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
