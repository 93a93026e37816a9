"""Cityscapes Segmentation: FCN-R50-D8, 769 × 769, 40k iterations.

As VOC12 + Aug, but for the values below, on the finely annotated images and their 19 classes.
Source: MMSelfSup v0.11.0, configs/benchmarks/mmsegmentation/cityscapes/fcn_r50-d8_769x769_40k_cityscapes.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from simclr.benchmarks import voc12aug_segmentation
from simclr.protocol import Column, Metrics

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "Cityscapes Segmentation"

COLUMNS = {
    "miou": Column("mIoU"),
}


class Config(voc12aug_segmentation.Config):
    """FCN on Cityscapes; the defaults are MMSelfSup v0.11.0, fcn_r50-d8_769x769_40k_cityscapes.py."""

    dataset: ClassVar[str] = "cityscapes"
    packaged: ClassVar[str] = "fcn/fcn_r50-d8_4xb2-40k_cityscapes-769x769.py"
    subfolder: ClassVar[str] = "."

    iterations: int = Field(40_000, ge=1, description="Training steps (MMSelfSup schedule_40k.py).")
    batch_size: int = Field(8, ge=2, description="Images per step over all GPUs; published as 4 GPUs × 2.")
    resize: tuple[int, int] = Field(
        (2049, 1025),
        description="Pixels: longest and shortest edge that an image is made to fit, aspect ratio kept; "
        "in training times a factor drawn from `scale`. Odd, because corners are aligned.",
    )
    crop: int = Field(769, ge=32, description="Edge in pixels of the training crop and of the test window.")
    align_corners: bool = Field(True, description="How logits are upsampled, in both heads.")
    slide_stride: int | None = Field(
        513,
        ge=1,
        description="Stride in pixels of a test window of edge `crop`; overlapping logits are averaged; "
        "null: whole images.",
    )
    checkpoint_every: int = Field(
        4_000, ge=1, description="Iterations between checkpoints; the last two are kept."
    )


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, picture: Path | None = None
) -> Metrics:
    """Fine-tune an FCN on `backbone`; return `miou`, `macc` and `aacc` of the val split in percent.

    Training goes on where a run with the same backbone, dataset and config under `work` was stopped.
    `picture` is a PNG to write, of some images with ground truth and prediction.
    """
    from simclr.benchmarks import _segmentation

    return _segmentation.evaluate(backbone, dataset, config, work, picture)
