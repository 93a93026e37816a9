"""Features: one pass of a backbone over a split of a dataset, and reading it back.

A features folder holds one `(N, D)` array per layer, `labels.npy` and, written last, `manifest.json`.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from simclr import BadInput, distributed, transforms
from simclr.checkpoint import Backbone
from simclr.config import FeatureSet
from simclr.datasets import Dataset, Images, Samples, samples
from simclr.files import is_full, locked, replacing, workplace
from simclr.loading import cores, pieces
from simclr.model import ResNet, pool
from simclr.results import DatasetStamp

# ---------------------------------------------------------------- reading

MADE = "transform", "pooling", "dtype"


@dataclass(frozen=True, eq=False)
class Features:
    """Features of every image of one split: `layers[name]` is `(N, D)`, `labels` `(N,)` or `(N, C)`.

    Raises `BadInput` when the arrays do not fit each other, a feature is not finite, or a label is beyond the
    `classes` of the manifest.
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
        if "classes" in self.manifest:
            _check_labels(self.labels, self.manifest["classes"])

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

    @property
    def made(self) -> dict[str, Any]:
        """How they were made: `transform`, `pooling` and `dtype`; nothing of features made in memory."""
        return {key: self.manifest[key] for key in MADE if key in self.manifest}

    @cached_property
    def dataset(self) -> DatasetStamp:
        """The dataset that the images come from."""
        try:
            return DatasetStamp.model_validate(self._stamp("dataset"))
        except ValidationError as error:
            found = error.errors()[0]
            key = ".".join(map(str, ["dataset", *found["loc"]]))
            raise BadInput(
                f"the manifest of these features: {key}: {found['msg']}; extract the features again"
            ) from error

    def _stamp(self, key: str) -> Any:
        if key not in self.manifest:
            raise BadInput(f"the manifest of these features has no {key}; extract the features again")
        return self.manifest[key]


def _manifest(folder: Path) -> dict[str, Any]:
    again = f"delete it and run `snakemake {folder}`"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "half-written features (no manifest.json)" if folder.is_dir() else "no such features folder"
        raise BadInput(f"{folder}: {what}; {again}") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{folder}: manifest.json is not valid JSON: {error}; {again}") from error
    if not isinstance(manifest, dict) or manifest.get("finished") is not True or "dims" not in manifest:
        raise BadInput(f"{folder}: half-written features (manifest.json does not say finished); {again}")
    for key in ("dims", "dataset"):
        if not isinstance(manifest.get(key, {}), dict):
            raise BadInput(
                f"{folder}: manifest.json: {key}: expected a mapping, found {manifest[key]!r}; {again}"
            )
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


def copied(array: np.ndarray, rows: slice = slice(None), dtype: str | None = None) -> np.ndarray:
    """Return a copy of `rows` of `array`, as `dtype` if one is given.

    What was read of a memory-mapped file counts as memory of this process for as long as it is mapped, until
    in the end all of it does. So a copy lets it go; the system keeps it while it has room.
    """
    copy = np.array(array[rows], dtype)
    if isinstance(array.base, mmap.mmap) and not array.flags.writeable:
        array.base.madvise(mmap.MADV_DONTNEED)
    return copy


def _check_finite(array: np.ndarray, name: str, rows: int = 8192) -> None:
    for start in range(0, len(array), rows):
        finite = np.isfinite(copied(array, slice(start, start + rows))).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise BadInput(f"{name}: row {row} holds NaN or infinity; extract the features again")


def _check_labels(labels: np.ndarray, classes: int) -> None:
    """Raise `BadInput` unless `labels` are class numbers `(N,)`, or `(N, C)` from −1 to 1, of C `classes`."""
    lowest, highest = (0, classes - 1) if labels.ndim == 1 else (-1, 1)
    wrong = np.argwhere((labels < lowest) | (labels > highest))
    if len(wrong):
        place = tuple(wrong[0])
        raise BadInput(
            f"labels: expected {lowest} to {highest} for {classes} classes, found {labels[place]} in row "
            f"{place[0]}; verify the dataset and extract the features again"
        )
    if labels.ndim == 2 and labels.shape[1] != classes:
        raise BadInput(
            f"labels: expected a column for each of {classes} classes, found {labels.shape[1]}; verify the "
            "dataset and extract the features again"
        )


def check_splits(
    train: Features, test: Features, dataset: str, splits: tuple[str, str], layers: list[str]
) -> None:
    """Raise `BadInput` unless these are the two `splits` of `dataset`, with `layers`, and made in one way.

    What their manifests do not tell, as of features in memory, is taken for granted.
    """
    for option, features, split in zip(("train", "test"), (train, test), splits, strict=True):
        manifest = features.manifest
        found = manifest.get("dataset", {}).get("name", dataset), manifest.get("split", split)
        if found != (dataset, split):
            raise BadInput(
                f"--{option}: expected the features of {dataset} {split}, found those of {' '.join(found)}; "
                f"give the folder {dataset}-{split}"
            )
        for layer in layers:
            if layer not in features.layers:
                raise BadInput(
                    f"{option} features have no {layer}, only {', '.join(features.layers)}; add it to "
                    f"features.{dataset}.layers and extract them again, or choose another layer"
                )
    for key in MADE:
        ours, theirs = train.made.get(key), test.made.get(key)
        if ours != theirs:
            raise BadInput(
                f"train and test features must have one {key}, but --train has {ours} and --test has "
                f"{theirs}; extract one of them again"
            )
    for layer in layers:
        widths = [features.layers[layer].shape[1] for features in (train, test)]
        if widths[0] != widths[1]:
            raise BadInput(f"{layer}: train features are {widths[0]} wide, test features {widths[1]}")


