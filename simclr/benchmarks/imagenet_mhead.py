"""ImageNet linear evaluation of feature1 … feature5: five classifiers trained together on a frozen backbone.

Source: MMSelfSup v0.11.0, configs/benchmarks/classification/imagenet/
resnet50_mhead_linear-8xb32-steplr-90e_in1k.py and mmselfsup/models/heads/multi_cls_head.py. Reported is the
last epoch; MMSelfSup does not say which it published, OpenSelfSup, with the same protocol,
published the last.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from simclr.benchmarks._training import FrozenTraining
from simclr.protocol import Column, Metrics

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "ImageNet Linear Evaluation"

COLUMNS = {
    "feature1": Column("Feature1"),
    "feature2": Column("Feature2"),
    "feature3": Column("Feature3"),
    "feature4": Column("Feature4"),
    "feature5": Column("Feature5"),
}


class Config(FrozenTraining):
    """Defaults are the published protocol; Places205's and iNaturalist2018's are changes of it."""

    pooling: Literal["specified", "adaptive"] = Field(
        "specified",
        description="specified: the five average poolings of MMSelfSup's multi_pooling.py, for 224 pixels; "
        "adaptive: to grids of 12, 6, 4, 3, 2, for any other size.",
    )
    crop: Literal["random_resized", "shifted"] = Field(
        "random_resized",
        description="Crop of a training image. random_resized: of `crop_area`, resized to `image_size`; "
        "shifted: short edge and central crop to `resize`, then a random square of `image_size` (Places205).",
    )
    jitter: float = Field(
        0.4,
        ge=0,
        description="Brightness, contrast and saturation factors of every training image are drawn from "
        "1 ± this (MMSelfSup: ColorJitter 0.4, hue 0).",
    )
    lighting: float = Field(
        0.1,
        ge=0,
        description="Standard deviation of AlexNet's noise along the principal components of ImageNet's "
        "colours, before normalisation (MMSelfSup: Lighting).",
    )
    batch_size: int = Field(256, ge=2, description="Images per step over all processes (MMSelfSup: 8 × 32).")
    epochs: int = Field(90, ge=1, description="Passes over the training images; the last one is reported.")
    lr: float = Field(0.01, gt=0, description="Learning rate of SGD with Nesterov's momentum, at first.")
    milestones: tuple[int, ...] = Field(
        (30, 60), description="Epochs, from 0, at which the learning rate falls to a tenth."
    )
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty of the weights and of the biases.")

    @model_validator(mode="after")
    def _specified_needs_224(self) -> Config:
        if self.pooling == "specified" and self.image_size != 224:
            raise ValueError(
                f"pooling: specified is defined for image_size: 224; at image_size: {self.image_size} "
                "use adaptive"
            )
        return self


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, curve: Path | None = None
) -> Metrics:
    """Return top-1 (`feature1` …) and top-5 (`feature1_top5` …) on the val split in percent.

    All heads learn from one forward pass per batch. `work` holds the rolling checkpoints; `curve` is the CSV
    file of the learning curve, with a picture beside it. Raises `BadInput` for another dataset, for labels
    that the dataset does not have, for a diverging training, and while another run uses the same state.
    """
    import torch

    from simclr.benchmarks import _images, _linear
    from simclr.model import pool_layer

    def pooled(network: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = network.forward_features(images)
        return {layer: pool_layer(layer, features[layer], config.pooling) for layer in COLUMNS}

    metrics, details = _linear.linear_evaluation(
        backbone,
        dataset,
        config,
        work,
        curve,
        transform=_images.train_transform(config, config.crop, config.jitter, config.lighting),
        heads=five_heads,
        inputs=pooled,
        optimizer=partial(sgd, config),
        schedule=_linear.steps(config.milestones, 0.1),
    )
    return Metrics(metrics, details=details)


def sgd(config: Config, parameters: Any) -> Any:
    """Return SGD with Nesterov's momentum, which decays weights and biases alike."""
    from torch.optim import SGD

    nesterov = config.momentum > 0
    return SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=nesterov)


def five_heads(channels: dict[str, int], classes: int, generator: Any) -> Any:
    """Return for each layer BatchNorm over channels, without affine → flatten → linear.

    Momentum 0.1; the batch's statistics while training, running ones in the test.
    """
    from torch import nn

    from simclr.benchmarks._linear import Heads, classifier
    from simclr.model import GRID

    return Heads(
        {
            layer: nn.Sequential(
                nn.BatchNorm2d(channels[layer], affine=False),
                nn.Flatten(),
                classifier(channels[layer] * GRID[layer] ** 2, classes, generator),
            )
            for layer in COLUMNS
        }
    )
