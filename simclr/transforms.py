"""Images to tensors: the two views of SimCLR and the transforms of the evaluations, each defined once.

A transform takes a PIL RGB image and returns a float tensor `(3, H, W)`, normalised with ImageNet's mean and
standard deviation. Resizing is PIL's, which anti-aliases, as in all published numbers of MMSelfSup 0.x.
Transforms can be pickled, so a loader's workers may be started in any way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from simclr.config import Augmentation

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


# ---------------------------------------------------------------- pretraining


def two_views(augmentation: Augmentation) -> Callable[[Image.Image, np.random.Generator], Tensor]:
    """Return the transform of an image to two independently drawn SimCLR views, `(2, 3, H, W)`.

    Every random number comes from the generator that is handed in, so the views are a pure function of its
    seed.
    """
    return partial(_two_views, augmentation)


def _two_views(augmentation: Augmentation, image: Image.Image, rng: np.random.Generator) -> Tensor:
    return normalize(torch.stack([to_tensor(view(image, augmentation, rng)) for _ in range(2)]))


def view(image: Image.Image, augmentation: Augmentation, rng: np.random.Generator) -> Image.Image:
    """Draw one SimCLR view (MMSelfSup v0.11.0, configs/selfsup/_base_/datasets/imagenet_simclr.py)."""
    a = augmentation
    image = random_resized_crop(image, a.image_size, a.crop_area, a.crop_ratio, rng)
    if rng.random() < a.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < a.jitter:
        image = color_jitter(image, a.brightness, a.contrast, a.saturation, a.hue, rng)
    if rng.random() < a.grayscale:
        image = image.convert("L").convert("RGB")
    if rng.random() < a.blur:
        # PIL's radius is the sigma; the paper's kernel of a tenth of the edge is slightly different.
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*a.blur_sigma)))
    return image


def random_resized_crop(
    image: Image.Image,
    size: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Image.Image:
    """Crop a share of the area, drawn from `area`, in an aspect ratio drawn log-uniformly from `ratio`.

    After ten crops that do not fit, the greatest central one within `ratio`. Resized to `size` × `size`,
    bilinear. Crop before resizing: PIL's `resize(box=…)` would look at pixels beyond the crop.
    """
    left, top, width, height = _crop_box(image.width, image.height, area, ratio, rng)
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BILINEAR)


def _crop_box(
    width: int, height: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def color_jitter(
    image: Image.Image,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    rng: np.random.Generator,
) -> Image.Image:
    """Change brightness, contrast, saturation (factors from 1 ± the argument) and hue, in random order."""
    factors = [rng.uniform(max(1 - spread, 0), 1 + spread) for spread in (brightness, contrast, saturation)]
    shift = rng.uniform(-hue, hue)
    changes = [
        lambda image: ImageEnhance.Brightness(image).enhance(factors[0]),
        lambda image: ImageEnhance.Contrast(image).enhance(factors[1]),
        lambda image: ImageEnhance.Color(image).enhance(factors[2]),
        lambda image: adjust_hue(image, shift),
    ]
    for i in rng.permutation(4):
        image = changes[i](image)
    return image


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by `shift`, a share of the circle, in PIL's HSV of 8 bits."""
    if shift == 0:
        return image  # through 8 bits of HSV it would not come back unchanged
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue) + np.int16(shift * 255)).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
