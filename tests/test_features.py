"""Extraction equals one image at a time, goes on after a kill, and writes a whole folder or none."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import trained

from simclr import BadInput, features, transforms
from simclr.__main__ import main, sentence
from simclr.checkpoint import Backbone, save_backbone
from simclr.config import Dataset as Block
from simclr.config import FeatureSet
from simclr.datasets import Dataset, Samples, decode, samples, verify
from simclr.features import Features, extract
from simclr.files import locked
from simclr.model import pool, resnet
from simclr.results import provenance

ARCHITECTURE = "resnet18_w0.125"
SMALL = {"resize": 40, "crop": 32, "pooling": "adaptive"}
LAYERS = ["feature1", "feature2", "feature3", "feature4", "feature5", "avgpool"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """An ImageNet of two classes: 11 training images of different sizes, 2 for validation."""
    root = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for split, n in (("train", 11), ("val", 2)):
        for i in range(n):
            path = root / "imagenet" / split / f"n0000000{i % 2}" / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (rng.integers(30, 60), rng.integers(30, 60), 3), np.uint8)
            Image.fromarray(pixels).save(path)
    block = Block(root=root / "imagenet", classes=2, images={"train": 11, "val": 2})
    verify("imagenet", block, root / "imagenet.json")
    return Dataset.open(root / "imagenet.json")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return make_backbone(tmp_path_factory.mktemp("backbone") / "backbone.safetensors")


def make_backbone(path: Path, **changed: torch.Tensor) -> Backbone:
    state = trained(ARCHITECTURE)
    state.update({key.replace("__", "."): value for key, value in changed.items()})
    save_backbone(path, state, {"architecture": ARCHITECTURE})
    return Backbone.open(path)


def one_by_one(backbone: Backbone, dataset: Dataset, config: FeatureSet) -> dict[str, np.ndarray]:
    """Return the features of the train split, one image at a time."""
    model = backbone.model()
    transform = getattr(transforms, config.transform)(config.resize, config.crop)
    rows = []
    for path in samples(dataset, "train").paths:
        with torch.no_grad():
            maps = model.forward_features(transform(decode(path))[None])
        rows.append(pool(maps, config.pooling))
    return {name: torch.cat([row[name] for row in rows]).numpy() for name in config.layers}


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize("transform", ["squash", "center_crop"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_extraction_is_one_image_at_a_time(transform, batch_size, backbone, dataset, tmp_path):
    config = FeatureSet(**SMALL, transform=transform, batch_size=batch_size)
    extract(backbone, dataset, "train", config, tmp_path / "work", tmp_path / "f")
    found = Features.open(tmp_path / "f")
    assert list(found.layers) == LAYERS
    for name, expected in one_by_one(backbone, dataset, config).items():
        assert found.layers[name].dtype == np.float32
        assert isinstance(found.layers[name], np.memmap)
        np.testing.assert_allclose(found.layers[name], expected, rtol=1e-4, atol=1e-5 * abs(expected).max())
    np.testing.assert_array_equal(found.labels, samples(dataset, "train").labels)


def test_worker_processes_change_nothing(backbone, dataset, tmp_path, monkeypatch):
    config = FeatureSet(**SMALL, layers=["avgpool"], batch_size=2)
    for workers in (0, 2):
        monkeypatch.setattr(features, "_workers", lambda workers=workers: workers)
        extract(backbone, dataset, "train", config, tmp_path / "work", tmp_path / f"f{workers}")
    one, two = ((tmp_path / f"f{workers}" / "avgpool.npy").read_bytes() for workers in (0, 2))
    assert one == two


def test_the_published_dimensions():
    dims = features._dims(resnet("resnet50").eval(), FeatureSet())
    assert dims == dict(zip(LAYERS, (9216, 9216, 8192, 9216, 8192, 2048), strict=True))


def test_the_manifest_says_where_features_come_from(backbone, dataset, tmp_path):
    config = FeatureSet(**SMALL, layers=["feature2", "avgpool"], dtype="float16", transform="squash")
    extract(backbone, dataset, "val", config, tmp_path / "work", tmp_path / "deep" / "f")
    found = Features.open(tmp_path / "deep" / "f")
    assert found.checkpoint_sha256 == backbone.checkpoint_sha256
    assert found.dataset == dataset.dataset
    assert found.manifest == {
        "checkpoint_sha256": backbone.checkpoint_sha256,
        "architecture": ARCHITECTURE,
        "dataset": dataset.dataset.model_dump(),
        "split": "val",
        "images": 2,
        "classes": 2,
        "transform": {
            "name": "squash",
            "resize": 40,
            "crop": 32,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "pooling": "adaptive",
        "dims": {"feature2": 8 * 36, "avgpool": 64},
        "dtype": "float16",
        "finished": True,
    }
    assert found.layers["avgpool"].dtype == np.float16
    names = {path.name for path in (tmp_path / "deep" / "f").iterdir()}
    assert names == {"feature2.npy", "avgpool.npy", "labels.npy", "manifest.json"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["f"]


def test_by_the_command_line(backbone, dataset, tmp_path):
    arguments = {
        "--backbone": backbone.path,
        "--dataset": dataset.root.parent / "imagenet.json",
        "--split": "train",
        "--config": json.dumps({**SMALL, "layers": ["avgpool"]}),
        "--work": tmp_path / "work",
        "--output": tmp_path / "f",
    }
    assert main(["features", *(str(each) for pair in arguments.items() for each in pair)]) == 0
    assert Features.open(tmp_path / "f").layers["avgpool"].shape == (11, 64)


def refusal(*arguments: object, error: type[Exception] = BadInput) -> str:
    """Return what the command line says when an extraction ends."""
    with pytest.raises(error) as caught:
        extract(*arguments)
    return sentence(caught.value)


CONFIG = FeatureSet(**SMALL)


def test_features_that_are_not_finite_are_named(dataset, tmp_path):
    variance = torch.full((8,), -1.0)
    bad = make_backbone(tmp_path / "nan.safetensors", layer1__0__bn1__running_var=variance)
    message = refusal(bad, dataset, "train", CONFIG, tmp_path / "work", tmp_path / "f")
    assert message.startswith(f"feature2: NaN or infinity in row 0 ({samples(dataset, 'train').paths[0]})")
    big = make_backbone(tmp_path / "big.safetensors", bn1__weight=torch.full((8,), 1e6))
    half = FeatureSet(**SMALL, dtype="float16")
    assert "dtype: float32" in refusal(big, dataset, "train", half, tmp_path / "work", tmp_path / "f")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [([0, 1, 2], "row 3 was written 0 times"), ([*range(11), 4], "row 4 was written 2 times")],
)
def test_every_row_is_written_once(index, message, backbone, dataset, tmp_path, monkeypatch):
    def batches(*_):
        yield np.array(index), {"avgpool": torch.zeros(len(index), 64)}

    monkeypatch.setattr(features, "_batches", batches)
    config = FeatureSet(**SMALL, layers=["avgpool"])
    assert message in refusal(
        backbone, dataset, "train", config, tmp_path / "work", tmp_path / "f", error=RuntimeError
    )
    assert not (tmp_path / "f").exists()


def test_what_was_written_does_not_stay_as_memory(tmp_path, monkeypatch):
    """An array of 64 MB, written in shards of 8 MB."""
    rows, dims, resident = 16_384, {"avgpool": 1024}, []

    def batches(model, listed, config, shards, what):
        for shard in shards:
            status = Path("/proc/self/status").read_text()
            resident.append(1024 * int(status.split("RssFile:")[1].split()[0]))
            yield np.arange(shard.start, shard.stop), {"avgpool": torch.ones(len(shard), 1024)}

    monkeypatch.setattr(features, "_batches", batches)
    config = FeatureSet(**SMALL, batch_size=2048)
    features._prepare(tmp_path, dims, rows, "float32")
    shards = [range(start, start + 2048) for start in range(0, rows, 2048)]
    features._fill(tmp_path, shards, dims, None, Samples([], np.zeros(rows)), config, "")
    assert (np.load(tmp_path / "features/avgpool.npy") == 1).all()
    assert len(resident) == 8
    assert max(resident) - resident[0] < 16_000_000


def test_rows_are_written_by_sample_index(backbone, dataset, tmp_path, monkeypatch):
    config = FeatureSet(**SMALL, layers=["avgpool"], batch_size=3)
    batches = features._batches
    monkeypatch.setattr(features, "_batches", lambda *arguments: reversed(list(batches(*arguments))))
    extract(backbone, dataset, "train", config, tmp_path / "work", tmp_path / "f")
    expected = one_by_one(backbone, dataset, config)["avgpool"]
    np.testing.assert_allclose(
        Features.open(tmp_path / "f").layers["avgpool"], expected, rtol=1e-4, atol=1e-3
    )


def test_a_disk_that_is_too_small_is_seen_before(backbone, dataset, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000))
    monkeypatch.setattr(features, "_batches", None)
    message = refusal(backbone, dataset, "train", CONFIG, tmp_path / "work", tmp_path / "f")
    assert message.startswith(f"{tmp_path}/work/")
    assert ": 11 images need 0.0 GB (feature1, feature2" in message
    assert "dtype: float16" in message


def test_a_quota_that_is_used_up_is_said(backbone, dataset, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    message = refusal(backbone, dataset, "train", CONFIG, tmp_path / "work", tmp_path / "f")
    assert ": 11 images need 0.0 GB (feature1, feature2" in message
    assert "but the disk or the quota is used up; choose fewer layers" in message
    monkeypatch.undo()
    extract(backbone, dataset, "train", CONFIG, tmp_path / "work", tmp_path / "f")


def test_only_features_are_replaced(backbone, dataset, tmp_path):
    output = tmp_path / "f"
    config = FeatureSet(**SMALL, layers=["avgpool"])
    output.mkdir()
    (output / "manifest.json").write_text("{")
    (output / "feature3.npy").write_text("half")
    extract(backbone, dataset, "train", config, tmp_path / "work", output)
    assert list(Features.open(output).layers) == ["avgpool"]
    assert not (output / "feature3.npy").exists()
    (output / "thesis.tex").write_text("years")
    assert "thesis.tex" in refusal(backbone, dataset, "train", config, tmp_path / "work", output)
    assert (output / "thesis.tex").exists()
    assert "found a file" in refusal(
        backbone, dataset, "train", config, tmp_path / "work", output / "thesis.tex"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named(workers, backbone, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_workers", lambda: workers)
    path = samples(dataset, "val").paths[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = refusal(backbone, dataset, "val", CONFIG, tmp_path / "work", tmp_path / "f")
    path.write_bytes(whole)
    assert message.startswith(f"{path}: cannot be decoded")
    assert not (tmp_path / "f").exists()


def test_an_unknown_split_is_refused(backbone, dataset, tmp_path):
    assert "test" in refusal(backbone, dataset, "test", CONFIG, tmp_path / "work", tmp_path / "f")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"crop": 48, "resize": 56}, "at crop: 48 use adaptive"),
        ({"crop": 64, "resize": 56, "pooling": "adaptive"}, "expected crop ≤ resize"),
        ({"layers": ["avgpool", "avgpool"]}, "each layer once"),
        ({"layers": []}, "at least 1 item"),
    ],
)
def test_impossible_blocks(block, message):
    with pytest.raises(ValueError, match=message):
        FeatureSet(**block)


# ---------------------------------------------------------------- after a kill, and in several processes

# Batches of two images, shards of four: three shards and six batches for the eleven training images.
SHARDED = FeatureSet(**SMALL, batch_size=2)


def _extract(backbone, dataset, config, folder, die_at=None, environment=None):
    """Extract into `folder`; kill this very process in forward pass `die_at`."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    features.SHARD = 4
    passes, compute = [], features._layers

    def dying(*arguments):
        passes.append(arguments)
        if len(passes) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(*arguments)

    features._layers = dying
    extract(Backbone.open(backbone), Dataset.open(dataset), "train", config, folder / "work", folder / "f")
    (folder / f"passes{os.environ.get('RANK', 0)}").write_text(str(len(passes)))


