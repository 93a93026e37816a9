"""The torchvision engine: trains and tests the detectors of `_detection_model` by Detectron2's protocol.

`run` takes a spec and returns a result (see `_detection`). Under `torchrun` the images of an iteration are
shared out and BatchNorm is synchronised. Every iteration draws from its own seed, so that a resumed run
equals an unbroken one.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import platform
import random
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from simclr import BadInput, checkpoint, loading, rolling
from simclr.benchmarks import _detection
from simclr.benchmarks._detection_model import Detector, Res5, build, detector_key, not_empty, paste_mask
from simclr.devices import float32_as_published, peak_memory_gb
from simclr.distributed import any_rank, process_group, rank, sync_batchnorm, world_size
from simclr.files import replacing

Json = dict[str, Any]
REPORT_EVERY = 20  # iterations, as Detectron2
# The draws of training and of Precise-BN are two streams of one seed.
TRAINING, PRECISE_BN = 0, 1


def run(spec: Json) -> Json | None:
    """Train and detect; return the result on the first process and None on the others."""
    with process_group() as device:
        float32_as_published()
        folder = Path(spec["folder"])
        detector, load = make(spec, device)
        done = folder / "trained.pt"
        if not done.is_file():
            train(detector, spec, folder)
        trained = torch.load(done, map_location=device, weights_only=True)
        rolling.check_run(done, trained, spec["run"])
        detector.load_state_dict(trained["model"])
        began = time.monotonic()
        detections = detect(detector, spec)
        trained["usage"]["test_seconds"] = time.monotonic() - began
        if rank() == 0:
            rolling.drop_all(folder)
    return None if detections is None else result(load, trained, detections)


def result(load: Json, trained: Json, detections: list[Json]) -> Json:
    """Return what the result file holds."""
    return {
        "engine": "torchvision",
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "load": load,
        "usage": trained["usage"],
        "losses": trained["losses"],
        "detections": detections,
    }


def make(spec: Json, device: torch.device) -> tuple[Detector, Json]:
    """Return the detector on the backbone's weights, its heads drawn from the seed, and the load report."""
    torch.manual_seed(spec["seed"])
    resnet = checkpoint.build(spec["architecture"], checkpoint.load_backbone(Path(spec["backbone"])))
    detector = build(resnet, spec["protocol"], spec["classes"], spec["masks"])
    state = checkpoint.load_backbone(Path(spec["backbone"]))  # again: the network has the first one's memory
    found = detector.state_dict()
    arrived = {key: found.get(detector_key(key, spec["protocol"]["detector"])) for key in state}
    report = _detection.load_report(arrived, state, "torchvision")
    report |= _detection.feature_report(functools.partial(features, detector), state)
    return detector.to(device), report


@torch.no_grad()
def features(detector: Detector, images: Tensor) -> dict[str, Tensor]:
    """Return the maps of `images` by the detector's backbone, named as the source's."""
    training = detector.training
    detector.eval()
    if isinstance(detector.roi_heads.box_head, Res5):
        (map4,) = detector.backbone(images).values()
        maps = {"feature4": map4, "feature5": detector.roi_heads.box_head.layer4(map4)}
    else:
        maps = {f"feature{i}": value for i, value in enumerate(detector.backbone.body(images).values(), 2)}
    detector.train(training)
    return maps


# ---------------------------------------------------------------- images


class Lines:
    """A list file of `_detection`, read line by line from the disk: workers share no copy of it."""

    def __init__(self, path: str):
        self.path = path
        with open(path, "rb") as file:
            lengths = [len(line) for line in file]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Json:
        start, end = self.offsets[index : index + 2].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))


class TrainImages(Dataset):
    """(position in the order, index of the image) → image and target, resized and flipped by the draw."""

    def __init__(self, lines: Lines, config: Json, seed: tuple[int, int]):
        self.lines, self.config, self.seed = lines, config, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Json]:
        position, index = item
        draw = random.Random(f"{self.seed} {position}")
        line = self.lines[index]
        edge, flip = draw.choice(self.config["train_edges"]), draw.random() < 0.5
        image = resized(line, edge, self.config["train_max_edge"] or self.config["max_edge"])
        target = transformed(line, image.size, flip)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
        return pixels(image), target


class TestImages(Dataset):
    """Index → the list's line and the resized image."""

    def __init__(self, lines: Lines, config: Json):
        self.lines, self.config = lines, config

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[Json, Tensor]:
        line = self.lines[index]
        return line, pixels(resized(line, self.config["test_edge"], self.config["max_edge"]))


