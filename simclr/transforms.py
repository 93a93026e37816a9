"""Images to tensors: the two views of SimCLR and the transforms of the evaluations, each defined once.

A transform takes a PIL RGB image and returns a float tensor `(3, H, W)`, normalised with ImageNet's mean and
standard deviation. Resizing is PIL's, which anti-aliases, as in all published numbers of MMSelfSup 0.x.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def center_crop(resize: int, crop: int) -> Callable[[Image.Image], Tensor]:
    """Short edge to `resize` pixels, then the central `crop` × `crop` pixels (MMSelfSup, knn_imagenet.py)."""

    def transform(image: Image.Image) -> Tensor:
        return normalize(to_tensor(_crop_centre(_resize_short_edge(image, resize), crop)))

    return transform


def squash(resize: int, crop: int) -> Callable[[Image.Image], Tensor]:
    """Short edge to `resize` pixels, then both edges to `crop`: the aspect ratio is lost (svm_voc07.py)."""

    def transform(image: Image.Image) -> Tensor:
        image = _resize_short_edge(image, resize).resize((crop, crop), Image.Resampling.BILINEAR)
        return normalize(to_tensor(image))

    return transform


def _resize_short_edge(image: Image.Image, size: int) -> Image.Image:
    """Return `image` with its short edge `size` pixels long and the other in proportion, rounded down."""
    short = min(image.size)
    width, height = (size if edge == short else size * edge // short for edge in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _crop_centre(image: Image.Image, size: int) -> Image.Image:
    left, top = (round((edge - size) / 2) for edge in image.size)
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """Return a PIL RGB image as float tensor `(3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)


def normalize(image: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation; `image` is `(…, 3, H, W)` in [0, 1]."""
    mean, std = (torch.tensor(values, dtype=image.dtype, device=image.device) for values in (MEAN, STD))
    return (image - mean[:, None, None]) / std[:, None, None]
