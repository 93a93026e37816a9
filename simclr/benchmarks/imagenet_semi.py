"""ImageNet semi-supervised classification: the whole network, fine-tuned on 1 % and on 10 % of the labels.

Source: MMSelfSup v0.11.0, configs/benchmarks/classification/imagenet/imagenet_{1,10}percent/ and OpenSelfSup,
docs/MODEL_ZOO.md. One thing differs: their numbers are those of the best cell of a grid of learning rates *on
the val split*, which is optimistic; here the cell is chosen on a held-out part of the labelled images, the
network is then fine-tuned on all of them with the chosen cell, and the val split is looked at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat

from simclr.benchmarks._training import Training
from simclr.protocol import Column, Metrics

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "ImageNet Semi-Supervised Classification"

COLUMNS = {
    "top1_1percent": Column("1% Top-1"),
    "top5_1percent": Column("1% Top-5"),
    "top1_10percent": Column("10% Top-1"),
    "top5_10percent": Column("10% Top-5"),
}

NOTE = (
    "learning rates are chosen on a held-out part of the labelled images; the published ones were chosen on "
    "the val split, which is optimistic"
)


class Config(Training):
    """Defaults are the published protocol, but for the choice of the learning rates (`held_out`)."""

    subsets: Literal["listed", "drawn"] = Field(
        "listed",
        description="listed: the images in meta/train_1percent.txt and meta/train_10percent.txt "
        "(google-research/simclr, imagenet_subsets); drawn: as many per class, from `seed`.",
    )
    held_out: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of each class's labelled images, at least one, on which the cell of the grid is "
        "chosen (our own; the published choice was made on the val split).",
    )
    lrs: tuple[PositiveFloat, ...] = Field(
        (0.1, 0.01, 0.001), min_length=1, description="Grid: learning rates of the backbone (OpenSelfSup)."
    )
    head_multipliers: tuple[PositiveFloat, ...] = Field(
        (1, 10, 100),
        min_length=1,
        description="Grid: the classifier's learning rate as a multiple of the backbone's (OpenSelfSup).",
    )
    batch_size: int = Field(256, ge=2, description="Images per step over all processes (MMSelfSup: 4 × 64).")
    epochs: int = Field(
        20,
        ge=1,
        description="Passes over the labelled images of every fine-tuning; the last one is reported.",
    )
    milestones: tuple[int, ...] = Field(
        (12, 16), description="Epochs, from 0, at which both learning rates fall to a fifth."
    )
    weight_decay_1percent: float = Field(5e-4, ge=0, description="L2 penalty of all parameters with 1 %.")
    weight_decay_10percent: float = Field(1e-4, ge=0, description="L2 penalty of all parameters with 10 %.")


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, curve: Path | None = None
) -> Metrics:
    """Return top-1 and top-5 in percent for 1 % and 10 % of the labels.

    Details hold, for each, where the subset comes from, its hash, the held-out accuracy of every cell of the
    grid (null: the training diverged), and the chosen cell. `work` holds the state of every fine-tuning;
    `curve` is the CSV file of the two chosen ones' learning curves, with a picture beside it. Raises
    `BadInput` for another dataset, when a subset's list is missing, not of its size or not balanced, when
    every cell diverges, or while another run uses the same state.
    """
    from functools import partial

    from simclr.benchmarks import _linear, _semi
    from simclr.benchmarks._images import train_and_val

    train, val = train_and_val(dataset, config)
    decays = {1: config.weight_decay_1percent, 10: config.weight_decay_10percent}
    metrics, curves = Metrics(), {}
    with _linear.at_work(work, config, backbone, dataset) as job:
        for percent, decay in decays.items():
            labelled = _semi.labelled_subset(dataset, train, percent, config)
            tune = partial(_semi.fine_tune, job, backbone, dataset.classes, decay)
            found, details = _semi.choose_and_refit(
                tune, labelled, val, config, job.folder / f"{percent}percent"
            )
            metrics[f"top1_{percent}percent"] = found["top1"]
            metrics[f"top5_{percent}percent"] = found["top5"]
            curves[percent] = found["curve"]
            metrics.details[f"{percent}percent"] = {
                "subset": config.subsets,
                "subset_sha256": _semi.digest(labelled, dataset.root),
                **details,
            }
        metrics.details |= job.machine
        _linear.write_curve(_semi.merged(curves), curve)
    return metrics
