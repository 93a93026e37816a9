"""One step of LARS on ResNet-50 and its projector beside torch.optim.SGD's and lightly's LARS.

    pip install --no-deps lightly lightly-utils
    PYTHONPATH=. python tests/speed/lars.py

prints a Markdown table: the median milliseconds of a step, on a GPU when there is one, and how many of SGD's
steps (as constructed by default: momentum 0.9, weight decay 1e-6) that is; the same for the milliseconds of
CPU time, which other programs on the machine do not lengthen. The optimisers take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from simclr.model import projector, resnet
from simclr.optim import LARS, parameter_groups

WEIGHT_DECAY = 1e-6


def network(architecture: str, device: torch.device) -> nn.Module:
    """Return a network in the memory format of pretraining, each parameter with a gradient."""
    torch.manual_seed(0)
    backbone = resnet(architecture)
    model = nn.Sequential(backbone, projector(backbone.channels["avgpool"], 2048, 128))
    model.to(device, memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return model


def sgd(model: nn.Module, **settings: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=WEIGHT_DECAY, **settings)


def ours(model: nn.Module) -> torch.optim.Optimizer:
    return LARS(parameter_groups(model, WEIGHT_DECAY, "bias_and_bn"), 0.3, 0.9)


def lightly(model: nn.Module) -> torch.optim.Optimizer:
    """Return lightly's, which excludes from adaptation what is not decayed."""
    from lightly.utils.lars import LARS as LightlyLARS  # noqa: N811

    groups = parameter_groups(model, WEIGHT_DECAY, "bias_and_bn")
    keys = ("params", "weight_decay")
    return LightlyLARS([{key: group[key] for key in keys} for group in groups], 0.3, 0.9)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": sgd,
    "SGD, foreach": partial(sgd, foreach=True),
    "SGD, fused": partial(sgd, fused=True),
    "LARS": ours,
    "lightly's LARS": lightly,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    missing = [] if importlib.util.find_spec("lightly") else ["lightly's LARS"]
    optimizers = {
        name: make(network(args.architecture, device))
        for name, make in OPTIMIZERS.items()
        if name not in missing
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in optimizers}
    for _ in range(args.repeats + 2):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer, device))
    medians = {  # after two steps to warm up
        name: [statistics.median(column) for column in zip(*steps[2:], strict=True)]
        for name, steps in times.items()
    }

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"{where}, PyTorch {torch.__version__}, {args.architecture}, medians of {args.repeats}\n")
    print("| optimiser | ms | × SGD | CPU ms | × SGD |\n| --- | ---: | ---: | ---: | ---: |")
    for name, both in medians.items():
        cells = [f"{1e3 * s:.1f} | {s / base:.2f}" for s, base in zip(both, medians["SGD"], strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")
    for name in missing:
        print(f"| {name} | not installed: `pip install --no-deps lightly lightly-utils` | | | |")


def seconds(optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[float, float]:
    """Return the wall and the CPU seconds of one step, until the device, too, is done."""
    started, before = time.perf_counter(), time.process_time()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - before


if __name__ == "__main__":
    main()