def start(backbone, dataset, *arguments, **keywords):
    """Start `_extract` in a process of its own."""
    multiprocessing.set_forkserver_preload(["simclr.features"])
    process = multiprocessing.get_context("forkserver").Process(
        target=_extract,
        args=(backbone.path, dataset.root.parent / "imagenet.json", *arguments),
        kwargs=keywords,
    )
    process.start()
    return process


def exit_status(process) -> int:
    process.join()
    return process.exitcode


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(backbone, dataset, tmp_path_factory) -> dict[str, bytes]:
    """The files of a run in one piece."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert exit_status(start(backbone, dataset, SHARDED, folder)) == 0
    assert not any((folder / "work").iterdir())
    return contents(folder / "f")


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of images of each forward pass from now on, that for the dimensions excepted."""
    sizes, compute = [], features._layers
    dims = features._dims(resnet(ARCHITECTURE).eval(), CONFIG)

    def counting(model, images, config):
        sizes.append(len(images))
        return compute(model, images, config)

    monkeypatch.setattr(features, "SHARD", 4)
    monkeypatch.setattr(features, "_layers", counting)
    monkeypatch.setattr(features, "_dims", lambda *_: dims)
    return sizes


# Forward pass 1 is that for the dimensions; then two in each shard.
@pytest.mark.parametrize(("die_at", "left"), [(2, [2, 2, 2, 2, 2, 1]), (5, [2, 2, 2, 1])])
def test_a_killed_run_goes_on_where_it_was(
    die_at, left, uninterrupted, backbone, dataset, tmp_path, computed
):
    assert exit_status(start(backbone, dataset, SHARDED, tmp_path, die_at=die_at)) == -signal.SIGKILL
    assert not (tmp_path / "f").exists()
    extract(backbone, dataset, "train", SHARDED, tmp_path / "work", tmp_path / "f")
    assert computed == left
    assert contents(tmp_path / "f") == uninterrupted
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize("other", ["config", "backbone"])
def test_another_run_begins_afresh(other, backbone, dataset, tmp_path, computed):
    """Nothing of the run that was killed is taken over, or left."""
    assert exit_status(start(backbone, dataset, SHARDED, tmp_path, die_at=5)) == -signal.SIGKILL
    config = SHARDED.model_copy(update={"resize": 48} if other == "config" else {})
    if other == "backbone":
        backbone = make_backbone(tmp_path / "other.safetensors", bn1__weight=torch.ones(8))
    extract(backbone, dataset, "train", config, tmp_path / "work", tmp_path / "f")
    assert sum(computed) == 11
    assert Features.open(tmp_path / "f").checkpoint_sha256 == backbone.checkpoint_sha256
    assert not any((tmp_path / "work").iterdir())


