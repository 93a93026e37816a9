"""Records: what a benchmark measured, or a pretraining was; written whole, validated on write and on read."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, FiniteFloat, ValidationError

from simclr import BadInput, __version__
from simclr.files import replacing
from simclr.protocol import Closed

Sha256 = str
Kind = TypeVar("Kind", bound=Closed)


class Spread(Closed):
    std: FiniteFloat = Field(ge=0, description="Standard deviation over the trials, in the metric's unit.")
    trials: int = Field(ge=2)


class DatasetStamp(Closed):
    name: str
    manifest_sha256: Sha256 = Field(pattern="^[0-9a-f]{64}$")


class Record(Closed):
    """The result of one benchmark for one model: everything needed to trace a number of the page."""

    schema_version: Literal[1] = 1
    benchmark: str
    protocol_version: int
    model: str
    metrics: dict[str, FiniteFloat] = Field(min_length=1)
    spread: dict[str, Spread] = {}
    details: dict[str, Any] = {}
    config: dict[str, Any]
    checkpoint_sha256: Sha256 = Field(pattern="^[0-9a-f]{64}$")
    dataset: DatasetStamp
    software: dict[str, str]
    hardware: dict[str, Any]
    seconds: FiniteFloat = Field(ge=0)


class Pretraining(Closed):
    """How a backbone was pretrained: the record beside backbone.safetensors, pretrain.json."""

    schema_version: Literal[1] = 1
    checkpoint_sha256: Sha256 = Field(pattern="^[0-9a-f]{64}$")
    dataset: DatasetStamp
    recipe: dict[str, Any]
    execution: dict[str, Any]
    steps: int
    images_seen: int = Field(description="Over all epochs; those filled up to equal shares included.")
    skipped_steps: int = Field(description="Not finite, undone and left out.")
    skipped_images: list[str] = Field(description="Not decodable, replaced by the next one.")
    machines: list[dict[str, Any]] = Field(description="On what, from which step on; the last one ended it.")
    processes: int
    batch_norm_images: int = Field(description="Images whose statistics BatchNorm took, but for last steps.")
    precision: str
    knn: FiniteFloat | None = Field(description="The last online nearest-neighbour accuracy in percent.")
    seconds: FiniteFloat = Field(ge=0, description="Wall time, without what was lost to kills.")
    gpu_hours: FiniteFloat = Field(ge=0)
    images_per_second: FiniteFloat = Field(ge=0)
    peak_memory_gb: FiniteFloat = Field(
        ge=0, description="Of the first process: on its GPU, or on the CPU all that was resident."
    )
    software: dict[str, str]
    hardware: dict[str, Any]


def write(record: Closed, path: Path) -> None:
    """Write `record` as JSON, whole or not at all. Raises `BadInput` for a value that JSON cannot hold."""
    try:
        text = json.dumps(record.model_dump(), indent=1, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise BadInput(f"{path}: a record holds finite numbers only, but {error}") from error
    with replacing(path) as part:
        part.write_text(text + "\n")


def read(path: Path, kind: type[Kind] = Record) -> Kind:
    """Read and validate a record; raises `BadInput` naming the file and the offending key."""
    try:
        return kind.model_validate_json(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(f"{path}: no such record; make it with `snakemake {path}`") from error
    except IsADirectoryError as error:
        raise BadInput(f"{path}: expected a record, found a folder; give <model>/<benchmark>.json") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        again = f"run `snakemake {path}`" if kind is Record else "the page does without it"
        raise BadInput(
            f"{path}: not a valid record: {key or 'file'}: {first['msg']}; delete it and {again}"
        ) from error


def provenance(inputs: dict[str, Any]) -> tuple[Sha256, DatasetStamp]:
    """Return the one checkpoint and the one dataset that the opened inputs of a step come from.

    An input that has a `checkpoint_sha256` or a `dataset` (name, manifest_sha256) vouches for it.
    Raises `BadInput` when two inputs disagree.
    """
    stamps: dict[str, dict[str, Any]] = {"checkpoint_sha256": {}, "dataset": {}}
    for name, value in inputs.items():
        for key, found in stamps.items():
            if hasattr(value, key):
                found[name] = getattr(value, key)
    for key, found in stamps.items():
        values = list(found.values())
        if any(value != values[0] for value in values):
            listing = ", ".join(f"--{name} has {value}" for name, value in found.items())
            raise BadInput(f"all inputs must come from one {key.removesuffix('_sha256')}, but {listing}")
    return next(iter(stamps["checkpoint_sha256"].values())), next(iter(stamps["dataset"].values()))


def software() -> dict[str, str]:
    """Return the versions that a number depends on, and the git commit ("-dirty" when edited)."""
    packages = ["torch", "torchvision", "numpy", "scikit-learn", "pillow", "opencv-python-headless"]
    packages += ["pycocotools", "onedl-mmsegmentation", "onedl-mmcv", "onedl-mmengine"]
    versions = {"python": platform.python_version(), "simclr": __version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"commit": _commit(), **versions}


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown (git is not installed)"
    return described.stdout.strip() or "unknown (not a git checkout)"


def hardware() -> dict[str, Any]:
    """Return what the numbers were computed on: processor, cores, GPUs."""
    import torch

    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
