"""ImageNet linear evaluation of the globally averaged last stage: LARS on one linear layer, backbone frozen.

Source: MMSelfSup v0.11.0, configs/benchmarks/classification/imagenet/
resnet50_linear-8xb512-coslr-90e_in1k.py, the SimSiam paper's setting. Features are not normalised. Reported
is the last epoch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from simclr.benchmarks._training import FrozenTraining
from simclr.protocol import Column, Metrics

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "ImageNet Linear Evaluation, AvgPool"

COLUMNS = {
    "avgpool": Column("AvgPool"),
}


class Config(FrozenTraining):
    """Defaults are the published protocol."""

    batch_size: int = Field(
        4096, ge=1, description="Images per step over all processes (MMSelfSup: 8 × 512)."
    )
    epochs: int = Field(90, ge=1, description="Passes over the training images; the last one is reported.")
    lr: float = Field(
        1.6,
        gt=0,
        description="Learning rate of LARS at first; then half a cosine over the epochs, constant within "
        "one, without warm-up.",
    )
    weight_decay: float = Field(0, ge=0, description="L2 penalty inside LARS of the weights and of the bias.")
    trust_coefficient: float = Field(
        1e-3, gt=0, description="Of LARS; weights and bias are both adapted (MMSelfSup: eta)."
    )


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, curve: Path | None = None
) -> Metrics:
    """Return top-1 (`avgpool`) and top-5 (`avgpool_top5`) on the val split in percent.

    `work` holds the rolling checkpoints; `curve` is the CSV file of the learning curve, with a picture beside
    it. Raises `BadInput` for another dataset, for labels that the dataset does not have, for a diverging
    training, and while another run uses the same state.
    """
    from simclr.benchmarks import _images, _linear

    metrics, details = _linear.linear_evaluation(
        backbone,
        dataset,
        config,
        work,
        curve,
        transform=_images.train_transform(config),
        heads=one_head,
        inputs=lambda network, images: {"avgpool": network(images)},
        optimizer=partial(lars, config),
        schedule=_linear.cosine(config.epochs),
    )
    return Metrics(metrics, details=details)


def lars(config: Config, parameters: Any) -> Any:
    """Return LARS, which adapts weights and bias alike."""
    from simclr.optim import LARS

    return LARS(parameters, config.lr, config.momentum, config.weight_decay, config.trust_coefficient)


def one_head(channels: dict[str, int], classes: int, generator: Any) -> Any:
    """Return the linear layer on `avgpool`."""
    from simclr.benchmarks._linear import Heads, classifier

    return Heads({"avgpool": classifier(channels["avgpool"], classes, generator)})
