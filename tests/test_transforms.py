from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

from simclr import BadInput, transforms
from simclr.config import Augmentation
from simclr.datasets import decode

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
            return np.array(self.order)

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
        jitter = transforms.draw_jitter(0.8, 0.8, 0.8, 0.2, Draws(order))
        assert transforms._jittered(image, jitter) == expected


@pytest.mark.parametrize(
    "transform",
    [
        transforms.center_crop(20, 16),
        transforms.squash(20, 16),
        transforms.two_views(Augmentation()),
        transforms.two_crops(Augmentation()),
    ],
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

    crop = transforms._resized_crop(image, (0, 0, 20, 20), 8)
    assert not np.asarray(crop).any()


def test_blur_is_pils_with_the_radius_as_sigma(image):
    image = image.resize((90, 90))
    config = Augmentation(image_size=90, **{**OFF, "blur": 1, "blur_sigma": (1.5, 1.5)})
    view = _view(image, config, np.random.default_rng(0))
    assert view == image.filter(ImageFilter.GaussianBlur(1.5))


# ---------------------------------------------------------------- draws


DRAWS = 4000
CHANCE = 1e-3  # that a right draw fails a test; seeds are fixed, so it was tried once


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(5)
    return [transforms.draw_view(500, 375, Augmentation(), rng) for _ in range(DRAWS)]


def _same_distribution(ours, theirs):
    assert stats.ks_2samp(ours, theirs).pvalue > CHANCE


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (640, 300)])
def test_crops_are_distributed_as_torchvisions(width, height):
    """Area, ratio and place; at 640 × 300 many do not fit, and the next draw or the central crop is taken."""
    rng, image = np.random.default_rng(6), torch.empty(3, height, width)
    area, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(6)
    ours = [transforms.draw_crop(width, height, area, ratio, rng) for _ in range(DRAWS)]
    theirs = [RandomResizedCrop.get_params(image, list(area), list(ratio)) for _ in range(DRAWS)]
    left, top, w, h = np.array(ours).T
    top_, left_, h_, w_ = np.array(theirs).T
    _same_distribution(w * h, w_ * h_)
    _same_distribution(np.log(w / h), np.log(w_ / h_))
    _same_distribution(left / (width - w + 1), left_ / (width - w_ + 1))
    _same_distribution(top / (height - h + 1), top_ / (height - h_ + 1))


def test_jitter_is_distributed_as_torchvisions():
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    ours = [transforms.draw_jitter(0.8, 0.8, 0.8, 0.2, rng) for _ in range(DRAWS)]
    ranges = [(0.2, 1.8)] * 3 + [(-0.2, 0.2)]
    theirs = [ColorJitter.get_params(*ranges) for _ in range(DRAWS)]
    for i in range(4):
        _same_distribution([jitter[i] for jitter in ours], [jitter[i + 1] for jitter in theirs])
    orders = list(itertools.permutations(range(4)))
    counts = [
        [drawn.count(order) for order in orders]
        for drawn in ([jitter.order for jitter in ours], [tuple(jitter[0].tolist()) for jitter in theirs])
    ]
    assert stats.chisquare(counts[0]).pvalue > CHANCE  # all 24 are equally likely
    assert stats.chi2_contingency(counts).pvalue > CHANCE


def test_a_factor_is_never_negative():
    rng = np.random.default_rng(0)
    jitters = [transforms.draw_jitter(1.5, 1.5, 1.5, 0, rng) for _ in range(100)]
    assert min(min(jitter[:3]) for jitter in jitters) >= 0


def test_sigma_is_distributed_as_torchvisions(draws):
    torch.manual_seed(8)
    ours = [view.sigma for view in draws if view.sigma]
    _same_distribution(ours, [GaussianBlur.get_params(0.1, 2.0) for _ in ours])


