"""Export of a backbone to Detectron2 and MMSegmentation; every tensor is accounted for in a certificate."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simclr import BadInput
from simclr.checkpoint import (
    Backbone,
    agreement,
    certificate_path,
    fixed_input,
    plain_features,
    write_certificate,
)
from simclr.files import replacing, sha256
from simclr.model import STAGES, parse_architecture


class Format(NamedTuple):
    """How a framework wants its backbone: key names, what stands around them, its own network."""

    key: Callable[[str], str]
    file: Callable[[dict[str, Tensor]], dict]
    tensors: str
    package: str
    features: Callable[[str, Path, Tensor], dict[str, Tensor]]


def convert(backbone: Backbone, format: str, output: Path) -> None:
    """Write `backbone` to `output` (.pth) for `format`, "detectron2" or "mmseg", with a certificate beside.

    The certificate `<output without .pth>.certificate.json` lists the keys one to one and compares the
    features of a fixed input with those of the framework's own network, loaded from the written file.
    One call makes one file; a Snakemake rule has the outputs `backbone_{format}.pth` and
    `backbone_{format}.certificate.json`. The files hold tensors, strings and booleans only, so that
    `torch.load(weights_only=True)` reads them. Raises `BadInput` when anything is not mapped one to one,
    or the features disagree; then nothing is written.
    """
    if format not in FORMATS:
        raise BadInput(f"--format: expected one of {', '.join(FORMATS)}; found {format!r}")
    if Path(output).suffix != ".pth":
        raise BadInput(f"--output: expected a name that ends in .pth; found {output}")
    target = FORMATS[format]
    state = backbone.state()
    keys = one_to_one(state, target.key)
    with replacing(output) as part:
        mapped = {keys[key]: value for key, value in state.items()}
        torch.save(target.file(mapped), part)
        written = torch.load(part, weights_only=True)[target.tensors]
        same_tensors(written, mapped, str(output))
        inverse = {old: written[new] for old, new in keys.items()}
        features = _compare(backbone, format, part, inverse)
        digest = sha256(part)
        certificate_path(output).unlink(missing_ok=True)
    write_certificate(
        output,
        architecture=backbone.architecture,
        format=format,
        source={"file": backbone.path.name, "sha256": backbone.checkpoint_sha256},
        output={"file": Path(output).name, "sha256": digest},
        keys={new: old for old, new in keys.items()},
        inverse="the inverse key map reproduces the source bit for bit",
        features=features,
    )


def one_to_one(state: dict[str, Tensor], key: Callable[[str], str]) -> dict[str, str]:
    """Return source key → target key; raises `BadInput` when two source keys have the same target."""
    keys = {old: key(old) for old in state}
    if len(set(keys.values())) != len(keys):
        twice = sorted(new for new in set(keys.values()) if list(keys.values()).count(new) > 1)
        raise BadInput(f"the key map is not one to one: several keys become {', '.join(twice)}")
    return keys


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raise `BadInput` unless both hold the same keys with bit for bit the same tensors."""
    wrong = [key for key in expected if key not in found or not _identical(found[key], expected[key])]
    wrong += [key for key in found if key not in expected]
    if wrong:
        raise BadInput(f"{what}: {len(wrong)} of {len(expected)} tensors did not arrive, e.g. {wrong[0]}")


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _compare(backbone: Backbone, format: str, file: Path, inverse: dict[str, Tensor]) -> dict[str, object]:
    """Compare the source's features with the target framework's, or say why that was not possible."""
    target, images = FORMATS[format], fixed_input()
    with torch.no_grad():
        expected = backbone.model().forward_features(images)
        if find_spec(target.package):
            found = target.features(backbone.architecture, file, images)
            how = {"compared_with": f"{target.package} {sys.modules[target.package].__version__}"}
        else:
            found = plain_features(inverse, images)
            how = {
                "compared_with": "the same weights mapped back, by a forward pass written out on tensors",
                "not_run": f"comparison with {format}: {target.package} is not installed",
            }
    return {**how, **agreement(found, expected)}


# ---------------------------------------------------------------- Detectron2


def detectron2_key(key: str) -> str:
    """Return Detectron2's name of a torchvision key (MoCo, detection/convert-pretrain-to-detectron2.py)."""
    if not key.startswith("layer"):
        key = f"stem.{key}"
    key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)\b", r"conv\1.norm", key)
    return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def detectron2_features(architecture: str, file: Path, images: Tensor) -> dict[str, Tensor]:
    """Return the stages' maps of `images` by Detectron2's ResNet, loaded with its checkpointer."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling.backbone import resnet as d2

    depth, width = parse_architecture(architecture)
    block, blocks = STAGES[depth]
    basic = block.expansion == 1
    inputs, stages = round(64 * width), []
    for i, n in enumerate(blocks):
        planes = round(64 * width * 2**i)
        bottleneck = {} if basic else {"bottleneck_channels": planes, "stride_in_1x1": False}
        stages.append(
            d2.ResNet.make_stage(
                d2.BasicBlock if basic else d2.BottleneckBlock,
                n,
                stride_per_block=[1 if i == 0 else 2] + [1] * (n - 1),
                in_channels=inputs,
                out_channels=planes * block.expansion,
                norm="BN",
                **bottleneck,
            )
        )
        inputs = planes * block.expansion
    names = {f"res{i}": f"feature{i}" for i in range(2, 6)}
    model = d2.ResNet(d2.BasicStem(3, round(64 * width), norm="BN"), stages, out_features=list(names))
    DetectionCheckpointer(model).load(str(file))
    same_tensors(
        model.state_dict(), torch.load(file, weights_only=True)["model"], "Detectron2's checkpointer"
    )
    return {names[name]: value for name, value in model.eval()(images).items()}


# ---------------------------------------------------------------- MMSegmentation


def mmseg_features(architecture: str, file: Path, images: Tensor) -> dict[str, Tensor]:
    """Return the stages' maps of `images` by mmseg's ResNet, loaded by mmengine as its `init_cfg` does."""
    # Its import prints that OneDL, and warns that compiled operators, are not there; a ResNet needs neither.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmengine.runner import load_checkpoint
        from mmseg.models.backbones import ResNet
    depth, width = parse_architecture(architecture)
    channels = round(64 * width)
    model = ResNet(
        depth=int(depth.removeprefix("resnet")),
        stem_channels=channels,
        base_channels=channels,
        style="pytorch",  # stride in the 3×3 convolution
    )
    load_checkpoint(model, os.fspath(file), map_location="cpu", logger="silent")
    # It skips what does not fit, without a word; the comparison of every tensor is what holds.
    tensors = torch.load(file, weights_only=True)["state_dict"]
    same_tensors(model.state_dict(), tensors, "mmseg's loader")
    model.eval()  # returns None
    return {f"feature{i}": value for i, value in enumerate(model(images), start=2)}


FORMATS = {
    "detectron2": Format(
        detectron2_key,
        lambda tensors: {"model": tensors, "__author__": "simclr", "matching_heuristics": True},
        "model",
        "detectron2",
        detectron2_features,
    ),
    "mmseg": Format(
        lambda key: key,
        lambda tensors: {"state_dict": tensors},
        "state_dict",
        "mmseg",
        mmseg_features,
    ),
}
