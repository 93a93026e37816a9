"""ImageNet Linear Evaluation, AvgPool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "ImageNet Linear Evaluation, AvgPool"

COLUMNS = {
    "avgpool": Column("AvgPool"),
}


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "imagenet"


def evaluate(backbone: Backbone, dataset: Dataset, config: Config, work: Path) -> Metrics:
    raise NotImplementedError
