"""Backbones load and save exactly; foreign checkpoints arrive whole or are refused in one sentence."""

from __future__ import annotations

import http.server
import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from simclr import BadInput
from simclr.__main__ import main
from simclr.checkpoint import (
    Backbone,
    agreement,
    certificate_path,
    fixed_input,
    import_checkpoint,
    load_backbone,
    plain_features,
    random_init,
    save_backbone,
)
from simclr.config import ImportCheckpoint, RandomInit
from simclr.files import sha256
from simclr.model import resnet

TINY = "resnet18_w0.125"
METADATA = {"architecture": TINY, "recipe": "simclr", "epochs": "2", "source": "a test"}


def trained(architecture: str) -> dict[str, Tensor]:
    """Return weights whose BatchNorms have moved, so that nothing is 0 or 1 by default."""
    generator = torch.Generator().manual_seed(0)
    state = resnet(architecture).state_dict()
    for value in state.values():
        if value.dtype == torch.int64:
            value.fill_(7)
        elif value.ndim == 1:
            value.uniform_(0.5, 1.5, generator=generator)
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return trained(TINY)


@pytest.fixture
def path(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, state, METADATA)
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and a[key].equal(b[key]) for key in a)


def refusal(function: Callable, *arguments: object) -> str:
    """Return the message with which `function` refuses; it is one line."""
    with pytest.raises(BadInput) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- the backbone file


def test_what_is_saved_is_loaded(path, state):
    backbone = Backbone.open(path)
    assert same(load_backbone(path), state)
    assert same(backbone.state(), state)
    assert backbone.metadata == METADATA
    assert backbone.architecture == TINY
    assert backbone.checkpoint_sha256 == sha256(path)


def test_the_model_holds_the_weights_in_evaluation_mode(path, state):
    expected = resnet(TINY)
    expected.load_state_dict(state)
    model = Backbone.open(path).model()
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(fixed_input()).equal(expected.eval()(fixed_input()))


def test_opening_a_model_draws_no_random_number(path):
    before = torch.get_rng_state()
    Backbone.open(path).model()
    assert torch.get_rng_state().equal(before)


def test_the_same_weights_make_the_same_bytes(tmp_path, state):
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        save_backbone(file, state, METADATA)
    assert len({sha256(file) for file in files}) == 1


def test_a_file_that_is_not_there_or_not_whole(path):
    assert "no such file" in refusal(load_backbone, path.with_name("other.safetensors"))
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "whole safetensors file" in refusal(load_backbone, path)
        assert refusal(Backbone.open, path).startswith(str(path))


def test_keys_that_do_not_fit_are_named(path, state):
    def stored(changed: dict[str, Tensor]) -> str:
        safetensors.torch.save_file(changed, path, metadata=METADATA)
        assert refusal(save_backbone, path.with_name("x"), changed, METADATA)
        return refusal(load_backbone, path)

    without = {key: value for key, value in state.items() if key != "layer1.0.bn1.bias"}
    assert "missing: layer1.0.bn1.bias" in stored(without)
    assert "unexpected: fc.bias" in stored({**state, "fc.bias": torch.zeros(3)})
    wrong_shape = {**state, "conv1.weight": torch.zeros(8, 3, 3, 3)}
    found = "conv1.weight (expected [8, 3, 7, 7] float32, found [8, 3, 3, 3] float32)"
    assert f"mis-shaped: {found}" in stored(wrong_shape)
    assert "found [8] float16" in stored({**state, "bn1.bias": state["bn1.bias"].half()})
    assert "NaN or infinity in bn1.bias" in stored({**state, "bn1.bias": torch.full((8,), torch.nan)})


def test_a_long_list_of_keys_is_cut_and_counted(path, state):
    safetensors.torch.save_file({"a.weight": torch.zeros(1)}, path, metadata=METADATA)
    message = refusal(load_backbone, path)
    assert f"… ({len(state)} in all)" in message
    assert len(message) < 500


def test_a_file_without_architecture_is_no_backbone(path, state):
    safetensors.torch.save_file(state, path)
    assert "import_checkpoint" in refusal(load_backbone, path)
    assert "architecture" in refusal(save_backbone, path, state, {"recipe": "simclr"})