def pixels(image: Image.Image) -> Tensor:
    """Return `(3, H, W)` uint8, RGB."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resized(line: Json, edge: int, max_edge: int) -> Image.Image:
    """Read the image and resize it with PIL's bilinear filter, on 8-bit values."""
    image = _detection.decoded(line)
    return image.resize(new_size(*image.size, edge, max_edge), Image.Resampling.BILINEAR)


def new_size(width: int, height: int, edge: int, max_edge: int) -> tuple[int, int]:
    """Return width and height with a short edge of `edge`, or else a long edge of `max_edge`."""
    scale = edge / min(width, height)
    width, height = (edge, scale * height) if width <= height else (scale * width, edge)
    if max(width, height) > max_edge:
        shrink = max_edge / max(width, height)
        width, height = width * shrink, height * shrink
    return int(width + 0.5), int(height + 0.5)


def transformed(line: Json, size: tuple[int, int], flip: bool) -> Json:
    """Return the target of `Detector` for the image resized to `size` (width, height) and perhaps flipped."""
    width, height = size
    scale = np.array([width / line["width"], height / line["height"]])
    objects = line["annotations"]
    boxes = np.array([each["bbox"] for each in objects]) * np.tile(scale, 2)
    polygons = [
        [np.reshape(polygon, (-1, 2)) * scale for polygon in each.get("segmentation", ())] for each in objects
    ]
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        polygons = [[points * (-1, 1) + (width, 0) for points in each] for each in polygons]
    boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)
    kept = ((boxes[:, 2:] - boxes[:, :2]) > 1e-5).all(1)
    return {
        "boxes": torch.from_numpy(boxes[kept]),
        "labels": torch.tensor([each["category_id"] + 1 for each in objects])[torch.from_numpy(kept)],
        "polygons": [[points.ravel() for points in polygons[i]] for i in np.flatnonzero(kept)],
    }


def order(count: int, seed: int) -> Iterator[int]:
    """Yield the indices of `count` images for ever, each time round in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def batches(wide: list[bool], size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Yield this process's batches of (position, index): each of wide images only, or of none."""
    buckets: tuple[list, list] = ([], [])
    positions = enumerate(order(len(wide), seed))
    for position, index in itertools.islice(positions, rank(), None, world_size()):
        bucket = buckets[wide[index]]
        bucket.append((position, index))
        if len(bucket) == size:
            yield list(bucket)
            bucket.clear()


def loader(spec: Json, stream: int, start: int, device: torch.device) -> DataLoader:
    """Return the training batches of this process from iteration `start` on, without end."""
    config, lines = spec["protocol"], Lines(spec["train"])
    wide = [line["width"] > line["height"] for line in map(lines.__getitem__, range(len(lines)))]
    size = _detection.per_process(config["batch_size"], world_size())
    sampler = itertools.islice(batches(wide, size, 2 * spec["seed"] + stream), start, None)
    return DataLoader(
        TrainImages(lines, config, (spec["seed"], stream)),
        batch_sampler=sampler,
        collate_fn=list,
        pin_memory=device.type == "cuda",
        **loading.workers(workers(device)),
    )


def workers(device: torch.device) -> int:
    """Return the loader's processes: four feed a GPU (Detectron2); a CPU they would only compete with."""
    return 4 if device.type == "cuda" else 0


def on(device: torch.device, batch: list[tuple[Tensor, Json]]) -> tuple[list[Tensor], list[Json]]:
    """Return a batch's images and targets, tensors on `device`."""
    images = [image.to(device, non_blocking=True) for image, _ in batch]
    targets = [
        {**target, **{key: target[key].to(device, non_blocking=True) for key in ("boxes", "labels")}}
        for _, target in batch
    ]
    return images, targets


# ---------------------------------------------------------------- training


