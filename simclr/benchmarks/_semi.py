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

from simclr import BadInput, datasets, distributed, rolling
from simclr.benchmarks._images import Images, check_labels, test_transform, train_transform
from simclr.benchmarks._linear import (
    Diverged,
    Heads,
    Job,
    accuracy,
    classifier,
    fit,
    steps,
    synchronised,
)
from simclr.datasets import Samples
from simclr.files import replacing
from simclr.training_log import Row

if TYPE_CHECKING:
    from simclr.benchmarks.imagenet_semi import Config
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

# ---------------------------------------------------------------- labelled images


def labelled_subset(dataset: Dataset, train: Samples, percent: int, config: Config) -> Samples:
    """Return the labelled images: those of the dataset's list, or drawn from `train` (`config.subsets`)."""
    if config.subsets == "listed":
        subset, where = (
            datasets.subset(dataset, f"train_{percent}percent"),
            f"{dataset.name} {percent} % list",
        )
        check_labels(subset, dataset.classes, where)
        check_balanced(subset, dataset.classes, where)
        check_size(subset, len(train) * percent / 100, dataset.classes, where)
        return subset
    return choose(train, draw(train.labels, dataset.classes, percent, config.seed))


def check_size(subset: Samples, expected: float, classes: int, where: str) -> None:
    """Raise `BadInput` unless `subset` has the `expected` number of images, rounded for each class."""
    if abs(len(subset) - expected) >= classes:
        raise BadInput(
            f"{where}: expected about {expected:.0f} images, found {len(subset)}; fetch the list again"
        )


def check_balanced(subset: Samples, classes: int, where: str) -> None:
    """Raise `BadInput` unless each class has as many images as any other, or one more, and none twice."""
    counts = np.bincount(subset.labels, minlength=classes)
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] - counts[least] > 1:
        raise BadInput(
            f"{where}: expected as many images of each class, or one more, found {counts[least]} of class "
            f"{least} and {counts[most]} of class {most}; fetch the list again"
        )
    distinct = len({str(path) for path in subset.paths})
    if distinct < len(subset):
        raise BadInput(
            f"{where}: expected every image once, found {len(subset)} lines of {distinct} images; fetch the "
            "list again"
        )


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
    tune: Callable[..., dict[str, Any]],
    labelled: Samples,
    val: Samples,
    config: Config,
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Try every cell of the grid on a held-out part of `labelled`, then train on all of it with the best.

    `tune(train, test, lr, head_multiplier, folder)` is one fine-tuning. Returns what it gives for the best
    cell, on `val`, and details. The best cell has the highest top-1, then top-5; of equal cells the first is
    taken. Raises `Diverged` when all diverge.
    """
    part, held_out = (
        choose(labelled, each) for each in hold_out(labelled.labels, config.held_out, config.seed)
    )
    grid = []
    for lr, head_multiplier in product(config.lrs, config.head_multipliers):
        cell = {"lr": lr, "head_multiplier": head_multiplier}
        result = tune(part, held_out, **cell, folder=folder / f"lr{lr:g}_head{head_multiplier:g}")
        grid.append({**cell, "top1": result["top1"], "top5": result["top5"]})
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
    job: Job,
    backbone: Backbone,
    classes: int,
    weight_decay: float,
    train: Samples,
    test: Samples,
    lr: float,
    head_multiplier: float,
    folder: Path,
) -> dict[str, Any]:
    """Train all of backbone and classifier; return `top1` and `top5` on `test` in percent, and `curve`.

    BatchNorm is in training mode. Both values are None when the training diverges. `folder`, in the job's,
    keeps the result, and until then the rolling checkpoints.
    """
    finished = folder / "result.json"
    if finished.exists():
        return json.loads(finished.read_text())
    job = job._replace(folder=folder, run={**job.run, "fine_tuning": str(folder.relative_to(job.folder))})
    config = job.config
    network = backbone.model().to(memory_format=torch.channels_last)
    head = classifier(network.channels["avgpool"], classes, torch.Generator().manual_seed(config.seed))
    model = synchronised(Heads({"image": nn.Sequential(network, head)}).to(job.device))
    optimizer = sgd(config, network, head, lr, head_multiplier, weight_decay)
    images, tests = (
        Images(split, transform, config.seed)
        for split, transform in ((train, train_transform(config)), (test, test_transform(config)))
    )
    schedule = steps(config.milestones, 0.2)
    result: dict[str, Any] = {"top1": None, "top5": None, "curve": []}
    try:
        at_once = config.batch_size
        result["curve"] = fit(
            job, model, optimizer, images, schedule, as_image, at_once, autocast=job.bfloat16
        )
        found = accuracy(job, model, tests, as_image, at_once)
        result |= {"top1": found["image"], "top5": found["image_top5"]}
    except Diverged as error:
        print(f"lr {lr:g}, head × {head_multiplier:g}: {error}", flush=True)
    if distributed.rank() == 0:
        with replacing(finished) as part:
            part.write_text(json.dumps(result) + "\n")
        rolling.drop_all(folder)
    return result


def sgd(
    config: Config,
    network: nn.Module,
    head: nn.Module,
    lr: float,
    head_multiplier: float,
    weight_decay: float,
) -> torch.optim.SGD:
    """Return SGD, without Nesterov's momentum, of backbone and head at their rates; all is decayed."""
    groups = [
        {"params": network.parameters(), "lr": lr},
        {"params": head.parameters(), "lr": lr * head_multiplier},
    ]
    return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=weight_decay)


def as_image(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name the images as the input of the one head, which is the whole network."""
    return {"image": images}


def merged(curves: dict[int, list[Row]]) -> list[Row]:
    """Return the learning curves of several fine-tunings, percent → rows, as one with columns for each."""
    return [
        {
            "epoch": rows[0]["epoch"],
            **{f"lr_{percent}percent": row["lr"] for percent, row in zip(curves, rows, strict=True)},
            **{f"loss_{percent}percent": row["image"] for percent, row in zip(curves, rows, strict=True)},
        }
        for rows in zip(*curves.values(), strict=True)
    ]
