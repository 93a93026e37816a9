"""The sheet of predictions: which images, where they stand, what their colours mean."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from simclr.benchmarks import _segmentation_sheet as sheet

NAMES = ("background", "cat", "a class with a long name")
PALETTE = [[0, 0, 0], [10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize(
    ("images", "shown"),
    [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 2, 4]), (1449, [0, 363, 726, 1089])],
)
def test_the_same_few_images_are_chosen(images, shown):
    assert sheet.chosen(images) == shown


def row(width, height, truth=1, prediction=2):
    maps = (np.full((height, width), label) for label in (truth, prediction))
    return Image.new("RGB", (width, height), (200, 0, 0)), *maps


def test_image_truth_and_prediction_stand_side_by_side_in_the_palettes_colours():
    made = np.asarray(sheet.draw([row(160, 40), row(50, 45, truth=255)], NAMES, PALETTE))
    width, height = 160 + sheet.MARGIN, 45 + sheet.MARGIN
    for y, truth in ((0, (10, 20, 30)), (1, (255, 255, 255))):
        for x, colour in enumerate([(200, 0, 0), truth, (40, 50, 60)]):
            pixel = made[sheet.LINE + y * height + 20, sheet.MARGIN + x * width + 25]
            assert tuple(pixel) == colour


def test_large_pictures_are_shrunk_and_maps_keep_their_colours():
    image, truth, prediction = row(2048, 1024)
    truth[:, ::2] = 0
    made = sheet.draw([(image, truth, prediction)], NAMES, PALETTE)
    assert made.width == 3 * (sheet.EDGE + sheet.MARGIN) + sheet.MARGIN
    left = 2 * sheet.MARGIN + sheet.EDGE
    part = np.asarray(made)[sheet.LINE : sheet.LINE + 240, left : left + sheet.EDGE]
    assert {tuple(pixel) for pixel in part.reshape(-1, 3).tolist()} <= {(0, 0, 0), (10, 20, 30)}


def test_the_legend_has_the_classes_that_are_there():
    assert sheet._legend([row(5, 5, truth=0)], NAMES) == [(0, "background"), (2, "a class with a long name")]
    assert sheet._legend([row(5, 5, truth=255)], NAMES) == [(2, "a class with a long name"), (255, "void")]
    narrow = sheet._lines([(0, "background"), (1, "cat"), (2, "a class with a long name")], 190)
    assert [[label for label, _ in line] for line in narrow] == [[0, 1], [2]]


def test_equal_rows_give_equal_bytes():
    made = [sheet.draw([row(60, 40)], NAMES, PALETTE).tobytes() for _ in range(2)]
    assert made[0] == made[1]