def test_a_run_for_another_output_is_left_alone(backbone, dataset, tmp_path):
    assert exit_status(start(backbone, dataset, SHARDED, tmp_path, die_at=5)) == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")}
    extract(backbone, dataset, "val", SHARDED, tmp_path / "work", tmp_path / "g")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")} == before


def test_a_repaired_image_does_not_cost_the_shards_before_it(backbone, dataset, tmp_path, computed):
    path = samples(dataset, "train").paths[9]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refusal(backbone, dataset, "train", SHARDED, tmp_path / "work", tmp_path / "f")
    path.write_bytes(whole)
    computed.clear()
    extract(backbone, dataset, "train", SHARDED, tmp_path / "work", tmp_path / "f")
    assert computed == [2, 1]


def test_two_runs_at_once_are_refused(backbone, dataset, tmp_path):
    assert exit_status(start(backbone, dataset, SHARDED, tmp_path, die_at=5)) == -signal.SIGKILL
    (folder,) = (tmp_path / "work").iterdir()
    process = multiprocessing.get_context("forkserver").Process(target=_hold, args=(folder,))
    process.start()
    try:
        while not (folder / "held").exists():
            assert process.is_alive()
        for config in (SHARDED, CONFIG):
            message = refusal(backbone, dataset, "train", config, tmp_path / "work", tmp_path / "f")
            assert "another run works in this folder" in message
    finally:
        process.terminate()
        process.join()


