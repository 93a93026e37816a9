"""Pascal VOC12 + Aug Segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "Pascal VOC12 + Aug Segmentation"

COLUMNS = {
    "miou": Column("mIoU"),
}


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "voc12aug"


def evaluate(backbone: Backbone, dataset: Dataset, config: Config, work: Path) -> Metrics:
    raise NotImplementedError
