"""ImageNet Semi-Supervised Classification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

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


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "imagenet"


def evaluate(backbone: Backbone, dataset: Dataset, config: Config, work: Path) -> Metrics:
    raise NotImplementedError
