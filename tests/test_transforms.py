from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from simclr import transforms
from simclr.config import Augmentation

OFF = dict(flip=0, jitter=0, grayscale=0, blur=0, crop_area=(1, 1), crop_ratio=(1, 1))


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((120, 90))


def _theirs(image, *steps):
    tail = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(transforms.MEAN, transforms.STD),
    ]
    return v2.Compose([*steps, *tail])(image)


def _view(image, config, rng):
    return transforms.render(image, transforms.draw_view(*image.size, config, rng), config.image_size)


def test_center_crop_is_torchvisions(image):
    expected = _theirs(image, v2.Resize(64), v2.CenterCrop(48))
    torch.testing.assert_close(transforms.center_crop(64, 48)(image), expected.as_subclass(torch.Tensor))


def test_squash_is_torchvisions(image):
    expected = _theirs(image, v2.Resize(64), v2.Resize((48, 48)))
    torch.testing.assert_close(transforms.squash(64, 48)(image), expected.as_subclass(torch.Tensor))


@pytest.mark.parametrize("size", [(97, 61), (61, 97), (64, 64), (33, 500)])
def test_center_crop_of_any_shape_is_torchvisions(image, size):
    image = image.resize(size)
    expected = _theirs(image, v2.Resize(52), v2.CenterCrop(47))
    torch.testing.assert_close(transforms.center_crop(52, 47)(image), expected.as_subclass(torch.Tensor))


@pytest.mark.parametrize("shift", [-0.2, -0.01, 0.13, 0.2])
def test_hue_is_torchvisions(image, shift):
    assert transforms.adjust_hue(image, shift) == TF.adjust_hue(image, shift)


def test_no_hue_shift_changes_nothing(image):
    assert transforms.adjust_hue(image, 0.0) == image


def test_jitter_is_torchvisions_in_each_of_the_24_orders(image):
    class Draws:
        def __init__(self, order):
            self.order, self.factors = order, iter([1.7, 0.4, 1.2, -0.15])

        def uniform(self, low, high):
            return next(self.factors)

        def permutation(self, n):
            return self.order

    changes = [
        lambda image: TF.adjust_brightness(image, 1.7),
        lambda image: TF.adjust_contrast(image, 0.4),
        lambda image: TF.adjust_saturation(image, 1.2),
        lambda image: TF.adjust_hue(image, -0.15),
    ]
    for order in itertools.permutations(range(4)):
        expected = image
        for i in order:
            expected = changes[i](expected)
        assert transforms.color_jitter(image, 0.8, 0.8, 0.8, 0.2, Draws(order)) == expected


@pytest.mark.parametrize(
    "transform",
    [transforms.center_crop(20, 16), transforms.squash(20, 16), transforms.two_views(Augmentation())],
)
def test_transforms_can_be_sent_to_workers(transform):
    assert pickle.loads(pickle.dumps(transform)).func is transform.func


def test_two_views_are_a_pure_function_of_the_seed(image):
    draw = transforms.two_views(Augmentation(image_size=32))
    first, again, other = (draw(image, np.random.default_rng([0, 3, i])) for i in (7, 7, 8))
    assert first.shape == (2, 3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_without_randomness_a_view_is_the_whole_image_resized(image):
    image = image.resize((90, 90))
    views = transforms.two_views(Augmentation(image_size=32, **OFF))(image, np.random.default_rng(0))
    expected = _theirs(image, v2.Resize((32, 32))).as_subclass(torch.Tensor)
    torch.testing.assert_close(views, expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize("step", ["flip", "jitter", "grayscale", "blur"])
def test_each_step_happens_with_its_probability(image, step):
    image, rng = image.resize((16, 16)), np.random.default_rng(0)
    config = Augmentation(image_size=16, **{**OFF, step: 0.3})
    changed = [_view(image, config, rng) != image for _ in range(400)]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.07)  # three standard deviations


def test_grayscale_has_the_weights_of_itu_601():
    image = Image.fromarray(np.full((4, 4, 3), (200, 100, 50), np.uint8))
    config = Augmentation(image_size=16, **{**OFF, "grayscale": 1})
    gray = _view(image, config, np.random.default_rng(0))
    assert gray.getpixel((0, 0)) == (124, 124, 124)  # 0.299·200 + 0.587·100 + 0.114·50 = 124.2


def test_crops_have_the_stated_areas_and_ratios():
    rng = np.random.default_rng(0)
    boxes = [transforms.draw_crop(400, 400, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(3000)]
    left, top, width, height = np.array(boxes).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 400).all()
    assert (top + height <= 400).all()
    assert ((width / height > 0.74) & (width / height < 1.35)).all()
    area = width * height / 160_000
    assert 0.079 < area.min() < 0.09
    assert 0.9 < area.max() <= 1
    # Uniform in area but for the crops near 1 that do not fit: the median is below 0.54.
    assert 0.45 < np.median(area) < 0.54
    assert np.median(np.log(width / height)) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("size", "box"), [((300, 30), (130, 0, 40, 30)), ((30, 300), (0, 130, 30, 40))])
def test_after_ten_misses_the_crop_is_central(size, box):
    rng = np.random.default_rng(0)
    assert transforms.draw_crop(*size, (1.0, 1.0), (3 / 4, 4 / 3), rng) == box


def test_a_crop_sees_nothing_beyond_its_box():
    """PIL's `resize(box=…)` would mix in the neighbours."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    image = Image.fromarray(pixels)

    class Draws:
        def uniform(self, low, high):
            return 0.25 if low == 0.25 else 0.0

        def integers(self, bound):
            return 0

    crop = transforms.random_resized_crop(image, 8, (0.25, 0.25), (1, 1), Draws())
    assert not np.asarray(crop).any()


def test_blur_is_pils_with_the_radius_as_sigma(image):
    image = image.resize((90, 90))
    config = Augmentation(image_size=90, **{**OFF, "blur": 1, "blur_sigma": (1.5, 1.5)})
    view = _view(image, config, np.random.default_rng(0))
    assert view == image.filter(ImageFilter.GaussianBlur(1.5))
