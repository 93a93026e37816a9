"""COCO2017 Detection and Instance Segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "COCO2017 Detection and Instance Segmentation"

COLUMNS = {
    "box_ap": Column("mAP(Box)"),
    "box_ap50": Column("AP50(Box)"),
    "box_ap75": Column("AP75(Box)"),
    "mask_ap": Column("mAP(Mask)"),
    "mask_ap50": Column("AP50(Mask)"),
    "mask_ap75": Column("AP75(Mask)"),
}


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "coco2017"


def evaluate(backbone: Backbone, dataset: Dataset, config: Config, work: Path) -> Metrics:
    raise NotImplementedError
