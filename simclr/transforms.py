"""Images to tensors: the two views of SimCLR and the transforms of the evaluations, each defined once.

A transform takes a PIL RGB image and returns a float tensor `(3, H, W)`, normalised with ImageNet's mean and
standard deviation. Resizing is PIL's, which anti-aliases, as in all published numbers of MMSelfSup 0.x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def center_crop(resize: int, crop: int) -> Callable[[Image.Image], Tensor]:
    """Short edge to `resize` pixels, then the central `crop` × `crop` pixels (MMSelfSup, knn_imagenet.py)."""

    def transform(image: Image.Image) -> Tensor:
        return normalize(to_tensor(TF.center_crop(TF.resize(image, [resize]), [crop])))

    return transform


def squash(resize: int, crop: int) -> Callable[[Image.Image], Tensor]:
    """Short edge to `resize` pixels, then both edges to `crop`: the aspect ratio is lost (svm_voc07.py)."""

    def transform(image: Image.Image) -> Tensor:
        return normalize(to_tensor(TF.resize(TF.resize(image, [resize]), [crop, crop])))

    return transform


def to_tensor(image: Image.Image) -> Tensor:
    """Return a PIL RGB image as float tensor `(3, H, W)` in [0, 1]."""
    return TF.pil_to_tensor(image).float().div_(255)


def normalize(image: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation; `image` is `(…, 3, H, W)` in [0, 1]."""
    mean, std = (torch.tensor(values, dtype=image.dtype, device=image.device) for values in (MEAN, STD))
    return (image - mean[:, None, None]) / std[:, None, None]