def _hold(folder):
    with locked(folder):
        (folder / "held").touch()
        signal.pause()


def test_two_processes_write_the_bytes_of_one(uninterrupted, backbone, dataset, tmp_path):
    processes = []
    for rank in range(2):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 20_000 + os.getpid() % 20_000}
        environment = {key: str(value) for key, value in environment.items()}
        processes.append(start(backbone, dataset, SHARDED, tmp_path, environment=environment))
    assert [exit_status(process) for process in processes] == [0, 0]
    assert contents(tmp_path / "f") == uninterrupted
    passes = [(tmp_path / f"passes{rank}").read_text() for rank in range(2)]
    assert passes == ["5", "3"]  # one for the dimensions, then those of shards 0 and 2, and of shard 1
    assert not any((tmp_path / "work").iterdir())


def test_work_on_another_disk_is_refused(backbone, dataset, tmp_path, monkeypatch):
    stat = Path.stat

    def elsewhere(path, **keywords):
        found = stat(path, **keywords)
        return SimpleNamespace(st_dev=-1, st_mode=found.st_mode) if path.name == "work" else found

    monkeypatch.setattr(Path, "stat", elsewhere)
    message = refusal(backbone, dataset, "train", CONFIG, tmp_path / "work", tmp_path / "f")
    assert (
        message == f"--work {tmp_path}/work and --output {tmp_path}/f are on two disks; name folders of one"
    )


