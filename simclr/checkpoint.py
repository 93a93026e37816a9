"""Backbones on disk: exact load and save, import of foreign checkpoints, random weights.

A backbone is a safetensors file with torchvision's ResNet key names, without `fc`, in float32 (the BatchNorm
counters are int64). Its metadata says `architecture`, `recipe`, `epochs` and `source`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from simclr import BadInput
from simclr.model import ResNet, resnet
from simclr.results import replacing, sha256

# ---------------------------------------------------------------- the backbone file


@dataclass(frozen=True)
class Backbone:
    """A backbone file whose keys, shapes and types have been checked against its architecture."""

    path: Path
    architecture: str
    metadata: dict[str, str]
    checkpoint_sha256: str

    @classmethod
    def open(cls, path: Path) -> Backbone:
        """Check the file at `path` and return it; raises `BadInput` as `load_backbone` does."""
        path = Path(path)
        metadata, _ = _read(path)
        return cls(path, metadata["architecture"], metadata, sha256(path))

    def state(self) -> dict[str, Tensor]:
        """Return every tensor of the file by its torchvision key."""
        return load_backbone(self.path)

    def model(self) -> ResNet:
        """Return the network with exactly these weights, in evaluation mode, on the CPU."""
        return build(self.architecture, self.state())


def load_backbone(path: Path) -> dict[str, Tensor]:
    """Return every tensor of the backbone file at `path` by its torchvision key.

    Raises `BadInput` when the file is not there, cannot be read, or has a missing, unexpected, mis-shaped or
    mistyped key.
    """
    return _read(Path(path))[1]


def save_backbone(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `state` to `path` as a backbone of `metadata["architecture"]`, whole or not at all.

    Raises `BadInput` when the keys do not fit the architecture exactly or a weight is not finite.
    """
    if "architecture" not in metadata:
        raise BadInput(f"{path}: the metadata of a backbone name its architecture; found {sorted(metadata)}")
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    check(state, metadata["architecture"], str(path))
    with replacing(path) as part:
        save_file(state, part, metadata=metadata)
        _sort_metadata(part)


def build(architecture: str, state: Mapping[str, Tensor]) -> ResNet:
    """Return the ResNet that holds exactly `state`, in evaluation mode."""
    with torch.device("meta"):
        model = resnet(architecture)
    model.load_state_dict(dict(state), strict=True, assign=True)
    return model.eval()


def check(state: Mapping[str, Tensor], architecture: str, where: str) -> None:
    """Raise `BadInput` naming every key of `state` that is not exactly what `architecture` has."""
    expected = layout(architecture)
    shapes = [
        f"{key} (expected {_kind(expected[key])}, found {_kind(state[key])})"
        for key in expected
        if key in state and _kind(state[key]) != _kind(expected[key])
    ]
    faults = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "mis-shaped": shapes,
    }
    if any(faults.values()):
        listing = "; ".join(f"{name}: {_some(keys)}" for name, keys in faults.items() if keys)
        raise BadInput(f"{where}: expected exactly the {len(expected)} tensors of {architecture}; {listing}")
    infinite = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if infinite:
        raise BadInput(f"{where}: weights must be finite numbers; NaN or infinity in {_some(infinite)}")


def layout(architecture: str) -> dict[str, Tensor]:
    """Return the tensors that a backbone of `architecture` has, without storage (device "meta")."""
    with torch.device("meta"):
        return resnet(architecture).state_dict()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    metadata, state = read_safetensors(path)
    if "architecture" not in metadata:
        raise BadInput(
            f"{path}: not a backbone of this program (its metadata name no architecture); "
            "take it in with `python -m simclr import_checkpoint`"
        )
    check(state, metadata["architecture"], str(path))
    return metadata, state


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library's order, and so the hash, is random."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise RuntimeError(f"{path}: the sorted header has {len(text)} bytes instead of {size}")
        file.seek(8)
        file.write(text)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file; raises `BadInput` when it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; expected a safetensors file") from error
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{path}: expected a whole safetensors file; {error}; copy or make it again"
        ) from error


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _some(items: Iterable[str], most: int = 6) -> str:
    """Return the first `most` items in one line, and how many there are when that is more."""
    items = list(items)
    more = f", … ({len(items)} in all)" if len(items) > most else ""
    return ", ".join(items[:most]) + more
