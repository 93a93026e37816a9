"""One process or many: who am I, and what the others hold. Every function also works in a single process."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr import BadInput, devices


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that `torchrun` or `srun` started, if one did; yield this process's device.

    With `srun`, give `--kill-on-bad-exit=1`, which ends the others when one fails; `torchrun` does so itself.

    The backend is nccl on GPUs, one GPU per process, and gloo on CPUs. Raises `BadInput` when torch sees none
    of the GPUs that this process was given, when the port on which they meet is in use, and in the processes
    that are left when another has ended.
    """
    adopt_slurm_step()
    devices.refuse_cpu()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        device = torch.device("cuda", local_gpu(*local, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if launched:
        join("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except RuntimeError as error:
        if launched and re.search("Connection (closed|reset) by peer", str(error)):
            raise BadInput(
                f"process {rank()} of {world_size()} stops, because another one has ended; what that one "
                "said stands in the same log"
            ) from error
        raise
    except SystemExit:  # of all processes together
        leave()
        raise
    # After any other exception this process ends as it is: to take leave, it would wait for the others.
    leave()


def local_gpu(local_rank: int, processes: int, visible: int) -> int:
    """Return which of the `visible` GPUs is this process's; raises `BadInput` when it would share one.

    `processes` are those that see the same GPUs: those of `torchrun` on this node. A task of `srun` counts
    alone, as Slurm may have given it a GPU of its own, which is then the only one that it sees.
    """
    if processes > visible or (visible > 1 and local_rank >= visible):
        raise BadInput(
            f"expected a GPU for each process of this node, found process {local_rank} (from 0) and "
            f"{visible} GPUs; start as many processes per node as it has GPUs"
        )
    return local_rank % visible


def leave() -> None:
    """Take leave of the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_device(x: Tensor) -> Tensor:
    """Return `x` on the device whose tensors the processes exchange."""
    return x.cuda() if dist.is_initialized() and dist.get_backend() == "nccl" else x


def from_first(tensors: Iterable[Tensor]) -> None:
    """Set the tensors to those of the first rank."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def adopt_slurm_step() -> None:
    """Where `srun` started a task per process, without `torchrun`, set the variables that torch reads.

    They meet at the step's first node, on a port that follows from the job's number.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "RANK" in os.environ:
        return
    nodes = os.environ["SLURM_STEP_NODELIST"]
    if "[" in nodes or "," in nodes:
        command = ["scontrol", "show", "hostnames", nodes]
        nodes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": "1",  # Slurm binds each task to cores of its own
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", nodes),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000)),
    }


def join(backend: str) -> None:
    """Make the process group; raises `BadInput` when the port on which the processes meet is in use."""
    try:
        dist.init_process_group(backend)
    except dist.DistNetworkError as error:
        place = ":".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT"))
        raise BadInput(
            f"{place}, where the processes meet: {str(error).splitlines()[0]}; set MASTER_PORT to a port "
            "that is free on that machine, or start with `torchrun --standalone`"
        ) from error


def rank() -> int:
    """Return this process's number among `world_size()`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def of_all_ranks(number: int) -> list[int]:
    """Return the number that each rank has, in rank order."""
    return torch.cat(gather(on_device(torch.tensor([number])))).tolist()


def gather(rows: Tensor) -> list[Tensor]:
    """Return the `rows` `(n, …)` of every rank, in rank order, without gradient; n may differ by rank."""
    if world_size() == 1:
        return [rows]
    length = torch.tensor([len(rows)], device=rows.device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    counts = torch.cat(lengths).tolist()
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
