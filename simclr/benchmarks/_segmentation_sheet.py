"""A sheet of test images, each beside its ground truth and its prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGES = 4  # rows of a sheet
EDGE = 480  # pixels of the longest edge of a picture
MARGIN, LINE = 8, 22  # pixels between pictures, and of a line of text
HEADING = 110  # pixels that the heading of a column takes
VOID_COLOUR = (255, 255, 255)

Row = tuple[Image.Image, np.ndarray, np.ndarray]  # image, ground truth, prediction


def chosen(images: int) -> list[int]:
    """Return which of so many images the sheet shows: at most `IMAGES`, evenly spaced, always the same."""
    return list(range(0, images, math.ceil(images / IMAGES)))


def draw(rows: Sequence[Row], names: Sequence[str], palette: Sequence[Sequence[int]]) -> Image.Image:
    """Return the sheet of `rows`, with a heading above its columns and a legend of its classes below.

    Maps are `(H, W)` class numbers, in which what is beyond `names` is void and white; pictures are shrunk to
    480 pixels, never enlarged.
    """
    colours = np.full((256, 3), VOID_COLOUR, np.uint8)
    colours[: len(palette)] = palette
    pictures = [_pictures(row, colours) for row in rows]
    width, height = (max(row[0].size[axis] for row in pictures) + MARGIN for axis in (0, 1))
    width = max(width, HEADING)
    entries = _legend(rows, names)
    lines = _lines(entries, 3 * width)
    size = (3 * width + MARGIN, LINE + len(rows) * height + LINE * len(lines) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    for x, title in enumerate(("image", "ground truth", "prediction")):
        _write(sheet, (MARGIN + x * width, 4), title)
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture, (MARGIN + x * width, LINE + y * height))
    for y, line in enumerate(lines):
        left, top = MARGIN, LINE + len(rows) * height + y * LINE
        for label, entry in line:
            box = (left, top + 3, left + 14, top + 17)
            ImageDraw.Draw(sheet).rectangle(box, tuple(map(int, colours[label])), "black")
            _write(sheet, (left + 20, top + 3), entry)
            left += _entry_width(entry)
    return sheet


def _pictures(row: Row, colours: np.ndarray) -> list[Image.Image]:
    image, *maps = row
    share = min(1, EDGE / max(image.size))
    size = tuple(max(1, round(share * edge)) for edge in image.size)
    maps = [Image.fromarray(colours[labels]).resize(size, Image.Resampling.NEAREST) for labels in maps]
    return [image.resize(size, Image.Resampling.LANCZOS), *maps]


def _legend(rows: Iterable[Row], names: Sequence[str]) -> list[tuple[int, str]]:
    """Return (number, name) of every class in the maps, and of void where there is any."""
    labels = np.unique(np.concatenate([part.ravel() for _, *maps in rows for part in maps]))
    found = [(int(label), names[label]) for label in labels if label < len(names)]
    return [*found, (255, "void")] if labels[-1] >= len(names) else found


def _lines(entries: list[tuple[int, str]], width: int) -> list[list[tuple[int, str]]]:
    lines: list[list[tuple[int, str]]] = [[]]
    for entry in entries:
        if lines[-1] and sum(_entry_width(name) for _, name in [*lines[-1], entry]) > width:
            lines.append([])
        lines[-1].append(entry)
    return lines


def _entry_width(text: str) -> int:
    return 36 + math.ceil(_font().getlength(text))


def _write(sheet: Image.Image, position: tuple[int, int], text: str) -> None:
    ImageDraw.Draw(sheet).text(position, text, "black", _font())


def _font() -> ImageFont.ImageFont:
    return ImageFont.load_default(13)
