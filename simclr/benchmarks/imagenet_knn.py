"""ImageNet Nearest-Neighbor Classification."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.features import Features

TITLE = "ImageNet Nearest-Neighbor Classification"

COLUMNS = {
    "k10": Column("k=10"),
    "k20": Column("k=20"),
    "k100": Column("k=100"),
    "k200": Column("k=200"),
}


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "imagenet"


def evaluate(train: Features, test: Features, config: Config) -> Metrics:
    raise NotImplementedError
