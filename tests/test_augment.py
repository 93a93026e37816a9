from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional as TF

from simclr import augment as module
from simclr import transforms
from simclr.augment import augment, blend, blur, grayscale, turn_hue
from simclr.config import Augmentation
from simclr.transforms import BRIGHTNESS, CONTRAST, HUE, SATURATION, Jitter, View, draw_view, parameters

BOX = (0, 0, 40, 40)
# What float32 loses in one operation, and in all of them with factors of up to 1.8 between.
ONE, ALL = 2e-6, 1e-5
STD_LEVELS = torch.tensor(transforms.STD)[:, None, None] * 255  # of a normalised view, per level of 8 bits


@pytest.fixture
def theirs_luma(monkeypatch):
    """torchvision's weight of red, 0.2989, stands in for ITU-R 601's and PIL's 0.299, to compare the rest."""
    monkeypatch.setattr(module, "LUMA", (0.2989, 0.587, 0.114))


@pytest.fixture(scope="module")
def photos():
    return [Image.fromarray(photo).resize((250, 187)) for photo in load_sample_images().images]


def _colours(n=8, size=40):
    """Noise, with greys, blacks, saturated colours and equal channels among it, `(n, 3, size, size)`."""
    x = torch.from_numpy(np.random.default_rng(0).random((max(n, 6), 3, size, size), np.float32))
    x[0] = 0.3
    x[1, :, :9] = 0
    x[2, 0], x[3, 1] = 1, 0
    x[4, 1], x[5, 2] = x[4, 2], x[5, 0]
    return x[:n]


def _crops(n, size=40):
    return _colours(n, size).mul(255).round().to(torch.uint8)


def _draws(n, **settings):
    rng = np.random.default_rng(1)
    return [draw_view(500, 375, Augmentation(image_size=40, **settings), rng) for _ in range(n)]


def _with_torchvision(crop, view):
    """The view of one crop, operation by operation on floats."""
    changes = {
        BRIGHTNESS: lambda x: TF.adjust_brightness(x, view.jitter.brightness),
        CONTRAST: lambda x: TF.adjust_contrast(x, view.jitter.contrast),
        SATURATION: lambda x: TF.adjust_saturation(x, view.jitter.saturation),
        HUE: lambda x: TF.adjust_hue(x, view.jitter.hue),
    }
    x = TF.to_dtype(crop, torch.float32, scale=True)
    x = TF.horizontal_flip(x) if view.flip else x
    for change in view.jitter.order if view.jitter else ():
        x = changes[change](x)
    x = TF.rgb_to_grayscale(x, 3) if view.grayscale else x
    if view.sigma:
        x = TF.gaussian_blur(x, 2 * int(np.ceil(3 * view.sigma)) + 1, view.sigma)
    return TF.normalize(x + torch.tensor(view.lighting)[:, None, None], transforms.MEAN, transforms.STD)


def _close(found, expected, atol):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# ---------------------------------------------------------------- one operation


@pytest.mark.usefixtures("theirs_luma")
@pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.8])
@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (BRIGHTNESS, TF.adjust_brightness),
        (CONTRAST, TF.adjust_contrast),
        (SATURATION, TF.adjust_saturation),
    ],
)
def test_a_blend_is_torchvisions(kind, theirs, factor):
    x = _colours()
    expected = theirs(x, factor)
    blend(x, np.full(len(x), kind), np.full(len(x), factor, np.float32))
    _close(x, expected, ONE)


@pytest.mark.usefixtures("theirs_luma")
def test_blends_of_several_kinds_do_not_mix():
    x, kinds = _colours(6), np.array([BRIGHTNESS, CONTRAST, SATURATION] * 2)
    factors = np.linspace(0.3, 1.7, 6).astype(np.float32)
    theirs = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation] * 2
    expected = [change(one, float(factor)) for change, one, factor in zip(theirs, x, factors, strict=True)]
    expected = torch.stack(expected)
    blend(x, kinds, factors)
    _close(x, expected, ONE)


@pytest.mark.parametrize("shift", [-0.5, -0.2, -0.01, 0.0, 0.13, 0.4, 0.5])
def test_hue_is_torchvisions(shift):
    x = _colours()
    expected = TF.adjust_hue(x, shift)
    turn_hue(x, np.full(len(x), shift, np.float32))
    _close(x, expected, ONE)


def test_hue_of_every_colour_of_a_coarse_cube_is_torchvisions():
    """Corners, edges and ties of the cube, where the greatest or least channel changes."""
    levels = torch.linspace(0, 1, 9)
    x = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 27, 27).contiguous()
    for shift in (-0.31, 1 / 6, 1 / 3, 0.5):
        turned = x.clone()
        turn_hue(turned, np.float32([shift]))
        _close(turned, TF.adjust_hue(x, shift), ONE)


