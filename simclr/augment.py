"""SimCLR's augmentation after the crop, for all views of a step at once, on the device that trains.

A loader's worker crops and draws (`simclr.transforms.two_crops`); `augment` then flips, jitters, greys, blurs
and normalises every view with parameters of its own. It is what PIL does to each view in
`simclr.transforms.two_views`, but for PIL's rounding to 8 bits after every change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from simclr.transforms import CONTRAST, HUE, MEAN, ROW, SATURATION, STD

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's "L"
# Bytes of float32 pixels worked on at a time: few enough for a CPU's caches, enough to fill a GPU.
CPU_CHUNK, GPU_CHUNK = 2**22, 2**26
BAND = 64  # rows of a block of the blur's matrix, which is zero but near its diagonal


@torch.no_grad()
def augment(crops: Tensor, parameters: Tensor) -> Tensor:
    """Return views `(N, 3, S, S)`, float32, normalised, in channels_last order.

    `crops`: `(N, 3, S, S)` uint8, on any device. `parameters`: `(N, 15)` float32, rows of `transforms.ROW`,
    on the CPU where they were drawn: what a view needs is decided there, so the device is never waited for.

    A view is a function of its own crop and parameters alone, to rounding (1e-5). float32 under autocast too.
    Memory besides the result: about six times `CPU_CHUNK` or `GPU_CHUNK`, whatever N.
    """
    size = crops.shape[-1]
    views = torch.empty(len(crops), size, size, 3, device=crops.device)
    p = parameters.float().contiguous().numpy().view(ROW)[:, 0]
    chunk = max((CPU_CHUNK if crops.device.type == "cpu" else GPU_CHUNK) // (12 * size**2), 1)
    order = np.argsort(-_blends_before_hue(p), kind="stable")
    with torch.autocast(crops.device.type, enabled=False):
        for start in range(0, len(order), chunk):
            chosen = order[start : start + chunk]
            rows = _send(chosen, crops.device)
            x = _views(crops.index_select(0, rows), p[chosen])
            views.index_copy_(0, rows, x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1))
    return views.permute(0, 3, 1, 2)


def _views(crops: Tensor, p: np.ndarray) -> Tensor:
    """Return the views of some crops, `(n, 3, S, S)`, whose parameters `p` are in `_jitter`'s order."""
    crops = _change(crops, p["flip"] > 0, lambda some, _: some.flip(-1))
    x = crops.float().mul_(1 / 255)
    x = _jitter(x, p)
    x = _change(x, p["grayscale"] > 0, lambda some, _: grayscale(some))
    x = _change(x, p["sigma"] > 0, lambda some, mask: blur(some, p["sigma"][mask]))
    std = np.float32(STD)
    shift = (p["lighting"] - np.float32(MEAN)) / std
    return torch.addcmul(_send(shift, x.device)[:, :, None, None], x, _send(1 / std, x.device)[:, None, None])


def _change(x: Tensor, mask: np.ndarray, change: Callable[[Tensor, np.ndarray], Tensor]) -> Tensor:
    """Return `x` with `change` made to the rows in `mask`; the others cost nothing."""
    if mask.all():
        return change(x, mask)
    if mask.any():
        rows = _send(np.flatnonzero(mask), x.device)
        x.index_copy_(0, rows, change(x.index_select(0, rows), mask))
    return x


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return `array` on `device`, without waiting for what the device is doing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---------------------------------------------------------------- colour


def _blends_before_hue(p: np.ndarray) -> np.ndarray:
    """Return how many of brightness, contrast and saturation come before hue: 0 … 3, or -1 without jitter."""
    before = (p["order"] == HUE).argmax(1)
    return np.where(p["jitter"] > 0, before, -1)


def _jitter(x: Tensor, p: np.ndarray) -> Tensor:
    """Change the colours of `x` `(n, 3, S, S)` in place, each row in an order of its own.

    The rows come sorted by `_blends_before_hue`, the most first, so that whatever is done at once is done to
    neighbours: hue to all together, the i-th blend to the first rows before it and to the others after.
    """
    before = _blends_before_hue(p)
    jittered = int((before >= 0).sum())
    order = p["order"][:jittered]
    blends = order[order != HUE].reshape(jittered, 3).astype(int)
    factors = np.take_along_axis(p["factors"][:jittered], blends, 1)
    firsts = [int((before > i).sum()) for i in range(3)]
    for i, first in enumerate(firsts):
        if first > 0:
            blend(x[:first], blends[:first, i], factors[:first, i])
    if p["hue"][:jittered].any():
        turn_hue(x[:jittered], p["hue"][:jittered])
    for i, first in enumerate(firsts):
        if first < jittered:
            blend(x[first:jittered], blends[first:, i], factors[first:, i])
    return x


