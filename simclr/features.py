"""Features: one pass of a backbone over a split of a dataset, and reading it back.

A features folder holds one `(N, D)` array per layer, `labels.npy` and, written last, `manifest.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from simclr import BadInput
from simclr.results import DatasetStamp


@dataclass(frozen=True, eq=False)
class Features:
    """Features of every image of one split: `layers[name]` is `(N, D)`, `labels` `(N,)` or `(N, C)`.

    Raises `BadInput` when the arrays do not fit each other or hold a value that is not finite.
    """

    layers: dict[str, np.ndarray]
    labels: np.ndarray
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise BadInput("features need at least one layer")
        for name, array in self.layers.items():
            if array.ndim != 2 or len(array) != len(self.labels):
                raise BadInput(
                    f"{name}: expected one row for each of {len(self.labels)} labels; found an array of "
                    f"shape {array.shape}; extract the features again"
                )
            _check_finite(array, name)

    @classmethod
    def open(cls, folder: Path) -> Features:
        """Open a features folder, memory-mapped; raises `BadInput` when it is not whole."""
        folder = Path(folder)
        manifest = _manifest(folder)
        try:
            layers = {name: _array(folder / f"{name}.npy") for name in manifest["dims"]}
            return cls(layers, _array(folder / "labels.npy"), manifest)
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from error

    @property
    def checkpoint_sha256(self) -> str:
        """SHA-256 of the backbone file that the features come from."""
        return self._stamp("checkpoint_sha256")

    @cached_property
    def dataset(self) -> DatasetStamp:
        """The dataset that the images come from."""
        return DatasetStamp.model_validate(self._stamp("dataset"))

    def _stamp(self, key: str) -> Any:
        if key not in self.manifest:
            raise BadInput(f"the manifest of these features has no {key}; extract the features again")
        return self.manifest[key]


def _manifest(folder: Path) -> dict[str, Any]:
    again = f"delete it and run `snakemake {folder}`"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError as error:
        what = "half-written features (no manifest.json)" if folder.is_dir() else "no such features folder"
        raise BadInput(f"{folder}: {what}; {again}") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{folder}: manifest.json is not valid JSON: {error}; {again}") from error
    if not isinstance(manifest, dict) or manifest.get("finished") is not True or "dims" not in manifest:
        raise BadInput(f"{folder}: half-written features (manifest.json does not say finished); {again}")
    return manifest


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path.name} cannot be read: {error}; extract the features again") from error


def _check_finite(array: np.ndarray, name: str, rows: int = 8192) -> None:
    for start in range(0, len(array), rows):
        finite = np.isfinite(array[start : start + rows]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise BadInput(f"{name}: row {row} holds NaN or infinity; extract the features again")
