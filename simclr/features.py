"""Features: one pass of a backbone over a split of a dataset, and reading it back.

A features folder holds one `(N, D)` array per layer, `labels.npy` and, written last, `manifest.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from simclr import BadInput, transforms
from simclr.checkpoint import Backbone
from simclr.config import FeatureSet
from simclr.datasets import Dataset, Images, Samples, samples
from simclr.model import ResNet, pool
from simclr.results import DatasetStamp

# ---------------------------------------------------------------- reading


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
            layers = {name: _array(folder / f"{name}.npy", dim) for name, dim in manifest["dims"].items()}
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


def _array(path: Path, dim: int | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path.name} cannot be read: {error}; extract the features again") from error
    if dim is not None and array.shape[1:] != (dim,):
        raise BadInput(
            f"{path.name}: the manifest says dimension {dim}, found an array of shape {array.shape}; "
            "extract the features again"
        )
    return array


def _check_finite(array: np.ndarray, name: str, rows: int = 8192) -> None:
    for start in range(0, len(array), rows):
        finite = np.isfinite(array[start : start + rows]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise BadInput(f"{name}: row {row} holds NaN or infinity; extract the features again")


# ---------------------------------------------------------------- extracting

OURS = {"manifest.json", "labels.npy", ".snakemake_timestamp"}


def extract(backbone: Backbone, dataset: Dataset, split: str, config: FeatureSet, output: Path) -> None:
    """Write the features of a split of `dataset` as the folder `output`, whole or not at all.

    One pass in evaluation mode (running BatchNorm statistics, no gradients, full float32), on the GPU where
    there is one. Row i of every array belongs to sample i of the split; `batch_size` changes no value beyond
    the rounding of float32. Raises `BadInput` when the disk is too small, an image cannot be decoded, or a
    feature is not finite; `RuntimeError` when a row was not written exactly once.
    """
    listed = samples(dataset, split)
    model = backbone.model()
    dims = _dims(model, config)
    with _replacing_folder(Path(output)) as part:
        layers = _allocate(part, dims, len(listed), config.dtype)
        written = np.zeros(len(listed), np.int64)
        for index, features in _batches(model, listed, config, f"{dataset.name} {split}"):
            for name, values in features.items():
                _require_finite(values, name, index, listed)
                layers[name][index] = values.numpy()
            np.add.at(written, index, 1)
        if (written != 1).any():
            row = int(np.argmax(written != 1))
            raise RuntimeError(f"row {row} was written {written[row]} times instead of once")
        for array in layers.values():
            array.flush()
        np.save(part / "labels.npy", listed.labels)
        _write_manifest(part, backbone, dataset, split, config, dims, len(listed))


def _dims(model: ResNet, config: FeatureSet) -> dict[str, int]:
    """Return the number of values of one image in each configured layer."""
    one = torch.zeros(1, 3, config.crop, config.crop)
    return {name: values.shape[1] for name, values in _layers(model, one, config).items()}


def _layers(model: ResNet, images: Tensor, config: FeatureSet) -> dict[str, Tensor]:
    """Return the configured layers of `images` `(N, 3, H, W)`, each `(N, D)`, in the configured type."""
    cudnn = torch.backends.cudnn
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    # `flags` would set what it is not told to its own defaults, of which one is cuDNN off.
    with torch.inference_mode(), cudnn.flags(**kept, allow_tf32=False):
        maps = model.forward_features(images)
        pooled = pool({name: maps[name] for name in config.layers}, config.pooling)
        return {name: values.to(getattr(torch, config.dtype)) for name, values in pooled.items()}


def _batches(
    model: ResNet, listed: Samples, config: FeatureSet, what: str
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield sample indices `(n,)` and features on the CPU, batch by batch, with progress."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transform = getattr(transforms, config.transform)(config.resize, config.crop)
    loader = DataLoader(
        Images(listed.paths, listed.labels, transform),
        batch_size=config.batch_size,
        num_workers=_workers(),
        pin_memory=device == "cuda",
    )
    model.to(device)
    with tqdm(total=len(listed), desc=what, unit=" images", mininterval=1) as progress:
        for images, _, index in loader:
            features = _layers(model, images.to(device, non_blocking=True), config)
            yield index.numpy(), {name: values.cpu() for name, values in features.items()}
            progress.update(len(index))


def _workers() -> int:
    """Return how many processes decode images: none on one or two cores, where they would only compete."""
    cores = len(os.sched_getaffinity(0))
    return 0 if cores <= 2 else min(cores - 1, 16)


def _require_finite(values: Tensor, name: str, index: np.ndarray, listed: Samples) -> None:
    finite = torch.isfinite(values).all(dim=1).numpy()
    if not finite.all():
        row = index[np.argmin(finite)]
        remedy = "; store them with dtype: float32" if values.dtype == torch.float16 else ""
        raise BadInput(
            f"{name}: NaN or infinity in row {row} ({listed.paths[int(row)]}); features must be finite "
            f"{str(values.dtype).removeprefix('torch.')} numbers{remedy}"
        )


# ---------------------------------------------------------------- the folder


def _allocate(folder: Path, dims: dict[str, int], rows: int, dtype: str) -> dict[str, np.ndarray]:
    """Create one `(rows, D)` array per layer, its space on disk reserved; raises `BadInput` if short."""
    sizes = {name: rows * dim * np.dtype(dtype).itemsize for name, dim in dims.items()}
    free = shutil.disk_usage(folder).free
    if sum(sizes.values()) > free:
        raise BadInput(
            f"{folder.parent.resolve()}: {rows} images need {sum(sizes.values()) / 1e9:.1f} GB "
            f"({', '.join(dims)} in {dtype}), but {free / 1e9:.1f} GB are free; choose fewer layers, "
            "dtype: float16, or another disk"
        )
    layers = {}
    for name, dim in dims.items():
        path = folder / f"{name}.npy"
        layers[name] = open_memmap(path, mode="w+", dtype=dtype, shape=(rows, dim))
        with path.open("r+b") as file:  # a disk that fills up later would kill the process without a word
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return layers


def _write_manifest(
    folder: Path,
    backbone: Backbone,
    dataset: Dataset,
    split: str,
    config: FeatureSet,
    dims: dict[str, int],
    images: int,
) -> None:
    manifest = {
        "checkpoint_sha256": backbone.checkpoint_sha256,
        "architecture": backbone.architecture,
        "dataset": dataset.dataset.model_dump(),
        "split": split,
        "images": images,
        "transform": {
            "name": config.transform,
            **{"resize": config.resize, "crop": config.crop},
            **{"mean": transforms.MEAN, "std": transforms.STD},
        },
        "pooling": config.pooling,
        "dims": dims,
        "dtype": config.dtype,
        "finished": True,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


@contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success rename it to `path`, else remove it.

    Raises `BadInput` when `path` holds something else than features.
    """
    others = [entry.name for entry in path.iterdir() if not _is_ours(entry.name)] if path.is_dir() else []
    if others or path.is_file():
        found = f"a folder with {', '.join(sorted(others)[:3])}" if others else "a file"
        raise BadInput(f"{path}: expected no folder or one of features, found {found}; name another --output")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if path.is_dir():
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_ours(name: str) -> bool:
    layers = FeatureSet.model_json_schema()["properties"]["layers"]["items"]["enum"]
    return name in OURS or name.removesuffix(".npy") in layers
