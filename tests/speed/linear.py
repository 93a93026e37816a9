"""One epoch of the multi-head linear evaluation, beside the peers' way: a training per head.

    python tests/speed/linear.py --data results/demo/data --repeats 3

prints a Markdown table. Ours trains all five heads from one pass of the folded backbone, and augments on the
device. The peers' way trains each alone: PIL makes its images, and an unfolded backbone computes as far as
the head's layer; "together" is the same with all heads in one training. Images, draws, first weights and
batches are the same, so the accuracies agree but for PIL's rounding to 8 bits. Each training is a process of
its own, in turns, for its peak memory; imports and the evaluation of the val split are not timed. On a GPU a
second table has the images per second of the frozen pass of a ResNet-50 at 224 pixels.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from simclr import config, datasets, loading
from simclr.benchmarks import _images, _linear, imagenet_mhead
from simclr.checkpoint import Backbone, random_init
from simclr.datasets import Dataset
from simclr.model import ResNet, pool_layer, resnet

LAYERS = tuple(imagenet_mhead.COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the miniature: python -m simclr demo")
    parser.add_argument("--architecture", default="resnet18_w0.25")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))
    if torch.cuda.is_available():
        frozen_passes()


# ---------------------------------------------------------------- trainings


def compare(args: argparse.Namespace, folder: Path) -> None:
    demo = yaml.safe_load(Path("config/demo.yaml").read_text())
    block = {**demo["datasets"]["imagenet"], "root": args.data / "imagenet"}
    datasets.verify("imagenet", config.Dataset(**block), folder / "imagenet.json")
    random_init(config.RandomInit(architecture=args.architecture), folder / "backbone.safetensors")
    protocol = imagenet_mhead.Config(**{**demo["benchmarks"]["imagenet_mhead"], "epochs": 1})
    variants = {"ours": LAYERS, "together": LAYERS, **{layer: (layer,) for layer in LAYERS}}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name, layers in variants.items():
            found[name].append(in_a_process(train, name == "ours", layers, protocol, folder, args.threads))
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    memory = {name: max(run["memory"] for run in runs) for name, runs in found.items()}
    accuracy = {name: runs[0]["accuracy"] for name, runs in found.items()}
    seconds["separately"] = sum(seconds[layer] for layer in LAYERS)
    memory["separately"] = max(memory[layer] for layer in LAYERS)
    accuracy["separately"] = {layer: accuracy[layer][layer] for layer in LAYERS}
    print("| one epoch | seconds | against ours | peak MB | top-1 |\n| --- | ---: | ---: | ---: | --- |")
    for name, values in accuracy.items():
        top1 = " ".join(f"{values[layer]:.2f}" for layer in LAYERS if layer in values)
        ratio = seconds[name] / seconds["ours"]
        print(f"| {name} | {seconds[name]:.1f} | {ratio:.1f} | {memory[name]:.0f} | {top1} |")


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def train(
    ours: bool, layers: tuple[str, ...], protocol: imagenet_mhead.Config, folder: Path, threads: int
) -> dict[str, Any]:
    """Train the heads of `layers` for one epoch; return seconds, peak memory in MB, accuracy in percent."""
    torch.set_num_threads(threads)
    backbone = Backbone.open(folder / "backbone.safetensors")
    dataset = Dataset.open(folder / "imagenet.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = backbone.model().requires_grad_(False).to(device)
    heads = imagenet_mhead.five_heads(network.channels, dataset.classes, torch.Generator().manual_seed(0))
    model = _linear.Heads({layer: heads[layer] for layer in layers}).to(device)
    optimizer = imagenet_mhead.sgd(protocol, model.parameters())
    moving = _images.train_transform(protocol, protocol.crop, protocol.jitter, protocol.lighting)
    images, tests = (
        _images.Images(datasets.samples(dataset, split), transform, protocol.seed)
        for split, transform in (("train", moving), ("val", _images.test_transform(protocol)))
    )
    frozen = pooled(_linear.frozen_backbone(backbone, device, bfloat16=False), layers)
    with tempfile.TemporaryDirectory() as work:
        job = _linear.Job(protocol, {}, Path(work), device, [])
        started = time.perf_counter()
        if ours:
            _linear.fit(job, model, optimizer, images, lambda _: 1, frozen, protocol.micro_batch)
        else:
            train_as_published(model, optimizer, images, protocol, as_far_as(network, layers), device)
        seconds = time.perf_counter() - started
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
        accuracy = _linear.accuracy(job, model, tests, frozen, protocol.micro_batch)
    return {"seconds": seconds, "memory": memory / 1e6, "accuracy": accuracy}


def pooled(network: ResNet, layers: tuple[str, ...]) -> Callable[[Tensor], dict[str, Tensor]]:
    def inputs(images: Tensor) -> dict[str, Tensor]:
        features = network.forward_features(images)
        return {layer: pool_layer(layer, features[layer], "adaptive").contiguous() for layer in layers}

    return inputs


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- the peers' way


class Reference(torch.utils.data.Dataset):
    """Images that PIL finishes, as published."""

    def __init__(self, images: _images.Images):
        self.images = images

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        finished = _images.reference(self.images.transform, *self.images.drawn(item))
        return finished, int(self.images.samples.labels[item[1]])


def as_far_as(network: ResNet, layers: tuple[str, ...]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return the unfolded backbone up to the last of `layers`, pooled."""

    def forward(images: Tensor) -> dict[str, Tensor]:
        x = network.relu(network.bn1(network.conv1(images)))
        features = {"feature1": x}
        for number, stage in enumerate(network.stages[: int(layers[-1][-1]) - 1], start=2):
            features[f"feature{number}"] = x = stage(network.maxpool(x) if number == 2 else x)
        return {layer: pool_layer(layer, features[layer], "adaptive") for layer in layers}

    return forward