def sgd(detector: nn.Module, config: Json) -> torch.optim.SGD:
    """Return SGD with momentum, with a weight decay of its own for BatchNorm's parameters."""
    norm = [p for m in detector.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    apart = {id(parameter) for parameter in norm}
    others = [parameter for parameter in detector.parameters() if id(parameter) not in apart]
    groups = [
        {"params": others, "weight_decay": config["weight_decay"]},
        {"params": norm, "weight_decay": config["norm_weight_decay"]},
    ]
    return torch.optim.SGD(groups, lr=config["lr"], momentum=config["momentum"])


def learning_rate(config: Json, iteration: int) -> float:
    """Return the learning rate of an iteration, counted from 0: linear warm-up, then steps of a tenth."""
    warmup = config["warmup_iterations"]
    decay = 0.1 ** bisect_right(config["steps"], max(iteration, warmup))
    if iteration >= warmup:
        return config["lr"] * decay
    done = iteration / warmup
    return config["lr"] * (config["warmup_factor"] * (1 - done) + decay * done)


def set_lr(optimizer: torch.optim.Optimizer, config: Json, iteration: int) -> float:
    """Give every parameter group the learning rate of `iteration` and return it."""
    lr = learning_rate(config, iteration)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def train(detector: Detector, spec: Json, folder: Path) -> None:
    """Train, resuming where a run ended; take BatchNorm's statistics anew; write `folder`/trained.pt.

    SIGTERM, SIGUSR1 and a time limit of Slurm that is near end the iteration, save, and exit with 75.
    """
    config, device = spec["protocol"], detector.mean.device
    model: nn.Module = detector.train()
    if world_size() > 1:
        detector = sync_batchnorm(detector)
        model = DistributedDataParallel(detector, [device.index] if device.index is not None else None)
    optimizer, clock = sgd(detector, config), _detection.Clock()
    progress = Progress(config["iterations"])
    parts = {"model": detector, "optimizer": optimizer, "clock": clock, "progress": progress}
    if (state := rolling.newest(folder, spec["run"])) is not None:
        progress.start = state["step"]
        for key, part in parts.items():
            part.load_state_dict(state[key])
    last, every = config["iterations"], config["checkpoint_every"]
    with (
        rolling.stop_signals() as signals,
        loading.ending(loader(spec, TRAINING, progress.start, device)) as stream,
    ):
        for iteration in range(progress.start, last):
            lr = set_lr(optimizer, config, iteration)
            torch.manual_seed(seed_of(spec["seed"], TRAINING, iteration))
            losses = model(*on(device, next(stream)))
            step(optimizer, losses, iteration)
            progress.tell(iteration, losses, lr)
            done, stopping = iteration + 1, any_rank(bool(signals), device)
            if (stopping or done == last or done % every == 0) and rank() == 0:
                rolling.save(
                    folder, done, spec["run"], {key: part.state_dict() for key, part in parts.items()}
                )
            if stopping:
                rolling.stop(f"after iteration {done} of {last}", signals)
    if config["precise_bn"]:
        torch.manual_seed(seed_of(spec["seed"], PRECISE_BN, 0))
        with loading.ending(loader(spec, PRECISE_BN, 0, device)) as stream:
            fresh = (on(device, batch) for batch in stream)
            precise_bn(model, itertools.islice(fresh, config["precise_bn"]))
    if rank() == 0:
        trained = {
            "run": spec["run"],
            "model": detector.state_dict(),
            "losses": progress.losses,
            "usage": _detection.usage(clock, progress.seconds_per_iteration, world_size()),
        }
        with replacing(folder / "trained.pt") as part:
            torch.save(trained, part)
    if world_size() > 1:
        dist.barrier()


def step(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor], iteration: int) -> None:
    """Update once; raises `BadInput` when a loss is not finite."""
    loss = sum(losses.values())
    if not math.isfinite(loss.item()):
        values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
        raise BadInput(f"training diverged at iteration {iteration} ({values}); lower lr or warm up longer")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def seed_of(seed: int, stream: int, iteration: int) -> int:
    """Return a seed for the draws of one iteration on one process."""
    sequence = np.random.SeedSequence([seed, stream, iteration, rank()])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class Progress:
    """Lines on standard error: iteration, losses, learning rate, seconds per iteration, memory, time left.

    What it said last is a part of the checkpoints: after the last iteration, a resumed training has no other.
    """

    def __init__(self, iterations: int):
        self.iterations, self.start, self.began = iterations, 0, time.monotonic()
        self.seconds_per_iteration = 0.0
        self.losses: dict[str, float] = {}

    def state_dict(self) -> Json:
        return {"seconds_per_iteration": self.seconds_per_iteration, "losses": self.losses}

    def load_state_dict(self, state: Json) -> None:
        self.seconds_per_iteration, self.losses = state["seconds_per_iteration"], state["losses"]

    def tell(self, iteration: int, losses: dict[str, Tensor], lr: float) -> None:
        done = iteration + 1
        if done % REPORT_EVERY and done != self.iterations:
            return
        self.seconds_per_iteration = (time.monotonic() - self.began) / (done - self.start)
        left = timedelta(seconds=round((self.iterations - done) * self.seconds_per_iteration))
        self.losses = {name: value.item() for name, value in losses.items()}
        values = "  ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        if rank() == 0:
            print(
                f"iteration {done}/{self.iterations}  {values}  lr {lr:.2g}  "
                f"{self.seconds_per_iteration:.2f} s/iteration  {peak_memory_gb():.1f} GB  "
                f"{left} left",
                file=sys.stderr,
                flush=True,
            )


