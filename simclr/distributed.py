"""One process or many: who am I, and what the others hold. Every function also works in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, if it did; yield this process's device.

    The backend is nccl on GPUs, one GPU per process, and gloo on CPUs.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if launched:
            dist.destroy_process_group()


def rank() -> int:
    """Return this process's number among `world_size()`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(rows: Tensor) -> list[Tensor]:
    """Return the `rows` `(n, …)` of every rank, in rank order, without gradient; n may differ by rank."""
    if world_size() == 1:
        return [rows]
    length = torch.tensor([len(rows)], device=rows.device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    counts = [int(n) for n in lengths]
    # The backends gather equal shapes only.
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [part[:n] for part, n in zip(gathered, counts, strict=True)]


def total(x: Tensor) -> Tensor:
    """Return the sum of `x` over ranks, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true on any rank."""
    return flag if world_size() == 1 else bool(total(torch.tensor(float(flag), device=device)) > 0)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def sync_batchnorm(module: nn.Module) -> nn.Module:
    """Return `module` with every BatchNorm replaced by one whose batch statistics are those of all ranks.

    On GPUs it is torch's, which runs nowhere else.
    """
    if any(p.is_cuda for p in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.__class__ = CPUSyncBatchNorm
        else:
            setattr(module, name, sync_batchnorm(child))
    return module


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over all ranks, for gloo."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1, *([1] * (x.ndim - 2))]
        count = total(torch.tensor(float(x.numel() // x.shape[1])))
        mean = _Sum.apply(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        return normal * self.weight.view(shape) + self.bias.view(shape) if self.affine else normal


class _Sum(torch.autograd.Function):
    """The sum over ranks; so the gradient, too, is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)