def test_the_command_line_ends_with_status_2(path, tmp_path, capsys):
    path.write_bytes(path.read_bytes()[:1000])
    output = tmp_path / "backbone_mmseg.pth"
    assert main(["convert", "--backbone", str(path), "--format", "mmseg", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"simclr: {path}: expected a whole safetensors file")
    assert error.count("\n") == 1


# ---------------------------------------------------------------- random weights


def test_random_weights_depend_on_their_seed_alone(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        torch.manual_seed(hash(file))
        before = torch.get_rng_state()
        random_init(RandomInit(architecture=TINY, seed=seed), file)
        assert torch.get_rng_state().equal(before)
    hashes = [sha256(file) for file in files]
    assert hashes[0] == hashes[1] != hashes[2]
    assert Backbone.open(files[0]).metadata["recipe"] == "random_init"


# ---------------------------------------------------------------- import


def imported(tmp_path: Path, content: object, **config: object) -> tuple[dict[str, Tensor], dict]:
    """Import `content`, saved by torch; return the backbone and its certificate."""
    file, output = tmp_path / "foreign.pth", tmp_path / "backbone.safetensors"
    torch.save(content, file)
    import_checkpoint(ImportCheckpoint(path=file, **{"architecture": TINY, **config}), output)
    return load_backbone(output), json.loads(certificate_path(output).read_text())


def refused(tmp_path: Path, content: object, **config: object) -> str:
    """Return the message with which `content` is refused; nothing is written."""
    message = refusal(lambda: imported(tmp_path, content, **config))
    assert {file.name for file in tmp_path.iterdir()} <= {"foreign.pth"}
    return message


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


FC = {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
MOCO_V2 = {
    **{
        "module.encoder_q.fc.0.weight": torch.zeros(64, 64),
        "module.encoder_q.fc.2.weight": torch.zeros(16, 64),
    },
    **{"module.queue": torch.zeros(16, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)},
}
NECK = {"neck.fc0.weight": torch.zeros(9, 64), "head.fc_cls.bias": torch.zeros(3)}

# name → content of the file, what is dropped of it, format
LAYOUTS = {
    "torchvision": lambda s: ({**s, **FC}, FC, "torchvision"),
    "torchvision's training script": lambda s: ({"model": {**s, **FC}, "epoch": 3}, FC, "torchvision"),
    "mmselfsup, extracted": lambda s: ({"state_dict": s, "author": "x"}, {}, "mmselfsup"),
    "mmselfsup, full": lambda s: (
        {"meta": {"epoch": 200}, "state_dict": {**prefixed(s, "backbone."), **NECK}},
        NECK,
        "mmselfsup",
    ),
    "moco": lambda s: (
        {
            "arch": "resnet50",
            "state_dict": {
                **prefixed(s, "module.encoder_q."),
                **prefixed(s, "module.encoder_k."),
                **MOCO_V2,
            },
        },
        {**prefixed(s, "module.encoder_k."), **MOCO_V2},
        "moco",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_arrives_bit_for_bit(name, tmp_path, state):
    content, dropped, format = LAYOUTS[name](state)
    found, certificate = imported(tmp_path, content, format=format)
    assert same(found, state)
    assert certificate["source"]["sha256"] == sha256(tmp_path / "foreign.pth")
    assert certificate["output"]["sha256"] == sha256(tmp_path / "backbone.safetensors")
    assert certificate["keys"].keys() == state.keys()
    assert all(source.endswith(key) for key, source in certificate["keys"].items())
    assert len(set(certificate["keys"].values())) == len(state)
    assert set(certificate["dropped"]) == set(dropped)
    assert certificate["filled_with_0"] == certificate["widened_to_float32"] == []
    assert max(certificate["features"]["largest_relative_difference"].values()) <= 1e-5
    assert set(certificate["features"]["mean"]) == {*(f"feature{i}" for i in range(1, 6)), "avgpool"}


def test_safetensors_are_imported_too(tmp_path, state):
    file, output = tmp_path / "model.safetensors", tmp_path / "backbone.safetensors"
    safetensors.torch.save_file({**state, **FC}, file)
    import_checkpoint(ImportCheckpoint(path=file, architecture=TINY), output)
    assert same(load_backbone(output), state)
    file.write_bytes(file.read_bytes()[:-1])
    config = ImportCheckpoint(path=file, architecture=TINY)
    assert "whole safetensors file" in refusal(import_checkpoint, config, tmp_path / "other.safetensors")


def test_a_torchvision_model_keeps_its_output(tmp_path):
    theirs = torchvision.models.resnet18(num_classes=3).eval()
    imported(tmp_path, theirs.state_dict(), architecture="resnet18")
    ours = Backbone.open(tmp_path / "backbone.safetensors").model()
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(ours(fixed_input()), theirs(fixed_input()))


def test_a_classifier_of_another_width_shows_another_architecture(tmp_path, state):
    wide = {**FC, "fc.weight": torch.zeros(10, 2048)}
    message = refused(tmp_path, {**state, **wide})
    assert "fc.weight takes [2048] features" in message
    assert "has 64" in message
    moco = {**prefixed(state, "module.encoder_q."), "module.encoder_q.fc.0.weight": torch.zeros(8, 2048)}
    assert "encoder_q.fc.0.weight" in refused(tmp_path, {"state_dict": moco}, format="moco")


def test_absent_counters_are_filled_and_recorded(tmp_path, state):
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    found, certificate = imported(tmp_path, {k: v for k, v in state.items() if k not in counters})
    assert same(found, {**state, **{key: torch.zeros((), dtype=torch.int64) for key in counters}})
    assert certificate["filled_with_0"] == counters


def test_half_precision_is_widened_and_double_refused(tmp_path, state):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    found, certificate = imported(tmp_path, half)
    assert all(found[key].equal(half[key].to(found[key].dtype)) for key in state)
    assert len(certificate["widened_to_float32"]) == sum(v.is_floating_point() for v in state.values())
    (tmp_path / "double").mkdir()
    double = {**state, "conv1.weight": state["conv1.weight"].double()}
    assert "found [8, 3, 7, 7] float64" in refused(tmp_path / "double", double)


def test_foreign_keys_that_do_not_fit_are_named(tmp_path, state):
    without = {key: value for key, value in state.items() if key != "layer4.1.conv2.weight"}
    assert "missing: layer4.1.conv2.weight" in refused(tmp_path, without)
    assert "unexpected: extra" in refused(tmp_path, {**state, "extra": torch.zeros(1)})
    assert "mis-shaped: bn1.bias" in refused(tmp_path, {**state, "bn1.bias": torch.zeros(9)})
    assert "mis-shaped" in refused(tmp_path, state, architecture="resnet18_w0.25")
    assert "missing" in refused(tmp_path, state, architecture="resnet50_w0.125")
    assert "NaN" in refused(tmp_path, {**state, "bn1.bias": torch.full((8,), torch.inf)})


def test_a_file_of_another_format_is_refused(tmp_path, state):
    moco = {"state_dict": prefixed(state, "module.encoder_q.")}
    assert "unexpected: module.encoder_q" in refused(tmp_path, moco, format="torchvision")
    assert "begin with module.encoder_q." in refused(tmp_path, state, format="moco")
    twice = {"state_dict": {**prefixed(state, "backbone."), "conv1.weight": state["conv1.weight"]}}
    assert "begin with backbone.; unexpected: conv1.weight" in refused(tmp_path, twice, format="mmselfsup")
    nested = {"weights": state, "epoch": 3}
    assert "found others under weights, epoch" in refused(tmp_path, nested)
    assert "found others under 0" in refused(tmp_path, {0: torch.zeros(1)})
    assert "found list" in refused(tmp_path, [1, 2])
    assert "found Tensor" in refused(tmp_path, torch.zeros(2))
    assert "dictionary of tensors" in refused(tmp_path, {})


class Payload:
    """An object whose unpickling would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_payload_is_refused_and_not_run(zipped, tmp_path, state):
    trace, file = tmp_path / "trace", tmp_path / "foreign.pth"
    torch.save({**state, "x": Payload(trace)}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(
        import_checkpoint, ImportCheckpoint(path=file, architecture=TINY), tmp_path / "backbone.safetensors"
    )
    assert "refused, because it holds a Python object" in message
    assert "open" in message
    assert {entry.name for entry in tmp_path.iterdir()} == {"foreign.pth"}
    torch.load(file, weights_only=False)
    assert trace.exists(), "the payload of this test is none"


def test_a_pytorch_file_that_is_not_whole(tmp_path, state):
    file = tmp_path / "foreign.pth"
    config = ImportCheckpoint(path=file, architecture=TINY)
    for zipped in (True, False):
        whole = io.BytesIO()
        torch.save(state, whole, _use_new_zipfile_serialization=zipped)
        whole = whole.getvalue()
        for size in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            message = refusal(import_checkpoint, config, tmp_path / "backbone.safetensors")
            assert message == f"{file}: not a whole PyTorch checkpoint; copy or download it again"
    file.write_text("<html>404</html>")
    assert "not a whole PyTorch checkpoint" in refusal(import_checkpoint, config, tmp_path / "b.safetensors")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    assert "not a whole PyTorch checkpoint" in refusal(import_checkpoint, config, tmp_path / "b.safetensors")
    file.unlink()
    assert "no such checkpoint file" in refusal(import_checkpoint, config, tmp_path / "b.safetensors")


def test_a_file_that_is_not_the_one_meant(tmp_path, state):
    assert "expected a file of SHA-256 00000000…" in refused(tmp_path, state, sha256="00000000")
    found, _ = imported(tmp_path, state, sha256=sha256(tmp_path / "foreign.pth")[:12])
    assert same(found, state)


# ---------------------------------------------------------------- download


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content` at /whole, and promises more than it sends at /cut."""

    content = b""

    def do_GET(self):
        if self.path not in ("/whole.pth", "/cut.pth", "/endless.pth"):
            self.send_error(404)
            return
        self.send_response(200)
        if not self.path.startswith("/endless"):
            missing = 1000 if self.path.startswith("/cut") else 0
            self.send_header("Content-Length", str(len(self.content) + missing))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(state: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the address of a server on loopback, and the SHA-256 of what it serves."""
    import hashlib

    content = io.BytesIO()
    torch.save({**state, **FC}, content)
    handler = type("Serving", (Handler,), {"content": content.getvalue()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", hashlib.sha256(handler.content).hexdigest()
        server.shutdown()


def test_a_download_is_checked_and_imported(server, tmp_path, state):
    url, digest = server
    output = tmp_path / "backbone.safetensors"
    for file in ("whole.pth", "endless.pth"):
        config = ImportCheckpoint(url=f"{url}/{file}", sha256=digest[:8], architecture=TINY)
        import_checkpoint(config, output)
        assert same(load_backbone(output), state)
    assert digest in Backbone.open(output).metadata["source"]
    assert {file.name for file in tmp_path.iterdir()} == {output.name, certificate_path(output).name}


def test_a_download_that_fails_leaves_nothing(server, tmp_path):
    url, digest = server

    def refused(address: str, sha256: str = digest) -> str:
        config = ImportCheckpoint(url=address, sha256=sha256, architecture=TINY)
        message = refusal(import_checkpoint, config, tmp_path / "backbone.safetensors")
        assert list(tmp_path.iterdir()) == []
        return message

    assert f"SHA-256 {'0' * 64}…, found {digest}" in refused(f"{url}/whole.pth", "0" * 64)
    assert re.search(r"expected \d+ bytes, found \d+|download failed", refused(f"{url}/cut.pth"))
    assert "404" in refused(f"{url}/other.pth")
    assert "download failed" in refused("http://127.0.0.1:1/whole.pth")


# ---------------------------------------------------------------- certificates


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_the_written_out_forward_pass_is_torchvisions(architecture):
    state = trained(architecture)
    theirs = torchvision.models.get_model(architecture)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(state)
    with torch.no_grad():
        found = plain_features(state, fixed_input())["avgpool"]
        expected = theirs.eval()(fixed_input())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_features_that_do_not_agree_are_refused(state):
    expected = plain_features(state, fixed_input())
    assert set(agreement(expected, expected)["largest_relative_difference"].values()) == {0.0}
    moved = {**expected, "feature3": expected["feature3"] * 1.001}
    assert "feature3 differs by" in refusal(agreement, moved, expected)
    undefined = {**expected, "avgpool": expected["avgpool"] * torch.nan}
    assert "avgpool differs by nan" in refusal(agreement, undefined, expected)