def test_labels_that_are_no_class_are_refused_before(backbone, dataset, tmp_path, monkeypatch):
    listed = samples(dataset, "train")
    wrong = listed.labels.copy()
    wrong[7] = 2
    monkeypatch.setattr(features, "samples", lambda *_: Samples(listed.paths, wrong))
    message = refusal(backbone, dataset, "train", CONFIG, tmp_path / "work", tmp_path / "f")
    assert message.startswith("labels: expected 0 to 1 for 2 classes, found 2 in row 7")


# ---------------------------------------------------------------- reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole features folder of three images."""
    folder = tmp_path / "features"
    folder.mkdir()
    np.save(folder / "avgpool.npy", np.ones((3, 4), np.float32))
    np.save(folder / "labels.npy", np.arange(3))
    manifest = {
        "checkpoint_sha256": "a" * 64,
        "dataset": {"name": "imagenet", "manifest_sha256": "b" * 64},
        "dims": {"avgpool": 4},
        "finished": True,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def unreadable(folder: Path) -> str:
    """Return the message with which opening `folder` is refused."""
    with pytest.raises(BadInput) as caught:
        Features.open(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    return sentence(caught.value)


def test_features_in_memory():
    found = Features(layers={"avgpool": np.ones((3, 4))}, labels=np.arange(3))
    with pytest.raises(BadInput, match="no checkpoint_sha256"):
        _ = found.checkpoint_sha256
    with pytest.raises(BadInput, match="at least one layer"):
        Features(layers={}, labels=np.arange(3))
    with pytest.raises(BadInput, match="one row for each of 3 labels; found an array of shape"):
        Features(layers={"avgpool": np.ones((2, 4))}, labels=np.arange(3))


def test_a_half_written_folder_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    assert "half-written features (manifest.json does not say finished)" in unreadable(folder)
    (folder / "manifest.json").write_text("{")
    assert "not valid JSON" in unreadable(folder)
    (folder / "manifest.json").unlink()
    assert "half-written features (no manifest.json)" in unreadable(folder)
    assert "no such features folder" in unreadable(folder.with_name("other"))


def test_arrays_that_do_not_fit_are_refused(folder):
    np.save(folder / "labels.npy", np.arange(4))
    assert "avgpool: expected one row for each of 4 labels" in unreadable(folder)
    (folder / "labels.npy").unlink()
    assert "labels.npy cannot be read" in unreadable(folder)
    np.save(folder / "labels.npy", np.arange(3))
    np.save(folder / "avgpool.npy", np.ones((3, 5), np.float32))
    assert "avgpool.npy: the manifest says dimension 4, found an array of shape (3, 5)" in unreadable(folder)
    whole = (folder / "avgpool.npy").read_bytes()
    (folder / "avgpool.npy").write_bytes(whole[:-1])
    assert "avgpool.npy cannot be read" in unreadable(folder)
    (folder / "avgpool.npy").write_bytes(b"")
    assert "avgpool.npy cannot be read" in unreadable(folder)
    np.save(folder / "avgpool.npy", np.array([[1, 2, 3, np.nan]] * 3))
    assert "avgpool: row 0 holds NaN" in unreadable(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 5, 2], "labels: expected 0 to 2 for 3 classes, found 5 in row 1"),
        ([0, 1, -1], "labels: expected 0 to 2 for 3 classes, found -1 in row 2"),
        ([[1, 0, -1], [0, 1, 0], [0, 0, 2]], "labels: expected -1 to 1 for 3 classes, found 2 in row 2"),
        ([[1, 0], [0, 1], [0, 0]], "labels: expected a column for each of 3 classes, found 2"),
    ],
)
def test_labels_outside_the_class_count_are_refused(folder, labels, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "classes": 3}))
    assert len(Features.open(folder).labels) == 3
    np.save(folder / "labels.npy", np.array(labels))
    assert message in unreadable(folder)


