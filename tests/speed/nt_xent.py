"""NT-Xent beside the full matrix, lightly's and solo-learn's: time, memory and parity, forward and backward.

    pip install --no-deps lightly lightly-utils
    git clone https://github.com/vturrisi/solo-learn
    PYTHONPATH=. python tests/speed/nt_xent.py --rows 2048 8192 32768 --solo-learn solo-learn

prints a Markdown table, on a GPU when there is one. Every line is a new process. It takes the memory of one
call beyond what it held before: the peak of what is resident; on a GPU, of what is allocated. Then it times
this loss and ours in turn, so that "× ours" compares like with like. The last columns are the relative
differences of the value and, in norm, of the gradient from ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr.loss import nt_xent

Loss = Callable[[Tensor, Tensor, float], Tensor]

TEMPERATURE = 0.1
MIB = 2**20


def dense(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent through autograd and the full matrix."""
    z = F.normalize(torch.cat([z0, z1]))
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def lightly() -> Loss:
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return lambda z0, z1, temperature: NTXentLoss(temperature)(z0, z1)


def solo_learn(checkout: Path) -> Loss:
    """Return simclr_loss_func of a checkout, without what the rest of the package wants installed.

    In a single process its `gather` returns what it is given.
    """
    misc = ModuleType("solo.utils.misc")
    misc.gather, misc.get_rank = lambda x: x, lambda: 0
    sys.modules |= {"solo": ModuleType("solo"), "solo.utils": ModuleType("solo.utils"), misc.__name__: misc}
    spec = importlib.util.spec_from_file_location("solo_simclr", checkout / "solo/losses/simclr.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def loss(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
        images = torch.arange(len(z0), device=z0.device).repeat(2)
        return module.simclr_loss_func(torch.cat([z0, z1]), images, temperature)

    return loss


def find(name: str, solo: Path | None) -> Loss | str:
    """Return a loss by its name, or how to get it."""
    if name == "lightly":
        found = importlib.util.find_spec("lightly")
        return lightly() if found else "not installed: `pip install --no-deps lightly lightly-utils`"
    if name == "solo-learn":
        hint = "`git clone https://github.com/vturrisi/solo-learn`, then `--solo-learn solo-learn`"
        return solo_learn(solo) if solo else f"not installed: {hint}"
    return {"ours": nt_xent, "dense": dense}[name]


def measure(name: str, solo: Path | None, rows: int, width: int, repeats: int) -> dict[str, float] | str:
    """Return what a line of the table says of one loss at one size, or why it says nothing."""
    loss = find(name, solo)
    if isinstance(loss, str):
        return loss
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, rows // 2, width, generator=generator).to(device)
    views = (z0, z0 + noise)
    for one in (loss, nt_xent):
        run(one, tuple(z[:32] for z in views))  # whatever libraries allocate once
    before = start_peak(device)
    try:
        value, gradient = run(loss, views)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        return "does not fit in memory"
    memory = peak(device) - before
    expected, expected_gradient = run(nt_xent, views)
    seconds, ours = alternate(loss, views, repeats)
    return {
        "seconds": seconds,
        "ours": ours,
        "memory": memory,
        "value": abs(value - expected) / expected,
        "gradient": float((gradient - expected_gradient).norm() / expected_gradient.norm()),
    }


def run(loss: Loss, views: tuple[Tensor, ...]) -> tuple[float, Tensor]:
    """Return the value, and the gradient with respect to both views."""
    z0, z1 = (z.detach().requires_grad_() for z in views)
    value = loss(z0, z1, TEMPERATURE)
    value.backward()
    return value.item(), torch.stack([z0.grad, z1.grad])


def alternate(loss: Loss, views: tuple[Tensor, ...], repeats: int) -> tuple[float, float]:
    """Return the median seconds of `loss` and of ours."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for one, times in zip((loss, nt_xent), seconds, strict=True):
            started = time.perf_counter()
            _, gradient = run(one, views)
            gradient.sum().item()  # waits for a GPU
            times.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def start_peak(device: torch.device) -> int:
    """Forget the peak of memory so far; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: torch.device) -> int:
    """Return the peak of memory since `start_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_new_process(name: str, rows: int) -> dict[str, float] | str:
    """Return what `measure` finds in a process of its own, which has these arguments, too."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(rows)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def limit_memory(gigabytes: float) -> None:
    """Let an allocation beyond this fail, instead of the machine; no limit where there is a GPU."""
    if not torch.cuda.is_available():
        size = int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [2**i for i in range(11, 17)]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes, help="2N, two views of N images")
    parser.add_argument("--width", type=int, default=128, help="D")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--solo-learn", type=Path, help="a checkout of vturrisi/solo-learn")
    parser.add_argument("--memory", type=float, default=14, help="GiB that a loss may take on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        limit_memory(args.memory)
        name, rows = args.only
        print(json.dumps(measure(name, args.solo_learn, int(rows), args.width, args.repeats)))
        return

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"
    print(f"{where}, PyTorch {torch.__version__}, D = {args.width}, medians of {args.repeats}\n")
    print("| 2N | loss | ms | × ours | extra MiB | × ours | value off by | gradient off by |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rows in args.rows:
        ours = None
        for name in ("ours", "dense", "lightly", "solo-learn"):
            found = in_new_process(name, rows)
            ours = ours or found
            print(f"| {rows:,} | {name} | {cells(found, ours)} |", flush=True)


def cells(found: dict[str, float] | str, ours: dict[str, float] | str) -> str:
    """Return a line of the table, from the milliseconds on."""
    if isinstance(found, str):
        return f"{found} | | | | |"
    milliseconds, mebibytes = 1e3 * found["seconds"], found["memory"] / MIB
    slower, larger = found["seconds"] / found["ours"], found["memory"] / ours["memory"]
    numbers = f"{milliseconds:.1f} | {slower:.2f} | {mebibytes:.0f} | {larger:.1f}"
    return f"{numbers} | {found['value']:.0e} | {found['gradient']:.0e}"


if __name__ == "__main__":
    main()