# ---------------------------------------------------------------- extracting

OURS = {"manifest.json", "labels.npy", ".snakemake_timestamp"}

# Images that are computed before they count as done: what a kill may lose, for each process.
SHARD = 4096


def extract(
    backbone: Backbone, dataset: Dataset, split: str, config: FeatureSet, work: Path, output: Path
) -> None:
    """Write the features of a split of `dataset` as the folder `output`, whole or not at all.

    One pass in evaluation mode (running BatchNorm statistics, no gradients, full float32), on the GPU where
    there is one. Row i of every array belongs to sample i of the split; `batch_size` changes no value beyond
    the rounding of float32. `work`, a folder on the disk of `output`, holds the arrays while they are
    written, shard by shard; a run that was killed goes on with the shards that are missing, if it is of the
    same backbone, dataset and config. Under `torchrun`, on one machine, the processes share the shards. The
    batches are the same in every case, and so is every bit.

    Raises `BadInput` when the disk is too small, an image cannot be decoded, a feature is not finite, a label
    is no class of the dataset, `output` holds something else, or another run works on the same;
    `RuntimeError` when a row was not written exactly once.
    """
    listed = samples(dataset, split)
    _check_labels(listed.labels, dataset.classes)
    _check_places(Path(work), Path(output))
    model = backbone.model()
    dims = _dims(model, config)
    shards = _shards(len(listed), config.batch_size)
    with distributed.process_group() as device:
        run = _run(backbone, dataset, split, config, shards[0], device, Path(output))
        with workplace(Path(work), run) as folder:
            if distributed.rank() == 0:
                _drop_outdated(Path(work), folder, run)
                _prepare(folder, dims, len(listed), config.dtype)
            distributed.barrier()
            missing = [shard for shard in shards if not _mark(folder, shard).exists()]
            distributed.barrier()  # all ranks have looked before the first one marks another shard
            mine = missing[distributed.rank() :: distributed.world_size()]
            _fill(folder, mine, dims, model.to(device), listed, config, f"{dataset.name} {split}")
            distributed.barrier()
            if distributed.rank() == 0:
                np.save(folder / "features/labels.npy", listed.labels)
                _write_manifest(folder / "features", backbone, dataset, split, config, dims, len(listed))
                _move(folder / "features", Path(output))
                shutil.rmtree(folder)