def blend(x: Tensor, kinds: np.ndarray, factors: np.ndarray) -> None:
    """Change brightness, contrast or saturation of `x` `(n, 3, H, W)` in place, by a kind and factor per row.

    All three are clamp(f·x + (1 - f)·m, 0, 1): with m black, the mean luma of the row, or each pixel's luma.
    So f and m make a 3 × 3 matrix of the colours and, for contrast, a constant.
    """
    colours = x.view(len(x), 3, -1)
    matrix = factors[:, None, None] * np.eye(3, dtype=np.float32)
    matrix += np.where(kinds == SATURATION, 1 - factors, 0)[:, None, None] * np.float32(LUMA)
    constant = x.new_zeros(1)
    if (kinds == CONTRAST).any():
        rest = np.where(kinds == CONTRAST, 1 - factors, 0)[:, None] * np.float32(LUMA)
        constant = (colours.mean(2) * _send(rest, x.device)).sum(1)[:, None, None]
    torch.clamp(torch.baddbmm(constant, _send(matrix, x.device), colours), 0, 1, out=colours)


def turn_hue(x: Tensor, shifts: np.ndarray) -> None:
    """Turn the hue of `x` `(n, 3, H, W)` in [0, 1] in place by a share of the circle per row.

    HSV's value and saturation stay, that is, the greatest and least of a pixel's colours. With these as 1 and
    0, a colour is clamp(2 - 6·d, 0, 1) at a distance d of the pixel's hue from its own, in shares of the
    circle; so hue's distance from red is (1 + green + blue - red) / 6, on the side of the greater of the two.
    """
    red, green, blue = x.unbind(1)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(least)
    hue = (green + blue).sub_(red).sub_(least).div_(chroma.clamp_min(1e-12)).add_(1)
    hue.copysign_(green - blue).div_(6).add_(_send(shifts, x.device)[:, None, None])
    distance = hue[:, None] - torch.arange(3, device=x.device)[:, None, None] / 3
    distance.sub_(distance.round()).abs_()
    share = distance.mul_(-6).add_(2).clamp_(0, 1)
    torch.addcmul(least[:, None], share, chroma[:, None], out=x)


def grayscale(x: Tensor) -> Tensor:
    """Return the luma of `x` `(n, 3, H, W)` in all three channels."""
    red, green, blue = x.split(1, dim=1)
    return red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).expand_as(x).contiguous()


# ---------------------------------------------------------------- blur


def blur(x: Tensor, sigmas: np.ndarray) -> Tensor:
    """Return `x` `(n, 3, S, S)` after a Gaussian blur of `sigmas` `(n,)` pixels, mirrored at the edges.

    The kernel ends at 3 sigma, where PIL's, three box blurs, ends too, and holds 99.7 % of the Gaussian.
    Both directions are products with one matrix per row, whose entries far from the diagonal are zero.
    """
    size = x.shape[-1]
    radii = np.minimum(np.ceil(3 * sigmas), size - 1)
    reach = int(radii.max())
    distance = np.arange(reach + 1)
    taps = np.exp(-0.5 * (distance / sigmas[:, None]) ** 2) * (distance <= radii[:, None])
    taps = np.float32(taps / (2 * taps.sum(1, keepdims=True) - 1))
    matrix = (_send(taps, x.device) @ _layout(size, reach, x.device)).view(-1, size, size)
    bands = [
        (slice(start, start + BAND), slice(max(start - reach, 0), start + BAND + reach))
        for start in range(0, size, BAND)
    ]
    lines = x.reshape(len(x), 3 * size, size)
    across = torch.cat([lines[:, :, near] @ matrix[:, band, near].mT for band, near in bands], 2).view_as(x)
    return torch.cat([matrix[:, None, band, near] @ across[:, :, near] for band, near in bands], 2)


@lru_cache(maxsize=16)
def _layout(size: int, reach: int, device: torch.device) -> Tensor:
    """Return for each distance 0 … `reach` how often a pixel is that far from another, `(reach + 1, size²)`.

    Counted with the mirror images of pixels beyond both edges, which do not repeat the edge itself.
    """
    here, there = np.indices((size, size))
    offsets = [here - there, here + there, 2 * (size - 1) - here - there]
    offsets[1][there == 0] = offsets[2][there == size - 1] = size  # out of reach: the edge has no image
    counts = [sum(np.abs(offset) == d for offset in offsets) for d in range(reach + 1)]
    return _send(np.float32(counts).reshape(reach + 1, -1), device)
