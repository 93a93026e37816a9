"""Low-shot SVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.features import Features

TITLE = "Low-shot SVM"

COLUMNS = {
    "k1": Column("k=1"),
    "k2": Column("k=2"),
    "k4": Column("k=4"),
    "k8": Column("k=8"),
    "k16": Column("k=16"),
    "k32": Column("k=32"),
    "k64": Column("k=64"),
    "k96": Column("k=96"),
}


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "voc2007"


def evaluate(train: Features, test: Features, config: Config) -> Metrics:
    raise NotImplementedError
