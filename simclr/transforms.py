"""Images to tensors: the two views of SimCLR and the transforms of the evaluations, each defined once.

A transform takes a PIL RGB image and returns a float tensor `(3, H, W)`, normalised with ImageNet's mean and
standard deviation. Resizing is PIL's, which anti-aliases, as in all published numbers of MMSelfSup 0.x.
Transforms can be pickled, so a loader's workers may be started in any way.

What is random in a view is drawn first (`draw_view`), then carried out: by `two_views` with PIL as published,
or by `two_crops` in a loader's worker and `simclr.augment.augment` on the device. Same draws, same view.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from simclr.config import Augmentation
from simclr.datasets import ORIENTATION, decode
from simclr.paths import Member, encoded

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- evaluation


def center_crop(resize: int, crop: int) -> Callable[[Image.Image], Tensor]:
    """Short edge to `resize` pixels, then the central `crop` × `crop` pixels (MMSelfSup, knn_imagenet.py)."""
    return partial(_center_crop, resize, crop)


def _center_crop(resize: int, crop: int, image: Image.Image) -> Tensor:
    return normalize(to_tensor(crop_centre(resize_short_edge(image, resize), crop)))


def squash(resize: int, crop: int) -> Callable[[Image.Image], Tensor]:
    """Short edge to `resize` pixels, then both edges to `crop`: the aspect ratio is lost (svm_voc07.py)."""
    return partial(_squash, resize, crop)


def _squash(resize: int, crop: int, image: Image.Image) -> Tensor:
    image = resize_short_edge(image, resize).resize((crop, crop), Image.Resampling.BILINEAR)
    return normalize(to_tensor(image))


def resize_short_edge(image: Image.Image, size: int) -> Image.Image:
    """Return `image` with its short edge `size` pixels long and the other in proportion, rounded down."""
    short = min(image.size)
    width, height = (size if edge == short else size * edge // short for edge in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def crop_centre(image: Image.Image, size: int) -> Image.Image:
    """Return the central `size` × `size` pixels of `image`."""
    left, top = (round((edge - size) / 2) for edge in image.size)
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """Return a PIL RGB image as float tensor `(3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def normalize(image: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation; `image` is `(…, 3, H, W)` in [0, 1]."""
    mean, std = (torch.tensor(values, dtype=image.dtype, device=image.device) for values in (MEAN, STD))
    return (image - mean[:, None, None]) / std[:, None, None]


# ---------------------------------------------------------------- pretraining: what is random

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the changes that `Jitter.order` puts in order


class Jitter(NamedTuple):
    """The colour jitter of one view: three factors, a hue shift (share of the circle), and their order."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]


class View(NamedTuple):
    """All that is random in one view of an image."""

    box: tuple[int, int, int, int]  # left, top, width, height in pixels
    flip: bool = False
    jitter: Jitter | None = None
    grayscale: bool = False
    sigma: float = 0.0  # of the blur in pixels of the view; 0 is none
    lighting: tuple[float, ...] = (0.0, 0.0, 0.0)  # added to R, G, B in [0, 1] (the linear evaluations)


def draw_view(width: int, height: int, augmentation: Augmentation, rng: np.random.Generator) -> View:
    """Draw a SimCLR view of an image of `width` × `height` pixels.

    MMSelfSup v0.11.0, configs/selfsup/_base_/datasets/imagenet_simclr.py.
    """
    a = augmentation
    box = draw_crop(width, height, a.crop_area, a.crop_ratio, rng)
    flip = rng.random() < a.flip
    jittered = rng.random() < a.jitter
    jitter = draw_jitter(a.brightness, a.contrast, a.saturation, a.hue, rng) if jittered else None
    grayscale = rng.random() < a.grayscale
    sigma = rng.uniform(*a.blur_sigma) if rng.random() < a.blur else 0.0
    return View(box, flip, jitter, grayscale, sigma)


def draw_crop(
    width: int, height: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw left, top, width and height of a crop: a share of the area from `area`, uniformly, and an aspect
    ratio from `ratio`, log-uniformly. After ten that do not fit, the greatest central one within `ratio`.
    """
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def draw_jitter(
    brightness: float, contrast: float, saturation: float, hue: float, rng: np.random.Generator
) -> Jitter:
    """Draw brightness, contrast and saturation factors from 1 ± the argument, a hue shift, and an order."""
    factors = [rng.uniform(max(1 - spread, 0), 1 + spread) for spread in (brightness, contrast, saturation)]
    shift = rng.uniform(-hue, hue)
    return Jitter(*factors, shift, tuple(rng.permutation(4).tolist()))


# ---------------------------------------------------------------- pretraining: with PIL, as published


def two_views(augmentation: Augmentation) -> Callable[[Image.Image, np.random.Generator], Tensor]:
    """Return the transform of an image to two independently drawn SimCLR views, `(2, 3, H, W)`.

    Every random number comes from the generator that is handed in, so the views are a pure function of its
    seed.
    """
    return partial(_two_views, augmentation)


def _two_views(augmentation: Augmentation, image: Image.Image, rng: np.random.Generator) -> Tensor:
    draws = [draw_view(*image.size, augmentation, rng) for _ in range(2)]
    return normalize(torch.stack([to_tensor(render(image, view, augmentation.image_size)) for view in draws]))


def render(image: Image.Image, view: View, size: int) -> Image.Image:
    """Return `view` of `image`, `size` × `size`, before normalisation and lighting."""
    image = _resized_crop(image, view.box, size)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.jitter:
        image = _jittered(image, view.jitter)
    if view.grayscale:
        image = image.convert("L").convert("RGB")
    if view.sigma:
        # PIL's radius is the sigma; the paper's kernel of a tenth of the edge is slightly different.
        image = image.filter(ImageFilter.GaussianBlur(view.sigma))
    return image


def _resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """Crop, then resize, bilinear: PIL's `resize(box=…)` would look at pixels beyond the crop."""
    left, top, width, height = box
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BILINEAR)


def _jittered(image: Image.Image, jitter: Jitter) -> Image.Image:
    changes = {
        BRIGHTNESS: lambda image: ImageEnhance.Brightness(image).enhance(jitter.brightness),
        CONTRAST: lambda image: ImageEnhance.Contrast(image).enhance(jitter.contrast),
        SATURATION: lambda image: ImageEnhance.Color(image).enhance(jitter.saturation),
        HUE: lambda image: adjust_hue(image, jitter.hue),
    }
    for change in jitter.order:
        image = changes[change](image)
    return image


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by `shift`, a share of the circle, in PIL's HSV of 8 bits."""
    if shift == 0:
        return image  # through 8 bits of HSV it would not come back unchanged
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue) + np.int16(shift * 255)).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


# ---------------------------------------------------------------- pretraining: for the device


UNCHANGED = Jitter(1.0, 1.0, 1.0, 0.0, (BRIGHTNESS, CONTRAST, SATURATION, HUE))

# A view's parameters as a row of float32, in which flags (0 or 1) and order are exact.
ROW = np.dtype(
    [(name, np.float32) for name in ("flip", "jitter", "grayscale", "sigma")]
    + [("factors", np.float32, 3), ("hue", np.float32), ("order", np.float32, 4), ("lighting", np.float32, 3)]
)


def parameters(*views: View) -> Tensor:
    """Return what `simclr.augment.augment` needs to know of each view, `(len(views), 15)`, rows of `ROW`."""
    return torch.tensor([_row(view) for view in views], dtype=torch.float32)


def _row(view: View) -> list[float]:
    flags = (view.flip, view.jitter is not None, view.grayscale)
    *factors_and_hue, order = view.jitter or UNCHANGED
    return [*flags, view.sigma, *factors_and_hue, *order, *view.lighting]


def two_crops(
    augmentation: Augmentation,
) -> Callable[[Image.Image | np.ndarray, np.random.Generator], tuple[Tensor, Tensor]]:
    """Return the transform of an image to the crops of two SimCLR views and what is still to be done to them.

    The image is PIL's, RGB, or `(H, W, 3)` uint8 as `read_pixels` returns it. Crops: `(2, 3, S, S)` uint8;
    parameters: `(2, 15)` float32, two rows as `ROW` says. From the same generator `two_views` draws the same
    views.
    """
    return partial(_two_crops, augmentation)


def _two_crops(
    augmentation: Augmentation, image: Image.Image | np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    draws = [draw_view(width, height, augmentation, rng) for _ in range(2)]
    crops = torch.cat([resized_crop(pixels, view.box, augmentation.image_size) for view in draws])
    return crops, parameters(*draws)


def resized_crop(pixels: np.ndarray, box: tuple[int, int, int, int], size: int) -> Tensor:
    """Return `box` of `pixels` `(H, W, 3)`, resized, as `(1, 3, size, size)` uint8.

    PIL's crop and bilinear resize in a third of the time, a few pixels one or two levels off: torch's weights
    have 16 bits, PIL's 22.
    """
    left, top, width, height = box
    crop = torch.from_numpy(pixels[top : top + height, left : left + width].copy())
    return F.interpolate(crop.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)


def read_pixels(source: Path | Member) -> np.ndarray:
    """Return an image as `(H, W, 3)` uint8: what `datasets.decode` returns, sooner.

    OpenCV decodes a usual JPEG in three quarters of PIL's time, to the same bits. PIL decodes what is not
    usual: other formats and colour spaces, a picture to be turned, a file that ends too early. Raises
    `BadInput` as `decode` does, but for some damage in the middle of a JPEG, where OpenCV goes on and PIL
    gives up.
    """
    pixels = _usual_jpeg(encoded(source))
    return np.asarray(decode(source)) if pixels is None else pixels


def _usual_jpeg(data: bytes) -> np.ndarray | None:
    """Return the pixels of a whole, upright JPEG in RGB or grey, else none."""
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            usual = image.format == "JPEG" and image.mode in ("RGB", "L")
            usual = usual and image.getexif().get(ORIENTATION, 1) == 1
    except (OSError, SyntaxError, ValueError, struct.error):
        return None
    if not usual:
        return None
    import cv2  # a fifth of a second, that other transforms need not wait

    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)  # none for a truncated one, from 4.11 on
