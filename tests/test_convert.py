"""Converted backbones hold every tensor under the framework's own names, and certificates say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_checkpoint import trained

from simclr import BadInput, convert
from simclr.__main__ import main
from simclr.checkpoint import Backbone, certificate_path, random_init, save_backbone
from simclr.config import RandomInit
from simclr.files import sha256

ARCHITECTURES = ("resnet18_w0.125", "resnet50_w0.125")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    path = tmp_path_factory.mktemp(request.param) / "backbone.safetensors"
    save_backbone(path, trained(request.param), {"architecture": request.param})
    return Backbone.open(path)


def detectron2_names(architecture: str) -> set[str]:
    """Return the keys of Detectron2's ResNet, written from its modules: stem, res2 … res5, conv with norm."""
    blocks, convolutions = ((2, 2, 2, 2), 2) if "18" in architecture else ((3, 4, 6, 3), 3)
    convs = {"stem.conv1"}
    for stage, n in enumerate(blocks, start=2):
        for block in range(n):
            convs |= {f"res{stage}.{block}.conv{i + 1}" for i in range(convolutions)}
        if stage > 2 or convolutions == 3:  # the block widens or strides
            convs.add(f"res{stage}.0.shortcut")
    norms = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{conv}.weight" for conv in convs} | {f"{conv}.norm.{norm}" for conv in convs for norm in norms}


def converted(backbone: Backbone, format: str, folder: Path) -> tuple[dict, dict]:
    """Convert; return the content of the file and of its certificate."""
    output = folder / f"backbone_{format}.pth"
    convert.convert(backbone, format, output)
    return torch.load(output, weights_only=True), json.loads(certificate_path(output).read_text())


def test_detectron2_names_by_hand():
    pairs = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer2.3.bn3.bias": "res3.3.conv3.norm.bias",
        "layer3.0.downsample.0.weight": "res4.0.shortcut.weight",
        "layer4.0.downsample.1.num_batches_tracked": "res5.0.shortcut.norm.num_batches_tracked",
    }
    assert {key: convert.detectron2_key(key) for key in pairs} == pairs


def test_a_detectron2_file(backbone, tmp_path):
    content, certificate = converted(backbone, "detectron2", tmp_path)
    state = backbone.state()
    assert content["matching_heuristics"] is True
    assert content["__author__"] == "simclr"
    assert set(content["model"]) == detectron2_names(backbone.architecture) == set(certificate["keys"])
    assert all(content["model"][new].equal(state[old]) for new, old in certificate["keys"].items())
    assert sorted(certificate["keys"].values()) == sorted(state)
    assert certificate["source"]["sha256"] == backbone.checkpoint_sha256
    assert certificate["output"]["sha256"] == sha256(tmp_path / "backbone_detectron2.pth")
    assert "RGB" in certificate["colour_order"]
    assert "3x3" in certificate["stride"]
    assert max(certificate["features"]["largest_relative_difference"].values()) <= 1e-5


def test_without_detectron2_the_certificate_says_so(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    _, certificate = converted(backbone, "detectron2", tmp_path)
    assert certificate["features"]["not_run"] == "comparison with detectron2: detectron2 is not installed"


def test_an_mmseg_file_is_loaded_by_mmseg(backbone, tmp_path):
    content, certificate = converted(backbone, "mmseg", tmp_path)
    state = backbone.state()
    assert content.keys() == {"state_dict"}
    assert content["state_dict"].keys() == state.keys()
    assert all(content["state_dict"][key].equal(value) for key, value in state.items())
    features = certificate["features"]
    assert features["compared_with"].startswith("mmseg ")
    assert "not_run" not in features
    assert set(features["largest_relative_difference"]) == {f"feature{i}" for i in range(2, 6)}
    assert max(features["largest_relative_difference"].values()) <= features["tolerance"] == 1e-5


def refusal(backbone: Backbone, folder: Path, format: str = "mmseg") -> str:
    """Return the message with which the conversion is refused; nothing is written."""
    with pytest.raises(BadInput) as caught:
        convert.convert(backbone, format, folder / "backbone.pth")
    assert list(folder.iterdir()) == []
    return str(caught.value)


def test_a_partial_match_is_refused(backbone, tmp_path, monkeypatch):
    target = convert.FORMATS["mmseg"]

    def use(**changes: object) -> None:
        monkeypatch.setitem(convert.FORMATS, "mmseg", target._replace(**changes))

    use(key=lambda key: key.replace("bn2", "bn1"))
    assert "not one to one: several keys become" in refusal(backbone, tmp_path)
    use(file=lambda tensors: {"state_dict": {k: v for k, v in tensors.items() if k != "bn1.bias"}})
    assert "1 of" in refusal(backbone, tmp_path)
    use(file=lambda tensors: {"state_dict": {**tensors, "conv1.weight": tensors["conv1.weight"] + 1e-9}})
    assert "did not arrive, e.g. conv1.weight" in refusal(backbone, tmp_path)
    use(key=lambda key: f"backbone.{key}")
    assert "mmseg's loader: " in refusal(backbone, tmp_path)


def test_a_stride_in_the_wrong_convolution_is_seen(tmp_path, monkeypatch):
    from mmseg.models.backbones import ResNet

    save_backbone(
        tmp_path / "source" / "backbone.safetensors",
        trained("resnet50_w0.125"),
        {"architecture": "resnet50_w0.125"},
    )
    backbone = Backbone.open(tmp_path / "source" / "backbone.safetensors")
    original = ResNet.__init__
    monkeypatch.setattr(ResNet, "__init__", lambda self, **kw: original(self, **{**kw, "style": "caffe"}))
    (tmp_path / "out").mkdir()
    assert "features of a fixed input do not agree" in refusal(backbone, tmp_path / "out")


def test_options_that_mean_nothing(backbone, tmp_path):
    assert "one of detectron2, mmseg; found 'caffe'" in refusal(backbone, tmp_path, format="caffe")
    with pytest.raises(BadInput, match=r"ends in \.pth"):
        convert.convert(backbone, "mmseg", tmp_path / "backbone.pkl")


def test_by_the_command_line(tmp_path):
    source, output = tmp_path / "backbone.safetensors", tmp_path / "backbone_detectron2.pth"
    random_init(RandomInit(architecture=ARCHITECTURES[0]), source)
    arguments = ["--backbone", str(source), "--format", "detectron2", "--output", str(output)]
    assert main(["convert", *arguments]) == 0
    assert certificate_path(output) == tmp_path / "backbone_detectron2.certificate.json"
    assert certificate_path(output).exists()