def _shards(images: int, batch_size: int) -> list[range]:
    """Cut the rows into shards of whole batches: the batches are the same whatever is there already."""
    rows = max(SHARD // batch_size, 1) * batch_size
    return [range(start, min(start + rows, images)) for start in range(0, images, rows)]


def _fill(
    folder: Path,
    shards: list[range],
    dims: dict[str, int],
    model: ResNet,
    listed: Samples,
    config: FeatureSet,
    what: str,
) -> None:
    """Compute and write `shards`, marking each as done once it is on the disk."""
    layers = {name: open_memmap(folder / f"features/{name}.npy", mode="r+") for name in dims}
    stream = _batches(model, listed, config, shards, what)
    for shard in shards:
        _write_shard(layers, shard, islice(stream, len(pieces(shard, config.batch_size))), listed)
        for array in layers.values():
            array.flush()
            array.base.madvise(mmap.MADV_DONTNEED)  # else it counts as memory until the last shard
        _mark(folder, shard).touch()


def _write_shard(
    layers: dict[str, np.ndarray],
    shard: range,
    batches: Iterable[tuple[np.ndarray, dict[str, Tensor]]],
    listed: Samples,
) -> None:
    """Write batches of (sample indices, features); raises `RuntimeError` unless each row is written once."""
    written = np.zeros(len(listed), np.int64)
    for index, features in batches:
        for name, values in features.items():
            _require_finite(values, name, index, listed)
            layers[name][index] = values.numpy()
        np.add.at(written, index, 1)
    expected = np.zeros_like(written)
    expected[shard.start : shard.stop] = 1
    if (written != expected).any():
        row = int(np.argmax(written != expected))
        raise RuntimeError(f"row {row} was written {written[row]} times instead of {expected[row]}")


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
    model: ResNet, listed: Samples, config: FeatureSet, shards: list[range], what: str
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield sample indices `(n,)` and features on the CPU, batch by batch of all `shards`, with progress."""
    device = next(model.parameters()).device
    transform = getattr(transforms, config.transform)(config.resize, config.crop)
    loader = DataLoader(
        Images(listed.paths, listed.labels, transform),
        batch_sampler=[batch for shard in shards for batch in pieces(shard, config.batch_size)],
        num_workers=_workers(),
        pin_memory=device.type == "cuda",
    )
    rank, world = distributed.rank(), distributed.world_size()
    bar = tqdm(
        desc=what if world == 1 else f"{what}, process 1 of {world}",
        total=sum(map(len, shards)),
        unit=" images",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=rank > 0,
    )
    with bar:
        for images, _, index in loader:
            features = _layers(model, images.to(device, non_blocking=True), config)
            bar.update(len(index))
            yield index.numpy(), {name: values.cpu() for name, values in features.items()}


def _workers() -> int:
    """Return how many processes decode images: none on one or two cores, where they would only compete."""
    return 0 if cores() <= 2 else min(cores() - 1, 16)


def _require_finite(values: Tensor, name: str, index: np.ndarray, listed: Samples) -> None:
    finite = torch.isfinite(values).all(dim=1).numpy()
    if not finite.all():
        row = index[np.argmin(finite)]
        remedy = "; store them with dtype: float32" if values.dtype == torch.float16 else ""
        raise BadInput(
            f"{name}: NaN or infinity in row {row} ({listed.paths[int(row)]}); features must be finite "
            f"{str(values.dtype).removeprefix('torch.')} numbers{remedy}"
        )


# ---------------------------------------------------------------- the work folder


def _run(
    backbone: Backbone,
    dataset: Dataset,
    split: str,
    config: FeatureSet,
    first_shard: range,
    device: torch.device,
    output: Path,
) -> dict[str, Any]:
    """Return all that decides what a shard holds and where it ends up."""
    return {
        "step": "features",
        "checkpoint": backbone.checkpoint_sha256,
        "dataset": dataset.dataset.manifest_sha256,
        "split": split,
        "config": config.model_dump(mode="json"),
        "shard": len(first_shard),
        "device": device.type,
        "torch": torch.__version__,
        "output": str(output.resolve()),
    }


def _check_places(work: Path, output: Path) -> None:
    """Make the folders above; raise `BadInput` unless a folder in `work` can take the place of `output`."""
    others = [each.name for each in output.iterdir() if not _is_ours(each.name)] if output.is_dir() else []
    if others or output.is_file():
        found = f"a folder with {', '.join(sorted(others)[:3])}" if others else "a file"
        raise BadInput(
            f"{output}: expected no folder or one of features, found {found}; name another --output"
        )
    for folder in (work, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if work.stat().st_dev != output.parent.stat().st_dev:
        raise BadInput(f"--work {work} and --output {output} are on two disks; name folders of one")


def _is_ours(name: str) -> bool:
    layers = FeatureSet.model_json_schema()["properties"]["layers"]["items"]["enum"]
    return name in OURS or name.removesuffix(".npy") in layers


def _drop_outdated(work: Path, folder: Path, run: dict[str, Any]) -> None:
    """Delete what other runs, of another backbone, dataset or config, left for the same output."""
    for other in work.glob("*/run.json"):
        if other.parent != folder and json.loads(other.read_text()).get("output") == run["output"]:
            with locked(other.parent):
                shutil.rmtree(other.parent)


def _prepare(folder: Path, dims: dict[str, int], rows: int, dtype: str) -> None:
    """Make the arrays that the shards are written to, unless an earlier run did; then its marks count."""
    if (folder / "features").is_dir():
        return
    for name in ("shards", "allocating"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    _allocate(folder / "allocating", dims, rows, dtype)
    (folder / "allocating").rename(folder / "features")


def _allocate(folder: Path, dims: dict[str, int], rows: int, dtype: str) -> None:
    """Create one `(rows, D)` array per layer, its space on disk reserved; raises `BadInput` if short."""
    size = rows * sum(dims.values()) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(folder).free
    needed = f"{folder.resolve()}: {rows} images need {size / 1e9:.1f} GB ({', '.join(dims)} in {dtype})"
    remedy = "choose fewer layers, dtype: float16, or another disk"
    if size > free:
        raise BadInput(f"{needed}, but {free / 1e9:.1f} GB are free; {remedy}")
    try:
        for name, dim in dims.items():
            path = folder / f"{name}.npy"
            open_memmap(path, mode="w+", dtype=dtype, shape=(rows, dim))
            with path.open("r+b") as file:  # a disk that fills up later would kill the process without a word
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:  # a quota, or another process has filled the disk meanwhile
        if is_full(folder, error):
            raise BadInput(f"{needed}, but the disk or the quota is used up; {remedy}") from error
        raise


def _mark(folder: Path, shard: range) -> Path:
    """Return the file that is there once the shard is."""
    return folder / f"shards/{shard.start}"


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
        "classes": dataset.classes,
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
    with replacing(folder / "manifest.json") as part:
        part.write_text(json.dumps(manifest, indent=1) + "\n")


def _move(folder: Path, output: Path) -> None:
    """Put `folder` in the place of `output`."""
    if output.is_dir():
        shutil.rmtree(output)
    folder.rename(output)
