"""The config keys that every benchmark that trains on classification images has; light, like all configs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from simclr.protocol import Protocol


class Training(Protocol):
    """Images, data order and length of a training; a subclass gives the published values of its own."""

    dataset: ClassVar[str] = "imagenet"

    image_size: int = Field(
        224, ge=16, description="Edge of the network's input in pixels (MMSelfSup v0.11.0, imagenet.py)."
    )
    resize: int = Field(
        256,
        ge=16,
        description="Short edge in pixels before the central crop of a test image (MMSelfSup v0.11.0, "
        "imagenet.py).",
    )
    crop_area: tuple[float, float] = Field(
        (0.08, 1.0),
        description="Least and greatest share of the image that a random resized crop shows (torchvision's "
        "own values, as in MMSelfSup v0.11.0).",
    )
    batch_size: int = Field(ge=1, description="Images per step over all processes.")
    epochs: int = Field(ge=1, description="Passes over the training images; the last one is reported.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of the optimiser (MMSelfSup v0.11.0).")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of the backbone's forward pass. float32: as published. bfloat16: on GPUs that have it, "
        "float32 elsewhere; classifiers on a frozen backbone are float32 anyway.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Of the classifier's first weights, the data order and the augmentation (MMSelfSup: 0).",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Training:
        if self.resize < self.image_size:
            raise ValueError(
                f"resize: {self.resize} is smaller than image_size: {self.image_size}; the central crop "
                "needs at least that many pixels"
            )
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_area: expected 0 < least ≤ greatest ≤ 1, found {low}, {high}")
        return self


class FrozenTraining(Training):
    """A training of classifiers on the features of a frozen backbone."""

    lr: float = Field(gt=0, description="Learning rate of the first epoch.")
    weight_decay: float = Field(ge=0, description="L2 penalty of every trained parameter, biases included.")
    micro_batch: int = Field(
        256,
        ge=1,
        description="Images per forward pass of the frozen backbone, a matter of memory; steps are taken on "
        "`batch_size` images whatever it is.",
    )
