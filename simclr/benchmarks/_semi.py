"""Semi-supervised fine-tuning: labelled subsets, the grid of learning rates, one fine-tuning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from simclr import BadInput, datasets, distributed
from simclr.benchmarks._linear import (
    Diverged,
    Heads,
    Images,
    accuracy,
    check_labels,
    classifier,
    fit,
    resized_crop,
    steps,
    still_transform,
    synchronised,
    train_transform,
)
from simclr.datasets import Samples
from simclr.results import replacing

if TYPE_CHECKING:
    from simclr.benchmarks.imagenet_semi import Config
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

# ---------------------------------------------------------------- labelled images


def labelled_subset(dataset: Dataset, train: Samples, percent: int, config: Config) -> Samples:
    """Return the labelled images: those of the dataset's list, or drawn from `train` (`config.subsets`)."""
    if config.subsets == "listed":
        subset = datasets.subset(dataset, f"train_{percent}percent")
        check_labels(subset, dataset.classes, f"{dataset.name} train_{percent}percent")
        return subset
    return choose(train, draw(train.labels, dataset.classes, percent, config.seed))


def draw(labels: np.ndarray, classes: int, percent: int, seed: int) -> np.ndarray:
    """Return the indices, in order, of `percent` % of `labels` `(N,)`, as many of each class, or one more.

    So are the lists of google-research/simclr: 1 % of ImageNet is 13 images of 811 classes and 12 of the
    other 189. Raises `BadInput` when a class has too few images.
    """
    rng = np.random.default_rng((seed, percent))
    each, rest = divmod(len(labels) * percent // 100, classes)
    counts = np.full(classes, each)
    counts[rng.permutation(classes)[:rest]] += 1
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise BadInput(
                f"{percent} % of {len(labels)} images are {count} of class {label}, which has "
                f"{len(members)}; use the published lists (subsets: listed)"
            )
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those to choose on: of each class `share`, but at least one each.

    Raises `BadInput` for a class with a single image.
    """
    rng = np.random.default_rng((seed, len(labels)))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise BadInput(
                f"class {label} has one labelled image; expected one to train on and one to choose the "
                "learning rate on; use a larger dataset"
            )
        held_out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def choose(samples: Samples, indices: np.ndarray) -> Samples:
    """Return the samples at `indices`."""
    return Samples(samples.paths[indices], samples.labels[indices])


def digest(samples: Samples, root: Path) -> str:
    """Return the SHA-256 of the images' names under `root`, one per line, in the order of the samples."""
    names = "".join(f"{path.relative_to(root)}\n" for path in samples.paths)
    return hashlib.sha256(names.encode()).hexdigest()


# ---------------------------------------------------------------- the grid


def choose_and_refit(
    tune: Callable[..., dict[str, float | None]],
    labelled: Samples,
    val: Samples,
    config: Config,
    folder: Path,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Try every cell of the grid on a held-out part of `labelled`, then train on all of it with the best.

    `tune(train, test, lr, head_multiplier, folder)` is one fine-tuning. Returns top-1 and top-5 on `val` in
    percent, and details. The best cell has the highest top-1, then top-5; of equal cells the first is taken.
    Raises `Diverged` when all diverge.
    """
    part, held_out = (
        choose(labelled, each) for each in hold_out(labelled.labels, config.held_out, config.seed)
    )
    grid = []
    for lr, head_multiplier in product(config.lrs, config.head_multipliers):
        cell = {"lr": lr, "head_multiplier": head_multiplier}
        result = tune(part, held_out, **cell, folder=folder / f"lr{lr:g}_head{head_multiplier:g}")
        grid.append({**cell, **result})
    finite = [cell for cell in grid if cell["top1"] is not None]
    if not finite:
        raise Diverged(f"all {len(grid)} cells of the grid diverged; add smaller values to lrs")
    best = max(finite, key=lambda cell: (cell["top1"], cell["top5"]))
    chosen = {key: best[key] for key in ("lr", "head_multiplier")}
    result = tune(labelled, val, **chosen, folder=folder / "refit")
    if result["top1"] is None:
        raise Diverged(f"the chosen cell {chosen} diverged on all labelled images; add smaller values to lrs")
    return result, {
        "images": len(labelled),
        "held_out_images": len(held_out),
        "held_out_accuracy": grid,
        "chosen": chosen,
    }


def fine_tune(
    backbone: Backbone,
    classes: int,
    config: Config,
    weight_decay: float,
    device: torch.device,
    train: Samples,
    test: Samples,
    lr: float,
    head_multiplier: float,
    folder: Path,
) -> dict[str, float | None]:
    """Train every parameter of backbone and classifier; return top-1 and top-5 on `test` in percent.

    BatchNorm is in training mode. Both values are None when the training diverges. `folder` keeps the result,
    and until then the rolling checkpoint.
    """
    finished = folder / "result.json"
    if finished.exists():
        return json.loads(finished.read_text())
    network = backbone.model()
    head = classifier(network.channels["avgpool"], classes, torch.Generator().manual_seed(config.seed))
    model = synchronised(Heads({"image": nn.Sequential(network, head)}).to(device))
    groups = [
        {"params": network.parameters(), "lr": lr},
        {"params": head.parameters(), "lr": lr * head_multiplier},
    ]
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=weight_decay)
    images = Images(train, train_transform(resized_crop(config)), config.seed)
    tests = Images(test, still_transform(config), config.seed)
    schedule = steps(config.milestones, 0.2)
    result = {"top1": None, "top5": None}
    try:
        fit(model, optimizer, images, config, schedule, folder, device, as_image, config.batch_size)
        found = accuracy(model, tests, device, as_image, config.batch_size)
        result = {"top1": found["image"], "top5": found["image_top5"]}
    except Diverged as error:
        print(f"lr {lr:g}, head × {head_multiplier:g}: {error}", flush=True)
    if distributed.rank() == 0:
        with replacing(finished) as part:
            part.write_text(json.dumps(result) + "\n")
        (folder / "state.pt").unlink(missing_ok=True)
    return result


def as_image(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name the images as the input of the one head, which is the whole network."""
    return {"image": images}
