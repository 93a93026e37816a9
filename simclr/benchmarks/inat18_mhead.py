"""iNaturalist2018 Linear Evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "iNaturalist2018 Linear Evaluation"

COLUMNS = {
    "feature1": Column("Feature1"),
    "feature2": Column("Feature2"),
    "feature3": Column("Feature3"),
    "feature4": Column("Feature4"),
    "feature5": Column("Feature5"),
}


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "inat18"


def evaluate(backbone: Backbone, dataset: Dataset, config: Config, work: Path) -> Metrics:
    raise NotImplementedError