@pytest.mark.usefixtures("theirs_luma")
def test_grayscale_is_torchvisions():
    x = _colours()
    _close(grayscale(x), TF.rgb_to_grayscale(x, 3), ONE)


def test_luma_is_pils():
    """And so within 1e-4 of torchvision's, whose weights add up to 0.9999."""
    crops = _crops(8)
    ours = grayscale(crops / 255)[:, 0] * 255
    theirs = [np.asarray(Image.fromarray(crop.permute(1, 2, 0).numpy()).convert("L")) for crop in crops]
    assert (
        ours - torch.from_numpy(np.stack(theirs))
    ).abs().max() < 0.502  # PIL rounds, and to 16 bits before


@pytest.mark.parametrize("size", [16, 40, 65, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.34, 1.0, 2.0, 4.9])
def test_blur_is_torchvisions(size, sigma):
    x, radius = _colours(3, size), int(np.ceil(3 * sigma))
    expected = TF.gaussian_blur(x, 2 * radius + 1, sigma)
    _close(blur(x, np.full(3, sigma, np.float32)), expected, 2 * ONE)


def test_each_row_is_blurred_with_its_own_sigma():
    x, sigmas = _colours(4), np.float32([0.2, 2.0, 0.9, 1.4])
    expected = [
        TF.gaussian_blur(one, 2 * int(np.ceil(3 * s)) + 1, float(s)) for one, s in zip(x, sigmas, strict=True)
    ]
    _close(blur(x, sigmas), torch.stack(expected), ONE)


def test_a_blur_wider_than_the_image_keeps_its_mean_brightness():
    x = torch.full((1, 3, 16, 16), 0.7)
    _close(blur(x, np.float32([20.0])), x, ONE)


def test_three_sigma_are_what_pils_blur_reaches():
    dot = np.zeros((65, 65, 3), np.uint8)
    dot[32, 32] = 255
    for sigma in (1.0, 2.0):
        theirs = np.asarray(Image.fromarray(dot).filter(ImageFilter.GaussianBlur(sigma)))[32, :, 0]
        ours = blur(torch.from_numpy(dot).permute(2, 0, 1)[None] / 255, np.float32([sigma]))[0, 0, 32] * 255
        assert np.abs(theirs - ours.numpy()).max() < 2.1
        assert np.abs(np.flatnonzero(theirs) - 32).max() <= np.ceil(3 * sigma)


# ---------------------------------------------------------------- whole views


@pytest.mark.usefixtures("theirs_luma")
def test_the_24_orders_of_the_jitter_are_torchvisions():
    rng, crops = np.random.default_rng(0), _crops(24)
    orders = itertools.permutations(range(4))
    views = [
        View(BOX, jitter=Jitter(*rng.uniform(0.2, 1.8, 3), rng.uniform(-0.2, 0.2), order)) for order in orders
    ]
    expected = torch.stack([_with_torchvision(*pair) for pair in zip(crops, views, strict=True)])
    _close(augment(crops, parameters(*views)), expected, ALL / min(transforms.STD))


@pytest.mark.usefixtures("theirs_luma")
@pytest.mark.parametrize("settings", [{}, {"blur": 0, "flip": 0, "hue": 0.5, "grayscale": 0.8}, {"hue": 0}])
def test_views_are_torchvisions(settings):
    crops, views = _crops(60), _draws(60, **settings)
    expected = torch.stack([_with_torchvision(*pair) for pair in zip(crops, views, strict=True)])
    _close(augment(crops, parameters(*views)), expected, ALL / min(transforms.STD))


@pytest.mark.usefixtures("theirs_luma")
def test_flip_jitter_and_lighting_of_the_linear_evaluations():
    rng, crops = np.random.default_rng(3), _crops(12)
    views = [
        View(
            BOX,
            flip=bool(i % 2),
            jitter=transforms.draw_jitter(0.4, 0.4, 0.4, 0, rng),
            lighting=tuple(rng.normal(0, 0.05, 3)),
        )
        for i in range(12)
    ]
    expected = torch.stack([_with_torchvision(*pair) for pair in zip(crops, views, strict=True)])
    _close(augment(crops, parameters(*views)), expected.float(), ALL / min(transforms.STD))


def test_nothing_drawn_nothing_changed():
    crops = _crops(5)
    _close(
        augment(crops, parameters(*[View(BOX)] * 5)),
        transforms.normalize(crops / 255),
        ONE / min(transforms.STD),
    )


