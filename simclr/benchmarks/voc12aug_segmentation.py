"""Pascal VOC12 + Aug Segmentation: FCN-R50-D8, 512 × 512, 20k iterations.

Trained on VOC2012 train with its own masks and on the SBD images with theirs, tested on VOC2012 val.
Source: MMSelfSup v0.11.0, configs/benchmarks/mmsegmentation/voc12aug/fcn_r50-d8_512x512_20k_voc12aug.py.

The model and the pipelines are those that MMSegmentation 1.x packages; where these differ from the 0.x code
that made the published row, 0.x is followed:

- 1.x inherits ResNetV1c, whose stem of three convolutions cannot take SimCLR's `conv1`: plain ResNet here.
- 1.x fills crops of small images with black before normalisation: here, as in 0.x, with 0 after it.
- 1.x lets the learning rate reach its floor one iteration early: here, as in 0.x, after the last one.

Two differences stay. 0.x drops the last, smaller batch of every epoch; 1.x deals an endless stream of
permutations. 0.x evaluates during training (whether the best or the last was published is not stated); here
the weights after the last iteration are evaluated, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "Pascal VOC12 + Aug Segmentation"

COLUMNS = {
    "miou": Column("mIoU"),
}


class Config(Protocol):
    """FCN on VOC12 + Aug; the defaults are MMSelfSup v0.11.0, fcn_r50-d8_512x512_20k_voc12aug.py."""

    dataset: ClassVar[str] = "voc12aug"
    # Of MMSegmentation's packaged configs, the one that is built upon.
    packaged: ClassVar[str] = "fcn/fcn_r50-d8_4xb4-20k_voc12aug-512x512.py"
    # Where that config's `data_root` lies under the dataset's root.
    subfolder: ClassVar[str] = "VOC2012"

    iterations: int = Field(20_000, ge=1, description="Training steps (MMSelfSup schedule_20k.py).")
    batch_size: int = Field(16, ge=2, description="Images per step over all GPUs; published as 4 GPUs × 4.")
    lr: float = Field(0.01, gt=0, description="Of SGD, for backbone and heads alike; no warm-up.")
    lr_floor: float = Field(1e-4, ge=0, description="Learning rate at the end: min_lr of the poly policy.")
    power: float = Field(0.9, gt=0, description="Of the poly policy: (1 - t / iterations) ** power.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of SGD (MMSelfSup schedule_20k.py).")
    weight_decay: float = Field(5e-4, ge=0, description="On all parameters, BatchNorm and biases included.")
    resize: tuple[int, int] = Field(
        (2048, 512),
        description="Pixels: longest and shortest edge that an image is made to fit, aspect ratio kept; "
        "in training times a factor drawn from `scale`.",
    )
    scale: tuple[float, float] = Field((0.5, 2.0), description="Least and greatest factor on `resize`.")
    crop: int = Field(512, ge=32, description="Edge in pixels of the training crop.")
    category_ratio: float = Field(
        0.75,
        gt=0,
        le=1,
        description="A crop is drawn again, up to 10 times, if one class fills more of its labelled pixels.",
    )
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    contract_dilation: bool = Field(True, description="First block of a dilated stage: half the dilation.")
    decode_channels: int = Field(512, ge=1, description="Channels of the decode head (fcn_r50-d8.py).")
    auxiliary_channels: int = Field(256, ge=1, description="Channels of the auxiliary head, on stage 3.")
    auxiliary_weight: float = Field(0.4, ge=0, description="Weight of the auxiliary head's loss.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Of channels, before each head's last convolution.")
    align_corners: bool = Field(False, description="How logits are upsampled, in both heads.")
    slide_stride: int | None = Field(
        None, ge=1, description="Stride in pixels of a test window of edge `crop`; null: whole images."
    )
    checkpoint_every: int = Field(
        2_000, ge=1, description="Iterations between checkpoints; the last two are kept."
    )
    workers: int = Field(4, ge=0, description="Data-loading processes per GPU.")
    seed: int = Field(0, ge=0, description="Of data order, augmentation and heads; the source states none.")


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, picture: Path | None = None
) -> Metrics:
    """Fine-tune an FCN on `backbone`; return `miou`, `macc` and `aacc` of the val split in percent.

    Training goes on where a run with the same backbone, dataset and config under `work` was stopped.
    `picture` is a PNG to write, of some images with ground truth and prediction.
    """
    from simclr.benchmarks import _segmentation

    return _segmentation.evaluate(backbone, dataset, config, work, picture)
