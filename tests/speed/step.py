"""One training step of SimCLR beside the same step made of lightly's modules.

    pip install --no-deps lightly lightly-utils
    PYTHONPATH=. python tests/speed/step.py --batch 256 512 1024 2048
    PYTHONPATH=. python tests/speed/step.py --architecture resnet18 --size 64 --batch 16   # on a CPU

prints a Markdown table: images per second (an image is two views), how many times lightly's, the peak memory,
and the share of the peak of matrix products, as measured in the same run. Forward, NT-Xent, backward and LARS
of synthetic views that are on the device already; the two steps take turns. Ours is channels_last; lightly's
is torchvision's network with lightly's projection head, NTXentLoss and LARS, as in its examples. On a GPU
both run under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from nt_xent import peak, start_peak
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simclr.loss import nt_xent
from simclr.model import projector, resnet
from simclr.optim import LARS, parameter_groups

Step = Callable[[Tensor], Tensor]  # two views (2, N, 3, H, W) → loss

WEIGHT_DECAY = 1e-6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_step(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    together: bool,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Step:
    """Return a step; the two views pass through the network `together`, as one batch, or one by one."""

    def step(views: Tensor) -> Tensor:
        images = [views.flatten(0, 1)] if together else list(views)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            z = [network(batch.contiguous(memory_format=memory_format)) for batch in images]
            value = loss(*torch.cat(z).chunk(2))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def ours(architecture: str, compiled: bool) -> Step:
    backbone = resnet(architecture)
    network = nn.Sequential(backbone, projector(backbone.channels["avgpool"], 2048, 128))
    network.to(DEVICE, memory_format=torch.channels_last)
    optimizer = LARS(parameter_groups(network, WEIGHT_DECAY, "bias_and_bn"), 0.3)
    network = torch.compile(network) if compiled else network
    return training_step(network, nt_xent, optimizer, True, torch.channels_last)


def lightly(architecture: str) -> Step:
    import torchvision
    from lightly.loss.ntx_ent_loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

    backbone = getattr(torchvision.models, architecture)()
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    network = nn.Sequential(backbone, SimCLRProjectionHead(width, 2048, 128)).to(DEVICE)
    groups = parameter_groups(network, WEIGHT_DECAY, "bias_and_bn")
    for group in groups:
        del group["lars_exclude"]  # lightly's excludes what is not decayed
    optimizer = LightlyLARS(groups, 0.3, momentum=0.9)
    return training_step(network, NTXentLoss(0.1), optimizer, False)


def makers(architecture: str, compiled: bool) -> dict[str, Callable[[], Step]]:
    found = {"ours": lambda: ours(architecture, compiled)}
    if importlib.util.find_spec("lightly"):
        found["lightly"] = lambda: lightly(architecture)
    return found


def take_memory(step: Step, views: Tensor) -> int | None:
    """Return the peak of memory of two steps, in bytes, or None where there is not enough."""
    before = start_peak(DEVICE)
    try:
        step(views)
        step(views)
    except torch.OutOfMemoryError:
        return None
    return peak(DEVICE) - before


def take_turns(steps: dict[str, Step], views: Tensor, repeats: int) -> dict[str, float]:
    """Return the median seconds of each step, of three turns of `repeats`, each after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in 3 * list(steps.items()):
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()  # what one step keeps, the other cannot use
        step(views)
        for _ in range(repeats):
            started = time.perf_counter()
            step(views).item()  # waits for a GPU's loss
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def operations_per_image(architecture: str, size: int) -> float:
    """Return the floating-point operations of a step, per image; those of NT-Xent are few."""
    step, views = ours(architecture, compiled=False), torch.randn(2, 2, 3, size, size, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        step(views)
    return counter.get_total_flops() / 2


def matmul_peak() -> float:
    """Return the operations per second of a large matrix product in the precision of the step."""
    edge, dtype = (8192, torch.bfloat16) if DEVICE.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, edge, edge, device=DEVICE, dtype=dtype)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * edge**3 / min(seconds)


def in_new_process(name: str, batch: int) -> int | None:
    """Return the memory of a step in a process of its own, which has these arguments, too."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(batch)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="edge of a view, in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512, 1024, 2048], help="images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile our network")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    choices = makers(args.architecture, args.compile)

    def views_of(batch: int) -> Tensor:
        return torch.randn(2, batch, 3, args.size, args.size, device=DEVICE)

    if args.only:
        name, batch = args.only
        print(json.dumps(take_memory(choices[name](), views_of(int(batch)))))
        return

    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {args.threads} threads"
    operations, available = operations_per_image(args.architecture, args.size), matmul_peak()
    print(
        f"{where}, PyTorch {torch.__version__}, {args.architecture} at {args.size} pixels; a matrix product"
    )
    print(f"runs at {available / 1e12:.3g} TFLOP/s, a step takes {operations / 1e9:.1f} GFLOP per image\n")
    print("| batch | step | images/s | × lightly's | peak MiB | share of the peak |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for batch in args.batch:
        memory = {name: in_new_process(name, batch) for name in choices}
        steps = {name: make() for name, make in choices.items() if memory[name] is not None}
        seconds = take_turns(steps, views_of(batch), args.repeats)
        for name in choices:
            if name not in seconds:
                print(f"| {batch:,} | {name} | does not fit in memory | | | |")
                continue
            rate = batch / seconds[name]
            ratio = f"{seconds['lightly'] / seconds[name]:.2f}" if "lightly" in seconds else ""
            print(
                f"| {batch:,} | {name} | {rate:.1f} | {ratio} | {memory[name] / 2**20:.0f} "
                f"| {rate * operations / available:.0%} |",
                flush=True,
            )
    if "lightly" not in choices:
        print("| | lightly | not installed: `pip install --no-deps lightly lightly-utils` | | | |")


if __name__ == "__main__":
    main()