@torch.no_grad()
def precise_bn(model: nn.Module, stream: Iterable[tuple[list[Tensor], list[Json]]]) -> None:
    """Set BatchNorm's mean and variance to those of all values in the batches of `stream`.

    The variance of the pooled values, from each batch's mean and unbiased variance (Wu and Johnson 2021,
    "Rethinking Batch in BatchNorm", appendix; fvcore, precise_bn.py). A layer that none of them reached, as
    the mask branch of regions of which none is positive, keeps its own.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    values = {layer: 0 for layer in layers}
    sums = {
        layer: [torch.zeros_like(layer.running_mean, dtype=torch.double) for _ in "mv"] for layer in layers
    }

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values[layer] = inputs[0].numel() // inputs[0].shape[1]

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    before = [(each.momentum, each.running_mean.clone(), each.running_var.clone()) for each in layers]
    totals = dict.fromkeys(layers, 0)
    for layer in layers:
        layer.momentum = 1.0
    for images, targets in stream:
        values.update(dict.fromkeys(layers, 0))
        model(images, targets)
        for layer in layers:
            n = values[layer]
            if n:
                mean, variance = layer.running_mean.double(), layer.running_var.double()
                sums[layer][0] += n * mean
                sums[layer][1] += n * mean.square() + (n - 1) * variance
                totals[layer] += n
    for layer, (momentum, mean, variance) in zip(layers, before, strict=True):
        if totals[layer]:
            mean, square = (each / totals[layer] for each in sums[layer])
            variance = square - mean.square()
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        layer.momentum = momentum
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------- testing


@torch.no_grad()
def detect(detector: Detector, spec: Json) -> list[Json] | None:
    """Return the detections in all test images, in the order of the list; None but on the first process."""
    device = detector.mean.device
    detector.eval()
    images = TestImages(Lines(spec["test"]), spec["protocol"])
    mine = range(rank(), len(images), world_size())
    found = []
    for index, (line, image) in zip(
        mine,
        DataLoader(images, batch_size=None, sampler=mine, num_workers=workers(device)),
        strict=True,
    ):
        detection = detector([image.to(device)])[0]
        detection = in_image(detection, image.shape[1:], line["height"], line["width"])
        found.append((index, [{"image_id": line["image_id"], **each} for each in entries(detection)]))
    if world_size() > 1:
        parts: list[Any] = [None] * world_size()
        dist.gather_object(found, parts if rank() == 0 else None)
        found = sorted(itertools.chain(*parts)) if rank() == 0 else []
    return [each for _, several in found for each in several] if rank() == 0 else None


def in_image(
    detection: dict[str, Tensor], size: tuple[int, int], height: int, width: int
) -> dict[str, Tensor]:
    """Return a detection in an image resized to `size` (height, width) in pixels of the original."""
    scale = detection["boxes"].new_tensor([width / size[1], height / size[0]] * 2)
    limit = detection["boxes"].new_tensor([width, height] * 2)
    boxes = (detection["boxes"] * scale).clamp(min=0).minimum(limit)
    kept = not_empty(boxes)
    found = {**{key: value[kept] for key, value in detection.items()}, "boxes": boxes[kept]}
    if "masks" in found:
        pairs = zip(found["masks"], found["boxes"], strict=True)
        found["masks"] = [paste_mask(mask, box, height, width) for mask, box in pairs]
    return found


def entries(detection: dict[str, Any]) -> Iterator[Json]:
    """Yield each detection of one image as the result file has it."""
    boxes, scores = detection["boxes"].tolist(), detection["scores"].tolist()
    for i, label in enumerate(detection["labels"].tolist()):
        entry = {"category_id": label - 1, "bbox": boxes[i], "score": scores[i]}
        if "masks" in detection:
            entry["segmentation"] = _detection.rle(detection["masks"][i].cpu().numpy())
        yield entry


if __name__ == "__main__":
    sys.exit(_detection.main(run, sys.argv[1:]))