def test_a_view_flips_jitters_greys_and_blurs_independently_with_the_stated_probabilities(draws):
    events = np.array([(v.flip, v.jitter is not None, v.grayscale, v.sigma > 0) for v in draws])
    probabilities = np.array([0.5, 0.8, 0.2, 0.5])
    for happened, probability in zip(events.T, probabilities, strict=True):
        assert stats.binomtest(int(happened.sum()), DRAWS, probability).pvalue > CHANCE
    outcomes = np.array(list(itertools.product([False, True], repeat=4)))
    counts = [(events == outcome).all(1).sum() for outcome in outcomes]
    expected = np.where(outcomes, probabilities, 1 - probabilities).prod(1) * DRAWS
    assert stats.chisquare(counts, expected).pvalue > CHANCE


def test_the_draws_of_a_view_are_a_pure_function_of_the_seed():
    first, again, other = (
        transforms.draw_view(500, 375, Augmentation(), np.random.default_rng([0, 1, i])) for i in (2, 2, 3)
    )
    assert first == again != other


# ---------------------------------------------------------------- for the device


def test_two_crops_are_the_crops_of_the_two_views(image):
    config = Augmentation(image_size=32, flip=0, jitter=0, grayscale=0, blur=0)
    for seed in range(20):
        crops, rows = transforms.two_crops(config)(image, np.random.default_rng(seed))
        views = transforms.two_views(config)(image, np.random.default_rng(seed))
        assert (crops.dtype, crops.shape, rows.shape) == (torch.uint8, (2, 3, 32, 32), (2, 15))
        levels = (transforms.normalize(crops / 255) - views) * torch.tensor(transforms.STD)[:, None, None]
        assert levels.abs().max() * 255 < 2.01


def test_pixels_and_image_give_the_same_crops(image):
    draw = transforms.two_crops(Augmentation(image_size=32))
    both = [draw(kind, np.random.default_rng(0)) for kind in (image, np.array(image))]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_parameters_say_what_was_drawn(draws):
    rows = transforms.parameters(*draws[:50]).numpy().view(transforms.ROW)[:, 0]
    for row, view in zip(rows, draws, strict=False):
        jitter = view.jitter or transforms.UNCHANGED
        assert (row["flip"], row["grayscale"]) == (view.flip, view.grayscale)
        assert row["jitter"] == (view.jitter is not None)
        assert tuple(row["order"]) == jitter.order
        numbers = [*row["factors"], row["hue"], row["sigma"], *row["lighting"]]
        assert numbers == pytest.approx([*jitter[:4], view.sigma, *view.lighting])


def _saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("usual.jpg", "RGB", {"quality": 90}),
        ("unsampled.jpg", "RGB", {"subsampling": "4:4:4"}),
        ("odd.jpg", "RGB", {"subsampling": "4:2:2", "quality": 30}),
        ("progressive.jpg", "RGB", {"progressive": True, "optimize": True}),
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("png in disguise.jpg", "RGBA", {"format": "PNG"}),
        ("palette.png", "P", {}),
    ],
)
def test_pixels_are_those_of_decode_to_the_bit(image, tmp_path, name, mode, options):
    path = _saved(tmp_path / name, image.resize((121, 87)).convert(mode), **options)
    assert np.array_equal(transforms.read_pixels(path), np.asarray(decode(path)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_upright_as_decode_turns_them(image, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _saved(tmp_path / "turned.jpg", image, exif=exif)
    assert np.array_equal(transforms.read_pixels(path), np.asarray(decode(path)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_pixels_of_an_image_with_damaged_exif_are_those_of_decode(image, tmp_path):
    path = _saved(tmp_path / "damaged.jpg", image, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert np.array_equal(transforms.read_pixels(path), np.asarray(decode(path)))


@pytest.mark.parametrize("damage", [lambda data: data[:-500], lambda data: data[:30], lambda data: b""])
def test_a_truncated_image_is_refused_as_decode_refuses_it(image, tmp_path, damage):
    path = _saved(tmp_path / "broken.jpg", image)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match=r"broken\.jpg: cannot be decoded"):
        transforms.read_pixels(path)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.jpg: no such image"):
        transforms.read_pixels(tmp_path / "gone.jpg")
