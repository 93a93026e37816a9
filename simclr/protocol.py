"""What every benchmark file is made of: a closed, versioned config; columns; metrics."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class Closed(BaseModel):
    """A config block in which every unknown key, and every number that is not finite, is an error.

    Numbers may stand in quotes: YAML 1.1 reads an unquoted 1e-6 as text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Protocol(Closed):
    """Base of every benchmark's `Config`; its defaults are the published protocol."""

    dataset: ClassVar[str]  # the name under `datasets:` whose manifest this benchmark needs

    version: int = Field(1, ge=1, description="Raise it when a change of the code must rerun this benchmark.")


class Column(NamedTuple):
    """One column of the page: how the metric of that key is headed, written and compared."""

    heading: str
    unit: str = "%"
    format: str = "{:.2f}"


class Metrics(dict[str, float]):
    """Metric key → value: what `evaluate` returns.

    `spread[key]` is the standard deviation over `trials[key]` trials, where the protocol has trials.
    `details` holds what a reader may want beside the numbers (chosen costs, per-class scores); it is JSON.
    """

    def __init__(
        self,
        values: dict[str, float] = (),
        spread: dict[str, float] | None = None,
        trials: dict[str, int] | None = None,
        details: dict[str, Any] | None = None,
    ):
        super().__init__({key: float(value) for key, value in dict(values).items()})
        self.spread = spread or {}
        self.trials = trials or {}
        self.details = details or {}
