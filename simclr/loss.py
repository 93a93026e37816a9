"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, equation 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr import distributed

# Similarities that exist at one time: 16 MiB of float32. Between the product and the exponential they stay in
# a CPU's last cache. (On a GPU the size has not been tuned.)
TILE = 2**22
STRIPS = 8  # at least, so that a small batch, too, gains from symmetry and never has its whole matrix


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
    """NT-Xent of unit rows; strips of the 2N × 2N matrix are made, reduced and, for the gradient, remade.

    With s_ij = z_i·z_j / T and ℓ_i = log Σ_{k≠i} exp(s_ik), the loss of row i is ℓ_i − s_i,pos(i), and the
    gradient with respect to z_i is (Σ_{j≠i} p_ij z_j − 2 z_pos(i)) / (2N T), where
    p_ij = exp(s_ij − ℓ_i) + exp(s_ij − ℓ_j). So a rank needs all rows and their ℓ, never the gradients of the
    others, and memory is linear in N. Both s and p are symmetric: among its own rows a rank makes only what
    lies right of the diagonal, and uses it twice.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        everyone = _gather_after(z)
        log_sum = torch.full_like(z[:, 0], -torch.inf)
        for rows, below, s, mirrored in _strips(z, everyone, temperature):
            across, down = _log_sums(s, mirrored, temperature)
            log_sum[rows] = torch.logaddexp(log_sum[rows], across)
            log_sum[below] = torch.logaddexp(log_sum[below], down)
        ctx.temperature = temperature
        ctx.save_for_backward(z, everyone, _gather_after(log_sum))
        positive = (z * _other_view(z)).sum(1) / temperature
        return distributed.total((log_sum - positive).sum()) / len(everyone)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        z, everyone, log_sums = ctx.saved_tensors
        gradient = -2 * _other_view(z)
        for rows, below, s, mirrored in _strips(z, everyone, ctx.temperature):
            # p_ij = exp(s_ij + log(exp(−ℓ_i) + exp(−ℓ_j))): one exponential, which no temperature overflows.
            s.add_(torch.logaddexp(-log_sums[rows, None], -log_sums[rows.start :])).exp_()
            gradient[rows].addmm_(s, everyone[rows.start :])
            gradient[below].addmm_(mirrored.T, z[rows])
        scale = distributed.world_size() / (len(everyone) * ctx.temperature)
        return gradient.mul_(scale * upstream), None


def _other_view(z: Tensor) -> Tensor:
    return z.roll(len(z) // 2, 0)


def _gather_after(mine: Tensor) -> Tensor:
    """Return the rows of all ranks, this one's first."""
    parts, rank = distributed.gather(mine), distributed.rank()
    return torch.cat([mine, *parts[:rank], *parts[rank + 1 :]]) if len(parts) > 1 else mine


def _strips(z: Tensor, everyone: Tensor, temperature: float) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield s = z·everyoneᵀ/T from its diagonal to the right, strip by strip, in one place in memory.

    A strip is: its rows; the rows of `z` below them; s of these rows and every column from the first of them
    on; and the part of it whose columns are the rows below. −∞ is on the diagonal. `z` begins `everyone`.
    """
    n, columns = len(z), len(everyone)
    height = max(min(TILE // columns, n // STRIPS), 1)
    memory = z.new_empty(height * columns)
    scaled = z / temperature
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        here, width = rows.stop - start, columns - start
        s = torch.mm(scaled[rows], everyone[start:].T, out=memory[: here * width].view(here, width))
        s.diagonal().fill_(-torch.inf)
        yield rows, slice(rows.stop, n), s, s[:, here : n - start]


def _log_sums(s: Tensor, mirrored: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log Σ exp of the rows of `s` and of the columns of its part `mirrored`; `s` is used up."""
    if temperature < 1 / 64:
        return s.logsumexp(1), mirrored.logsumexp(0)
    # |s| ≤ 1/T, and in float32 exp(±64), even summed, is far from overflow and from 0: no maximum is needed.
    s.exp_()
    return s.sum(1).log_(), mirrored.sum(0).log_()