def train_as_published(
    model: _linear.Heads,
    optimizer: torch.optim.Optimizer,
    images: _images.Images,
    protocol: imagenet_mhead.Config,
    forward: Callable[[Tensor], dict[str, Tensor]],
    device: torch.device,
) -> None:
    """Train for an epoch on the batches that `_linear.fit` has, written out."""
    order = np.random.default_rng((protocol.seed, 0)).permutation(len(images)).tolist()
    batches = loading.pieces([(0, index) for index in order], protocol.batch_size)
    cuda = device.type == "cuda"
    workers = max(len(os.sched_getaffinity(0)) - 1, 1) if cuda else 0
    loader = DataLoader(Reference(images), batch_sampler=batches, num_workers=workers, pin_memory=cuda)
    model.train()
    for batch, labels in loader:
        with torch.no_grad():
            inputs = forward(batch.to(device, non_blocking=True))
        targets = labels.to(device, non_blocking=True)
        loss = sum(F.cross_entropy(logits, targets) for logits in model(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---------------------------------------------------------------- the frozen pass on a GPU


def frozen_passes(batch: int = 256, repeats: int = 30) -> None:
    """Print the images per second of forward_features of a ResNet-50, unfolded and folded."""
    network = resnet("resnet50").eval().requires_grad_(False).cuda()
    folded = _linear.folded(network)
    last = torch.channels_last
    variants = {
        "unfolded, float32": (network, torch.float32, torch.contiguous_format),
        "folded, float32, channels_last": (folded, torch.float32, last),
        "folded, bfloat16, channels_last": (copy.deepcopy(folded).bfloat16(), torch.bfloat16, last),
    }
    print(f"\n| frozen pass on {torch.cuda.get_device_name()} | images/s |\n| --- | ---: |")
    for name, (model, dtype, order) in variants.items():
        model.to(memory_format=order)
        images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype).contiguous(memory_format=order)
        with torch.no_grad():
            for count in (5, repeats):  # the first are to choose algorithms
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(count):
                    model.forward_features(images)
                torch.cuda.synchronize()
        print(f"| {name} | {batch * repeats / (time.perf_counter() - started):,.0f} |")


if __name__ == "__main__":
    main()
