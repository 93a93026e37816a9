"""One process or many: who am I, and what the others hold. Every function also works in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


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
