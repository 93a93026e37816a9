"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, equation 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr import distributed

TILE = 2048  # columns of the similarity matrix that exist at one time


def nt_xent(z0: Tensor, z1: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the mean NT-Xent over the 2N rows of all ranks: a scalar, the same on every rank.

    `z0`, `z1` `(n, D)` are the projections of two views of this rank's n images; n may differ between ranks
    and rows need not be normalised. Every row is classified against the other 2N − 1: its positive is the
    other view of its image. Computed in float32 (float64 if given), also under autocast.

    The gradient is scaled so that its *average* over ranks, which is what DistributedDataParallel takes,
    equals the gradient of one process that holds all images. (The published code of MMSelfSup applied
    1/world_size of it: `gradient_divisor` of a recipe.)
    """
    if z0.shape != z1.shape or z0.ndim != 2:
        raise ValueError(
            f"expected two (n, D) projections of one shape, found {tuple(z0.shape)}, {tuple(z1.shape)}"
        )
    with torch.autocast(z0.device.type, enabled=False):
        z = torch.cat([z0, z1])
        z = z if z.dtype == torch.float64 else z.float()
        return _NTXent.apply(F.normalize(z, eps=1e-10), temperature)


class _NTXent(torch.autograd.Function):
    """NT-Xent of unit rows; tiles of the 2N × 2N matrix are made, reduced and, for the gradient, remade.

    With s_ij = z_i·z_j / T and p_ij = exp(s_ij) / Σ_{k≠i} exp(s_ik), the loss of row i is
    log Σ_{k≠i} exp(s_ik) − s_i,pos(i), and the gradient with respect to z_i is
    (Σ_{j≠i} (p_ij + p_ji) z_j − 2 z_pos(i)) / (2N T).
    So a rank needs all rows and their log-sums, never the gradients of the others. Memory is linear in N.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        parts = distributed.gather(z)
        everyone = torch.cat(parts)
        ctx.temperature, ctx.first = temperature, sum(len(part) for part in parts[: distributed.rank()])
        log_sum = torch.full_like(z[:, 0], -torch.inf)
        for _, s in _tiles(z, everyone, temperature, ctx.first):
            log_sum = torch.logaddexp(log_sum, s.logsumexp(1))
        ctx.save_for_backward(z, everyone, log_sum, torch.cat(distributed.gather(log_sum)))
        positive = (z * _other_view(z)).sum(1) / temperature
        return distributed.total((log_sum - positive).sum()) / len(everyone)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        z, everyone, log_sum, log_sums = ctx.saved_tensors
        gradient = -2 * _other_view(z)
        for columns, s in _tiles(z, everyone, ctx.temperature, ctx.first):
            p = (s - log_sum[:, None]).exp_() + s.sub_(log_sums[columns]).exp_()
            gradient.addmm_(p, everyone[columns])
        scale = distributed.world_size() / (len(everyone) * ctx.temperature)
        return gradient.mul_(scale * upstream), None


def _other_view(z: Tensor) -> Tensor:
    return z.roll(len(z) // 2, 0)


def _tiles(z: Tensor, everyone: Tensor, temperature: float, first: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield columns and values of the tiles of z·everyoneᵀ/T; row i of `z` is row `first + i` of all."""
    for start in range(0, len(everyone), TILE):
        columns = slice(start, start + TILE)
        s = (z @ everyone[columns].T).div_(temperature)
        s.diagonal(first - start).fill_(-torch.inf)
        yield columns, s
