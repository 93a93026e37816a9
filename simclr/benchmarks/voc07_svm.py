"""VOC SVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.features import Features

TITLE = "VOC SVM"

COLUMNS = {
    "best_layer": Column("Best Layer", unit="", format="feature{:.0f}"),
    "svm": Column("SVM"),
}


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "voc2007"


def evaluate(train: Features, test: Features, config: Config) -> Metrics:
    raise NotImplementedError
