"""Pascal VOC07+12 Detection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "Pascal VOC07+12 Detection"

COLUMNS = {
    "ap50": Column("AP50"),
    "ap": Column("AP"),
    "ap75": Column("AP75"),
}


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "voc0712"


def evaluate(backbone: Backbone, dataset: Dataset, config: Config, work: Path) -> Metrics:
    raise NotImplementedError
