"""iNaturalist2018 linear evaluation of feature1 … feature5: the ImageNet protocol without colour changes.

Source: MMSelfSup v0.11.0, configs/benchmarks/classification/inaturalist2018/
resnet50_mhead_8xb32-steplr-84e_inat18.py. No SimCLR row was published. Reported is the last epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from simclr.benchmarks import imagenet_mhead
from simclr.benchmarks.imagenet_mhead import COLUMNS
from simclr.protocol import Metrics

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

__all__ = ["COLUMNS", "TITLE", "Config", "evaluate"]

TITLE = "iNaturalist2018 Linear Evaluation"


class Config(imagenet_mhead.Config):
    """What differs from ImageNet."""

    dataset: ClassVar[str] = "inat18"

    jitter: float = Field(0, ge=0, description="Range of the colour factors around 1; none on iNaturalist.")
    lighting: float = Field(
        0, ge=0, description="Standard deviation of AlexNet's noise; none on iNaturalist."
    )
    epochs: int = Field(84, ge=1, description="Passes over the training images; the last one is reported.")
    milestones: tuple[int, ...] = Field(
        (24, 48, 72), description="Epochs, from 0, at which the learning rate falls to a tenth."
    )


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, curve: Path | None = None
) -> Metrics:
    """Return what `imagenet_mhead.evaluate` does, on this dataset and with this config."""
    return imagenet_mhead.evaluate(backbone, dataset, config, work, curve)
