"""Places205 linear evaluation of feature1 … feature5: the ImageNet protocol, shorter, and with other crops.

Source: MMSelfSup v0.11.0, configs/benchmarks/classification/places205/
resnet50_mhead_8xb32-steplr-28e_places205.py. Reported is the last epoch; MMSelfSup, which evaluated after
epochs 10 and 20, does not say which it published.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from simclr.benchmarks import imagenet_mhead
from simclr.benchmarks.imagenet_mhead import COLUMNS
from simclr.protocol import Metrics

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

__all__ = ["COLUMNS", "TITLE", "Config", "evaluate"]

TITLE = "Places205 Linear Evaluation"


class Config(imagenet_mhead.Config):
    """What differs from ImageNet."""

    dataset: ClassVar[str] = "places205"

    crop: Literal["random_resized", "shifted"] = Field(
        "shifted",
        description="Crop of a training image. shifted: short edge and central crop to `resize`, then a "
        "random square of `image_size`; random_resized: of `crop_area`, resized to `image_size` (VISSL).",
    )
    jitter: float = Field(0, ge=0, description="Range of the colour factors around 1; none on Places205.")
    lighting: float = Field(0, ge=0, description="Standard deviation of AlexNet's noise; none on Places205.")
    epochs: int = Field(28, ge=1, description="Passes over the training images; the last one is reported.")
    milestones: tuple[int, ...] = Field(
        (7, 14, 21), description="Epochs, from 0, at which the learning rate falls to a tenth."
    )


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, curve: Path | None = None
) -> Metrics:
    """Return what `imagenet_mhead.evaluate` does, on this dataset and with this config."""
    return imagenet_mhead.evaluate(backbone, dataset, config, work, curve)
