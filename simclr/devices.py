"""GPU or CPU: which of them this process computes on, how exactly, and how much memory it took."""

from __future__ import annotations

import os
import resource

import torch

from simclr import BadInput


def first() -> torch.device:
    """Return the first GPU where there is one, else the CPU; float32 is exact from now on.

    Raises `BadInput` as `refuse_cpu` does.
    """
    refuse_cpu()
    float32_as_published()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def refuse_cpu() -> None:
    """Raise `BadInput` where Slurm or a user gave GPUs, of which torch sees none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if given in ("", "-1", "NoDevFiles") or torch.cuda.is_available() or "SIMCLR_ALLOW_CPU" in os.environ:
        return
    build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    raise BadInput(
        f"expected the GPUs that CUDA_VISIBLE_DEVICES={given} names, found none: torch {torch.__version__} "
        f"{build}; mend the driver or the installation, or work on the CPU: `gpus: 0`, or SIMCLR_ALLOW_CPU=1"
    )


def float32_as_published() -> None:
    """Have this process compute float32 in full: by default, cuDNN takes TF32, of 10 bits, for it."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def in_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether a network computes in bfloat16: if its `precision` says so and the GPU has it."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16" and has_it


def peak_memory_gb() -> float:
    """Return the most memory that was in use: of this process's GPU, or of the CPU, all that was resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
