"""Records: written whole or not at all, finite, validated on the way in and on the way out."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simclr import BadInput, benchmarks, files, results
from simclr.benchmarks import imagenet_knn
from simclr.protocol import Metrics

STAMP = results.DatasetStamp(name="imagenet", manifest_sha256="cd" * 32)


def an_input(checkpoint: str = "ab" * 32, dataset: results.DatasetStamp = STAMP) -> SimpleNamespace:
    return SimpleNamespace(checkpoint_sha256=checkpoint, dataset=dataset)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, metrics: Metrics, **inputs: Any) -> Path:
    """Run a benchmark whose evaluation gives `metrics`."""
    monkeypatch.setattr(imagenet_knn, "evaluate", lambda config, **inputs: metrics)
    output = folder / "a/imagenet_knn.json"
    benchmarks.run("imagenet_knn", "a", imagenet_knn.Config(), output, inputs or {"train": an_input()})
    return output


def test_a_record_holds_what_a_number_is_traced_with(tmp_path, monkeypatch):
    metrics = Metrics({"k10": 47.8}, spread={"k10": 0.2}, trials={"k10": 5}, details={"note": [1]})
    record = results.read(run(tmp_path, monkeypatch, metrics, train=an_input(), test=an_input()))
    assert (record.benchmark, record.model, record.metrics) == ("imagenet_knn", "a", {"k10": 47.8})
    assert record.spread == {"k10": results.Spread(std=0.2, trials=5)}
    assert record.config == imagenet_knn.Config().model_dump(mode="json")
    assert (record.checkpoint_sha256, record.dataset) == ("ab" * 32, STAMP)
    assert {"commit", "python", "torch", "simclr"} <= record.software.keys()
    assert record.hardware["cores"] >= 1
    assert record.seconds >= 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_named_and_not_written(tmp_path, monkeypatch, value):
    with pytest.raises(BadInput, match=f"imagenet_knn of a: expected finite numbers, but k20 is {value}"):
        run(tmp_path, monkeypatch, Metrics({"k10": 1.0, "k20": value}))
    with pytest.raises(BadInput, match="but k10 is"):
        run(tmp_path, monkeypatch, Metrics({"k10": 1.0}, spread={"k10": value}, trials={"k10": 2}))
    assert not (tmp_path / "a/imagenet_knn.json").exists()


def test_inputs_of_two_checkpoints_or_datasets_are_refused(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"one checkpoint, but --train has abab.*--test has efef"):
        run(tmp_path, monkeypatch, Metrics({"k10": 1.0}), train=an_input(), test=an_input("ef" * 32))
    other = results.DatasetStamp(name="imagenet", manifest_sha256="00" * 32)
    with pytest.raises(BadInput, match="one dataset, but"):
        run(tmp_path, monkeypatch, Metrics({"k10": 1.0}), train=an_input(), test=an_input(dataset=other))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["metrics"].update(k10=math.nan), "metrics.k10"),
        (lambda r: r.update(metrics={}), "metrics"),
        (lambda r: r.update(schema_version=2), "schema_version"),
        (lambda r: r.update(acuracy=1), "acuracy"),
        (lambda r: r.pop("dataset"), "dataset"),
        (lambda r: r.update(checkpoint_sha256="abc"), "checkpoint_sha256"),
    ],
)
def test_a_record_that_is_not_one_is_refused_by_key(tmp_path, monkeypatch, change, said):
    path = run(tmp_path, monkeypatch, Metrics({"k10": 1.0}))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=said) as error:
        results.read(path)
    assert f"delete it and run `snakemake {path}`" in str(error.value)


def test_a_record_that_is_missing_or_cut_off_says_what_to_type(tmp_path):
    with pytest.raises(BadInput, match="no such record; make it with `snakemake"):
        results.read(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"schema_version": 1, "bench')
    with pytest.raises(BadInput, match="not a valid record"):
        results.read(tmp_path / "cut.json")


def test_a_record_that_is_a_folder_or_not_text_is_refused(tmp_path):
    with pytest.raises(BadInput, match="expected a record, found a folder"):
        results.read(tmp_path)
    (tmp_path / "latin.json").write_bytes('{"model": "é"}'.encode("latin-1"))
    with pytest.raises(BadInput, match=r"latin\.json: not a valid record: file: "):
        results.read(tmp_path / "latin.json")


def test_details_that_json_cannot_hold_leave_the_old_record(tmp_path, monkeypatch):
    path = run(tmp_path, monkeypatch, Metrics({"k10": 1.0}))
    before = path.read_bytes()
    with pytest.raises(BadInput, match="finite numbers only"):
        run(tmp_path, monkeypatch, Metrics({"k10": 2.0}, details={"losses": [math.nan]}))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_replacing_is_whole_or_nothing(tmp_path):
    path = tmp_path / "deep/file.txt"
    with files.replacing(path) as part:
        part.write_text("old")

    def fail() -> None:
        with files.replacing(path) as part:
            part.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2**30),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2**30),
        (OSError("200000 requested and 51184 written"), 4096),  # numpy's
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos"), 0),  # torch's
    ],
)
def test_a_full_disk_is_said_and_leaves_no_part(tmp_path, monkeypatch, error, free):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(BadInput, match=r"a\.json: No space left on device; free some"):
        _write_and_raise(tmp_path / "a.json", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("another")])
def test_another_error_is_not_taken_for_a_full_disk(tmp_path, error):
    with pytest.raises(type(error), match=str(error.args[-1])):
        _write_and_raise(tmp_path / "a.json", error)


def _write_and_raise(path, error):
    with files.replacing(path) as part:
        part.write_text("half")
        raise error


def test_a_record_is_the_same_bytes_for_the_same_content(tmp_path, monkeypatch):
    record = results.read(run(tmp_path, monkeypatch, Metrics({"k20": 2.0, "k10": 1.0})))
    results.write(record, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "a/imagenet_knn.json").read_bytes()
