"""The sheet of detections: some test images with their objects, and beside them with what was detected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from pycocotools import mask as coco

from simclr.datasets import decode
from simclr.files import replacing

Json = dict[str, Any]
TILE, HEADER = 320, 20  # pixels: longer edge of an image, height of the headings


def draw(
    truth: list[Json],
    detections: list[Json],
    classes: list[str],
    path: Path,
    images: int = 6,
    least: float = 0.3,
) -> None:
    """Draw test images, evenly spaced in their list: the objects left, the detections right of them.

    Drawn are detections of score `least` and more, and of an image without that many as many as it has
    objects; the surest last. Masks are tinted; a class has one colour.
    """
    chosen = [truth[i] for i in sorted(set(np.linspace(0, len(truth) - 1, images).round().astype(int)))]
    found: dict[Any, list[Json]] = {image["image_id"]: [] for image in chosen}
    for each in sorted(detections, key=lambda each: -each["score"]):
        if each["image_id"] in found:
            found[each["image_id"]].append(each)
    sheet = Image.new("RGB", (4 * TILE, HEADER + -(-len(chosen) // 2) * TILE))
    for column in range(4):
        heading = "detections" if column % 2 else "objects"
        ImageDraw.Draw(sheet).text((column * TILE + 4, 4), heading, fill="white")
    for i, image in enumerate(chosen):
        photo = decode(Path(image["file_name"]), (image["width"], image["height"]))
        objects, detected = image["annotations"], found[image["image_id"]]
        detected = [d for rank, d in enumerate(detected) if d["score"] >= least or rank < len(objects)]
        for side, several in enumerate((objects, reversed(detected))):
            tile = _tile(photo, list(several), classes)
            sheet.paste(tile, ((2 * (i % 2) + side) * TILE, HEADER + i // 2 * TILE))
    with replacing(path) as part:
        sheet.save(part, format="PNG")


def _tile(photo: Any, objects: list[Json], classes: list[str]) -> Any:
    """Return `photo` with the masks, boxes and names of `objects`, its longer edge `TILE` pixels."""
    colours = [
        ImageColor.getrgb(f"hsl({360 * each['category_id'] // len(classes)}, 90%, 60%)") for each in objects
    ]
    photo = photo.copy()
    for each, colour in zip(objects, colours, strict=True):
        if each.get("segmentation"):
            mask = 0.5 * _mask(each["segmentation"], photo.height, photo.width)[..., None]
            tinted = np.asarray(photo) * (1 - mask) + np.array(colour) * mask
            photo = Image.fromarray(tinted.astype(np.uint8))
    scale = TILE / max(photo.size)
    tile = photo.resize([max(round(side * scale), 1) for side in photo.size])
    pen = ImageDraw.Draw(tile)
    for each, colour in zip(objects, colours, strict=True):
        box = [scale * value for value in each["bbox"]]
        score = f" {each['score']:.2f}" if "score" in each else ""
        pen.rectangle(box, outline=colour, width=2)
        pen.text((box[0] + 3, box[1] + 1), classes[each["category_id"]] + score, fill=colour)
    return tile


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the mask `(height, width)` of polygons or of an RLE, 0 or 1."""
    if isinstance(segmentation, list):
        segmentation = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco.frPyObjects(segmentation, height, width)
    return coco.decode(segmentation)