def test_a_pickle_in_an_array_is_not_run(folder):
    np.save(folder / "labels.npy", np.array([{}, {}, {}], dtype=object), allow_pickle=True)
    assert "labels.npy cannot be read" in unreadable(folder)


def test_nan_in_a_late_row_is_found():
    rows = np.zeros((20_000, 2), np.float16)
    rows[15_000, 1] = np.inf
    with pytest.raises(BadInput, match="feature1: row 15000 holds NaN or infinity"):
        Features(layers={"feature1": rows}, labels=np.zeros(20_000))


def test_features_of_another_checkpoint_or_dataset_do_not_mix(folder):
    train = Features.open(folder)

    def test(**changed: object) -> Features:
        return Features(train.layers, train.labels, {**train.manifest, **changed})

    assert provenance({"train": train, "test": test()}) == ("a" * 64, train.dataset)
    with pytest.raises(BadInput, match=f"one checkpoint, but --train has {'a' * 64}, --test has {'c' * 64}"):
        provenance({"train": train, "test": test(checkpoint_sha256="c" * 64)})
    other = {"name": "voc2007", "manifest_sha256": "b" * 64}
    with pytest.raises(BadInput, match="one dataset"):
        provenance({"train": train, "test": test(dataset=other)})


@pytest.mark.parametrize("enabled", [True, False])
def test_only_tf32_is_switched_off_for_the_features(monkeypatch, enabled):
    cudnn, model = torch.backends.cudnn, resnet(ARCHITECTURE).eval()
    seen, forward = {}, model.forward_features

    def spy(images):
        seen.update({name: getattr(cudnn, name) for name in ("enabled", "benchmark", "allow_tf32")})
        return forward(images)

    monkeypatch.setattr(model, "forward_features", spy)
    with cudnn.flags(enabled=enabled, benchmark=enabled, allow_tf32=True):
        features._layers(model, torch.zeros(1, 3, 32, 32), FeatureSet(**SMALL))
        assert cudnn.allow_tf32
    assert seen == {"enabled": enabled, "benchmark": enabled, "allow_tf32": False}


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({}, {}, ""),
        ({"split": "trainval", "dtype": "float16"}, {"split": "test", "dtype": "float16"}, ""),
        ({"split": "test"}, {"split": "test"}, "--train: expected .* of voc2007 trainval, found those of"),
        ({"split": "test"}, {"split": "trainval"}, "--train: expected .* those of voc2007 test; give the"),
        ({}, {"dataset": {"name": "imagenet"}, "split": "val"}, "--test: expected .* those of imagenet val"),
        ({"transform": {"crop": 224}}, {"transform": {"crop": 32}}, "must have one transform, but --train"),
        ({"pooling": "specified"}, {"pooling": "adaptive"}, "must have one pooling"),
        ({"dtype": "float16"}, {"dtype": "float32"}, "must have one dtype"),
    ],
)
def test_two_splits_of_the_dataset_made_in_one_way_are_needed(train, test, message):
    splits = [Features({"avgpool": np.ones((2, 4))}, np.zeros(2), manifest) for manifest in (train, test)]
    with pytest.raises(BadInput, match=message) if message else nullcontext():
        features.check_splits(*splits, "voc2007", ("trainval", "test"), ["avgpool"])
