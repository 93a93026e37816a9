"""Loaders of images: how many processes decode them, in what pieces, and how these processes end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

CPU_THREADS = torch.get_num_threads()  # of this job, before they are divided


def cores() -> int:
    """Return the cores of this process: its share of those of the job on this machine."""
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def divide_cores(device: torch.device) -> int:
    """Return how many processes make views; on the CPU, which also trains, half of the job's cores."""
    if device.type == "cuda":
        return min(max(cores() - 1, 1), 16)
    workers = max(CPU_THREADS // 2, 1)
    torch.set_num_threads(max(CPU_THREADS - workers, 1))
    return workers


def workers(number: int) -> dict[str, Any]:
    """Return what makes a loader's workers: forked, to share what is in memory, and deaf to signals."""
    context = "fork" if number else None
    return {"num_workers": number, "multiprocessing_context": context, "worker_init_fn": ignore_signals}


def ignore_signals(*_: Any, **__: Any) -> None:
    """Let a worker leave it to the trainer what a signal means, which a cluster sends to the whole job."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def ending(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """Yield an iterator over `loader`, whose workers have ended when the block has, whatever ended it."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        end_workers(iterator)


def end_workers(iterator: Any) -> None:
    """End the workers of a loader's iterator, where it has any.

    At the interpreter's end multiprocessing would send them SIGTERM, which they ignore, and wait for ever.
    """
    if hasattr(iterator, "_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()


def pieces(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut `items` into pieces of `size`; the last one may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]