ALONE = {"flip": 0, "jitter": 0, "grayscale": 0, "blur": 0}
JITTER = {**ALONE, "jitter": 1, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


@pytest.mark.parametrize(
    ("settings", "mean", "greatest"),
    [
        pytest.param({**ALONE, "flip": 0.5}, 0.1, 2.01, id="crop and flip"),
        pytest.param({**JITTER, "brightness": 0.8}, 0.6, 4, id="brightness"),
        pytest.param({**JITTER, "contrast": 0.8}, 0.6, 4, id="contrast"),
        pytest.param({**JITTER, "saturation": 0.8}, 0.6, 4, id="saturation"),
        pytest.param({**JITTER, "hue": 0.2}, 0.6, 13, id="hue"),
        pytest.param({**ALONE, "grayscale": 1}, 0.3, 2.01, id="grayscale"),
        pytest.param({**ALONE, "blur": 1}, 0.6, 45, id="blur"),
        pytest.param({}, 1.3, 60, id="all"),
        pytest.param({"hue": 0.5, "grayscale": 0.8, "blur": 0, "flip": 0}, 1.3, 60, id="miniature"),
    ],
)
def test_views_are_pils_but_for_its_rounding(photos, settings, mean, greatest):
    """The same draws by both pipelines: mean and greatest difference in levels of 8 bits.

    PIL rounds to 8 bits after each change. After a blend it rounds down: half a level darker on average, for
    each of three. It rounds hue down to one of 256, and the shift as well: two steps, which are 12 levels of
    a saturated colour. A brightness, contrast and saturation of 1.8 afterwards make 5.8 times as much of it.
    PIL's blur repeats the outermost pixel, where torchvision and we mirror, and its boxes are wider than a
    sampled Gaussian of sigma below 0.5: up to 36 levels at the edge, 14 inside.
    """
    config = Augmentation(image_size=96, **settings)
    reference, crops = transforms.two_views(config), transforms.two_crops(config)
    theirs = torch.cat([reference(photos[i % 2], np.random.default_rng(i)) for i in range(40)])
    parts = [crops(photos[i % 2], np.random.default_rng(i)) for i in range(40)]
    ours = augment(*(torch.cat(part) for part in zip(*parts, strict=True)))
    levels = ((ours - theirs) * STD_LEVELS).abs()
    assert levels.mean() < mean
    assert levels.mean((1, 2, 3)).max() < 2.5 * mean
    assert levels.max() < greatest


# ---------------------------------------------------------------- guarantees


def test_a_view_does_not_depend_on_its_batch():
    crops, rows = _crops(40), parameters(*_draws(40))
    together = augment(crops, rows)
    _close(torch.cat([augment(crops[i : i + 1], rows[i : i + 1]) for i in range(40)]), together, ALL)
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(40))
    _close(augment(crops[shuffled], rows[shuffled]), together[shuffled], ALL)


def test_a_view_does_not_depend_on_what_is_worked_on_at_a_time(monkeypatch):
    crops, rows = _crops(23), parameters(*_draws(23))
    together = augment(crops, rows)
    monkeypatch.setattr(module, "CPU_CHUNK", 5 * 12 * 40 * 40)
    _close(augment(crops, rows), together, ALL)


def test_the_same_batch_gives_the_same_bits_and_is_left_as_it_was():
    crops, rows = _crops(30), parameters(*_draws(30))
    before = crops.clone(), rows.clone()
    assert torch.equal(augment(crops, rows), augment(crops, rows))
    assert torch.equal(crops, before[0])
    assert torch.equal(rows, before[1])


def test_views_are_channels_last_and_float32_under_autocast():
    crops, rows = _crops(9), parameters(*_draws(9))
    views = augment(crops, rows)
    assert views.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        under = augment(crops, rows)
    assert under.dtype == torch.float32
    assert torch.equal(under, views)


def test_no_pixel_is_waited_for(monkeypatch):
    """A tensor on the meta device has no values: whatever asks for one, as nonzero or item does, fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not known to meta
    crops, rows = _crops(20), parameters(*_draws(20))
    assert augment(crops.to("meta"), rows).shape == crops.shape


@pytest.mark.gpu
def test_a_gpu_gives_the_same_views_and_is_not_waited_for():
    crops, rows = _crops(200), parameters(*_draws(200))
    on_gpu = crops.cuda()
    augment(on_gpu, rows)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = augment(on_gpu, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _close(views.cpu(), augment(crops, rows), 10 * ALL)


def test_what_no_view_needs_is_not_computed(monkeypatch):
    def fail(*_):
        raise AssertionError("computed for nothing")

    for name in ("blend", "turn_hue", "grayscale", "blur"):
        monkeypatch.setattr(module, name, fail)
    views = _draws(8, jitter=0, grayscale=0, blur=0)
    assert augment(_crops(8), parameters(*views)).isfinite().all()


def test_grey_views_of_which_only_some_are_blurred(tmp_path):
    """All rows of a chunk are grey, so that none is copied; the blur then writes into them."""
    from simclr.augment import augment
    from simclr.transforms import View, parameters

    crops = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    views = [View((0, 0, 32, 32), grayscale=True, sigma=sigma) for sigma in (0.0, 1.5, 0.0)]
    together = augment(crops, parameters(*views))
    for i, view in enumerate(views):
        alone = augment(crops[i : i + 1], parameters(view))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
