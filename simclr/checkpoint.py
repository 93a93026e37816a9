"""Backbones on disk: exact load and save, import of foreign checkpoints, random weights.

A backbone is a safetensors file with torchvision's ResNet key names, without `fc`, in float32 (the BatchNorm
counters are int64). Its metadata says `architecture`, `recipe`, `epochs` and `source`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from simclr import BadInput
from simclr.config import ImportCheckpoint, RandomInit
from simclr.files import replacing, sha256
from simclr.model import ResNet, resnet

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
        part.write_bytes(_serialise(state, metadata))


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


def _serialise(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file with sorted metadata; the library's order, and so the hash, is random."""
    content = save(state, metadata=metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


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


# ---------------------------------------------------------------- random weights


def random_init(config: RandomInit, output: Path) -> None:
    """Write a backbone of random weights; the seed alone decides them, and no global generator moves."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(config.seed)
        state = resnet(config.architecture).state_dict()
    metadata = {
        "architecture": config.architecture,
        "recipe": "random_init",
        "epochs": "0",
        "source": f"random weights of seed {config.seed}",
    }
    save_backbone(output, state, metadata)


# ---------------------------------------------------------------- import


class KeyMap(NamedTuple):
    """Where a foreign checkpoint has its backbone.

    `containers`: keys of the file under which the tensors may lie. `prefix`: what the backbone's keys begin
    with; a file in which no key does is taken as already extracted if `extracted`. `dropped`: beginnings of
    keys, prefix included, that are known not to belong to a backbone.
    """

    containers: tuple[str, ...]
    prefix: str
    extracted: bool
    dropped: tuple[str, ...]


FORMATS = {
    # torchvision's own files are bare; its reference training script writes them under `model`.
    "torchvision": KeyMap(("state_dict", "model"), "", True, ("fc.",)),
    # MMSelfSup v0.11.0 tools/model_converters/extract_backbone_weights.py strips `backbone.`.
    "mmselfsup": KeyMap(("state_dict",), "backbone.", True, ("neck.", "head.", "data_preprocessor.")),
    # facebookresearch/moco main_moco.py: the query encoder under DistributedDataParallel.
    "moco": KeyMap(
        ("state_dict",),
        "module.encoder_q.",
        False,
        ("module.encoder_q.fc.", "module.encoder_k.", "module.queue"),
    ),
}


def import_checkpoint(config: ImportCheckpoint, output: Path) -> None:
    """Write the foreign checkpoint that `config` names as a backbone, with a certificate beside it.

    The certificate `backbone.certificate.json` lists the keys one to one, what was dropped and filled, the
    file's SHA-256, and the features of a fixed input. Raises `BadInput` when the file cannot be had, is not
    the one that `sha256` says, holds anything but tensors and plain values, or is not exactly a backbone of
    the architecture.
    """
    source = str(config.path or config.url)
    with _source_file(config, output) as path:
        digest = sha256(path)
        if config.sha256 and not digest.startswith(config.sha256):
            raise BadInput(f"{source}: expected a file of SHA-256 {config.sha256}…, found {digest}")
        tensors = read_foreign(path, config.format, source)
    state, report = translate(tensors, config.format, config.architecture, source)
    with torch.no_grad():
        found = build(config.architecture, state).forward_features(fixed_input())
        expected = plain_features({new: tensors[old] for new, old in report["keys"].items()}, fixed_input())
    features = {
        "compared_with": "the file's own tensors, by a forward pass written out on tensors",
        **agreement(found, expected),
    }
    metadata = {
        "architecture": config.architecture,
        "recipe": f"imported from {config.format}",
        "epochs": "unknown",
        "source": f"{source} sha256 {digest}",
    }
    certificate_path(output).unlink(missing_ok=True)
    save_backbone(output, state, metadata)
    write_certificate(
        output,
        architecture=config.architecture,
        format=config.format,
        source={"file": source, "sha256": digest},
        output={"file": Path(output).name, "sha256": sha256(output)},
        **report,
        features=features,
    )


def translate(
    tensors: dict[str, Tensor], format: str, architecture: str, source: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the backbone in foreign `tensors`, and what became of every key, for the certificate.

    Half-precision weights are widened to float32, which is exact; absent BatchNorm counters become 0.
    Raises `BadInput` when what remains is not exactly a backbone of `architecture`, or when a classifier of
    another input width shows that the file is of another architecture.
    """
    expected = layout(architecture)
    format_ = FORMATS[format]
    prefix = format_.prefix
    if format_.extracted and not any(key.startswith(prefix) for key in tensors):
        prefix = ""
    dropped = [key for key in tensors if key.startswith(format_.dropped)]
    _check_classifier({key: tensors[key] for key in dropped}, architecture, source)
    kept = [key for key in tensors if key not in dropped]
    strangers = [key for key in kept if not key.startswith(prefix)]
    if strangers:
        raise BadInput(
            f"{source}: expected the keys of a {format} file to begin with {prefix}; unexpected: "
            f"{_some(strangers)}; is it of another format ({', '.join(FORMATS)})?"
        )
    keys = {key.removeprefix(prefix): key for key in kept}
    state = {new: tensors[old] for new, old in keys.items()}
    widened = [key for key, value in state.items() if value.dtype in (torch.float16, torch.bfloat16)]
    state.update({key: state[key].float() for key in widened})
    counters = [key for key in expected if key.endswith("num_batches_tracked") and key not in state]
    state.update({key: torch.zeros((), dtype=torch.int64) for key in counters})
    check(state, architecture, f"{source} (read as {format})")
    return state, {
        "keys": {key: keys[key] for key in expected if key in keys},
        "dropped": dropped,
        "filled_with_0": counters,
        "widened_to_float32": widened,
    }


def _check_classifier(dropped: Mapping[str, Tensor], architecture: str, source: str) -> None:
    with torch.device("meta"):
        width = resnet(architecture).channels["avgpool"]
    for key, value in dropped.items():
        if re.search(r"(^|\.)fc\.(0\.)?weight$", key) and value.shape[1:] != (width,):
            raise BadInput(
                f"{source}: {key} takes {list(value.shape[1:])} features, but {architecture} has {width}; "
                "is the file of another architecture?"
            )


def read_foreign(path: Path, format: str, source: str) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` or PyTorch file by the file's keys; no code in it is run.

    Raises `BadInput` for a file that cannot be read, holds objects other than tensors and plain values, or
    has no dictionary of tensors where `format` has it.
    """
    if path.suffix == ".safetensors" or source.endswith(".safetensors"):
        return read_safetensors(path)[1]
    content = _load_tensors(path, source)
    containers = FORMATS[format].containers
    for name in containers:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not content:
        raise BadInput(f"{source}: expected a dictionary of tensors, found {type(content).__name__}")
    others = [key for key, value in content.items() if not (isinstance(key, str) and torch.is_tensor(value))]
    if others:
        raise BadInput(
            f"{source}: expected tensors by name, bare or under {' or '.join(containers)}; found others "
            f"under {_some(map(str, others))}; is it of format {format}?"
        )
    return content


# What torch.load raises for a damaged file; which one depends on the byte.
UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, struct.error),
)


def _load_tensors(path: Path, source: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"{source}: no such file; expected a checkpoint") from error
    except pickle.UnpicklingError as error:
        payload = re.search(r"GLOBAL ([\w.]+)", str(error))
        if payload:
            raise BadInput(
                f"{source}: refused, because it holds a Python object ({payload[1]}) that would run code on "
                "loading; expected tensors only: save its state_dict alone where it was made"
            ) from error
        raise BadInput(f"{source}: not a whole PyTorch checkpoint; copy or download it again") from error
    except UNREADABLE as error:
        raise BadInput(f"{source}: not a whole PyTorch checkpoint; copy or download it again") from error


@contextmanager
def _source_file(config: ImportCheckpoint, output: Path) -> Iterator[Path]:
    """Yield the file that `config` names; a download lies beside `output` until the import is done."""
    if config.path is not None:
        if not config.path.is_file():
            raise BadInput(f"{config.path}: no such checkpoint file")
        yield config.path
        return
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}.download")
    try:
        _download(config.url, part)
        yield part
    finally:
        part.unlink(missing_ok=True)


def _download(url: str, path: Path, timeout: float = 60) -> None:
    """Stream `url` to `path` with progress; raises `BadInput` when it does not arrive whole."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, path.open("wb") as file:
            size = response.headers.get("Content-Length")
            size = int(size) if size else None
            with tqdm.wrapattr(
                response, "read", total=size, desc=url.rsplit("/", 1)[-1], file=sys.stderr
            ) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
    except (OSError, HTTPException) as error:
        raise BadInput(
            f"{url}: download failed: {error}; check the url and the network, then run again"
        ) from error
    if size is not None and path.stat().st_size != size:
        raise BadInput(f"{url}: expected {size} bytes, found {path.stat().st_size}; run again")


# ---------------------------------------------------------------- certificates


TOLERANCE = 1e-5  # of the largest magnitude in a layer; the same float32 arithmetic in another order


def certificate_path(output: Path) -> Path:
    """Return where the certificate of the file `output` lies: beside it, as `<stem>.certificate.json`."""
    return Path(output).with_suffix(".certificate.json")


def write_certificate(output: Path, /, **content: Any) -> None:
    """Write the certificate of the file `output`: what became of every tensor, and the proof by features."""
    content["colour_order"] = "RGB, as this pipeline feeds it; conv1 is not permuted"
    content["stride"] = "in the 3x3 convolution of a bottleneck, not in the 1x1 before it"
    with replacing(certificate_path(output)) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def fixed_input() -> Tensor:
    """Return the input of every certificate: two images `(2, 3, 64, 64)` of normal noise, seed 0."""
    return torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))


def agreement(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how far the features of the fixed input agree, layer by layer, for the certificate.

    Compares the layers that both have; raises `BadInput` when one differs by more than `TOLERANCE` of its
    largest magnitude, or is not finite.
    """
    differences = {}
    for name in (name for name in expected if name in found):
        scale = expected[name].abs().max().item()
        difference = (found[name] - expected[name]).abs().max().item()
        if not difference <= TOLERANCE * scale:
            raise BadInput(
                f"the features of a fixed input do not agree with the source: {name} differs by "
                f"{difference:.3g} at a magnitude of {scale:.3g}"
            )
        differences[name] = difference / scale if scale else 0.0
    return {
        "input": "torch.randn((2, 3, 64, 64)) of seed 0",
        "tolerance": TOLERANCE,
        "largest_relative_difference": differences,
        "mean": {name: expected[name].mean().item() for name in differences},
    }


def plain_features(state: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """Return the layers of `images` by a forward pass written out on torchvision-named tensors.

    ResNet v1.5 in evaluation mode (He et al. 2015; stride in the 3×3 convolution). It shares no code with
    `simclr.model` and takes depth, widths and kind of block from the tensors, so it can vouch for the model.
    """
    x = F.relu(_conv_bn(state, "conv1", "bn1", images, stride=2))
    features = {"feature1": x}
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage in range(1, 5):
        blocks = {int(key.split(".")[1]) for key in state if key.startswith(f"layer{stage}.")}
        for block in sorted(blocks):
            x = _block(state, f"layer{stage}.{block}", x, stride=2 if stage > 1 and block == 0 else 1)
        features[f"feature{stage + 1}"] = x
    return {**features, "avgpool": x.mean((2, 3))}


def _block(state: Mapping[str, Tensor], name: str, x: Tensor, stride: int) -> Tensor:
    convolutions = 3 if f"{name}.conv3.weight" in state else 2
    strided = convolutions - 1  # both kinds of block: the first 3×3 convolution
    shortcut = x
    if f"{name}.downsample.0.weight" in state:
        shortcut = _conv_bn(state, f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
    for i in range(1, convolutions + 1):
        x = _conv_bn(state, f"{name}.conv{i}", f"{name}.bn{i}", x, stride if i == strided else 1)
        x = F.relu(x + shortcut if i == convolutions else x)
    return x


def _conv_bn(state: Mapping[str, Tensor], conv: str, bn: str, x: Tensor, stride: int) -> Tensor:
    weight = state[f"{conv}.weight"].float()
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    statistics = (state[f"{bn}.{key}"].float() for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *statistics)
