from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn

from simclr import (
    BadInput,
    config,
    datasets,
    distributed,
    files,
    loading,
    pretrain,
    results,
    rolling,
    stream,
    training_log,
    transforms,
)
from simclr.checkpoint import Backbone
from simclr.config import Augmentation, Execution, Recipe
from simclr.datasets import Dataset
from simclr.loss import nt_xent
from simclr.optim import SCHEDULES, parameter_groups

ROOT = Path(__file__).parent.parent
RECIPE = Recipe(
    architecture="resnet18_w0.125",
    epochs=2,
    batch_size=8,
    projector=(16, 8),
    warmup_epochs=1,
    augmentation=Augmentation(image_size=32),
)
MEASURED = ("images_per_second", "data_wait", "memory_gb")  # columns that differ between equal runs
IMAGES = 22  # three steps per epoch, the last of six images


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """A verified ImageNet of two classes and 22 images."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 2)):
        for i in range(count):
            path = root / split / ("n00000001", "n00000002")[i % 2] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)).save(path)
    (root / "meta").mkdir()
    lines = [f"n0000000{i % 2 + 1}/{i}.JPEG {i % 2}\n" for i in range(2)]
    (root / "meta/val.txt").write_text("".join(lines))
    block = config.Dataset(root=root, classes=2, images={"train": IMAGES, "val": 2})
    datasets.verify("imagenet", block, root / "manifest.json")
    return root / "manifest.json"


def _run(recipe, manifest, folder, die_at=None, number=None, environment=None, execution=None):
    """Pretrain; send signal `number` to this very process at the beginning of step `die_at`."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stderr = (folder / f"stderr-{os.environ.get('RANK', 0)}.txt").open("w", buffering=1)
    pretrain.SAVE_SECONDS = -1  # after every step
    schedule = SCHEDULES[recipe.cosine]

    def dying(step, *rest):
        if step == die_at:
            os.kill(os.getpid(), number)
        return schedule(step, *rest)

    SCHEDULES[recipe.cosine] = dying
    output, work = folder / "backbone.safetensors", folder / "work"
    try:
        pretrain.pretrain(recipe, Dataset.open(manifest), output, work, execution or Execution())
    except BadInput:
        traceback.print_exc()  # multiprocessing would write to where standard error was
        raise


def start(*arguments, **keywords):
    """Start `_run` in a process of its own; a fork server imports torch once for all of them."""
    multiprocessing.set_forkserver_preload(["simclr.pretrain", "matplotlib.pyplot", "torch._dynamo"])
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments, kwargs=keywords)
    process.start()
    return process


def start_ranks(recipe, manifest, folder, world=2, execution=None, **only_the_last):
    """Start `_run` in `world` processes that train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        places |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in places.items()}
        more = only_the_last if rank == world - 1 else {}
        more = {"environment": environment, "execution": execution, **more}
        processes.append(start(recipe, manifest, folder, **more))
    return processes


def exit_status(process) -> int:
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    assert exit_status(start(RECIPE, manifest, folder)) == 0
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "pretrain.csv").open() as file:
        return [{**row, **dict.fromkeys(MEASURED, "")} for row in csv.DictReader(file)]


# ---------------------------------------------------------------- a run


def test_the_backbone_is_clean_and_says_where_it_comes_from(finished, manifest):
    backbone = Backbone.open(finished / "backbone.safetensors")
    assert not any("projector" in key for key in backbone.state())
    said = backbone.metadata
    assert (said["architecture"], said["source"], said["epochs"]) == ("resnet18_w0.125", "pretrain", "2")
    assert Recipe.model_validate_json(said["recipe"]) == RECIPE
    assert said["dataset_manifest_sha256"] == Dataset.open(manifest).dataset.manifest_sha256
    assert (said["steps"], said["images_seen"]) == ("6", "44")
    assert (said["processes"], said["batch_norm_images"], said["precision"]) == ("1", "8", "float32")
    assert torch.__version__.startswith(json.loads(said["software"])["torch"])
    assert json.loads(said["hardware"])["cores"] >= 1


def test_the_record_says_what_was_run(finished):
    record = results.read(finished / "pretrain.json", results.Pretraining)
    assert record.checkpoint_sha256 == Backbone.open(finished / "backbone.safetensors").checkpoint_sha256
    assert Recipe.model_validate(record.recipe) == RECIPE
    assert (record.steps, record.images_seen, record.skipped_steps, record.skipped_images) == (6, 44, 0, [])
    assert record.images_per_second == pytest.approx(44 / record.seconds)
    assert record.gpu_hours == (0 if not record.hardware["gpus"] else pytest.approx(record.seconds / 3600))
    assert 0.05 < record.peak_memory_gb < 10
    assert record.knn == float(rows(finished)[-1]["knn"])


def test_training_changed_every_weight(finished):
    torch.manual_seed(RECIPE.seed)
    before = pretrain.build(RECIPE).backbone.state_dict()
    after = Backbone.open(finished / "backbone.safetensors").state()
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_the_log_has_a_row_per_step_and_a_picture(finished):
    found = rows(finished)
    assert [row["step"] for row in found] == [str(i + 1) for i in range(6)]
    assert [row["epoch"] for row in found] == ["1"] * 3 + ["2"] * 3
    assert [float(row["lr"]) for row in found] == [
        SCHEDULES[RECIPE.cosine](i, 3, 2, 0.3 * 8 / 256, 1) for i in range(6)
    ]
    assert [row["knn"] != "" for row in found] == [False] * 5 + [True]  # asked at the end at the latest
    for row in found:
        assert 0 <= float(row["alignment"]) <= 4
        assert -8 <= float(row["uniformity"]) <= 0
        assert float(row["gradient_norm"]) > 0
    assert (finished / "pretrain.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "work").glob("*/tensorboard/events*"))
    assert len(list((finished / "work").glob("*/checkpoint-*.pt"))) == 2


def test_the_picture_is_a_function_of_the_rows(tmp_path):
    log = [{"step": i, "loss": 1 / i, "lr": 0.1, "knn": None, "images_per_second": 9} for i in range(1, 5)]
    for name in ("a.png", "b.png"):
        training_log.plot(log, tmp_path / name)
    log[-1]["knn"] = 50.0
    training_log.plot(log, tmp_path / "c.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_rows_are_means_of_steps_when_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(training_log, "ROWS", 3)
    log = training_log.Log(tmp_path, [], [], steps=8)
    counts = {"skipped_steps": 1, "skipped_images": 0}
    for step in range(8):
        loss, knn = (None if step == 4 else float(step)), (30.0 + step if step % 2 else None)
        log.add(step, 0, 0.1, counts, loss=loss, images=4, seconds=2.0, wait=0.5, knn=knn)
    found = [(row["step"], row["loss"], row["knn"]) for row in log.rows]
    assert found == [(3, 1, 31), (6, 4, 35), (8, 6.5, 37)]
    assert {(row["images_per_second"], row["data_wait"], row["skipped_steps"]) for row in log.rows} == {
        (2, 0.25, 1)
    }
    log.rows[0]["loss"] = None
    training_log.write_csv(log.rows, tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text().splitlines()[1].split(",")[3] == ""


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize(
    ("number", "step", "status"),
    [
        (signal.SIGKILL, None, -signal.SIGKILL),
        (signal.SIGTERM, 1, rolling.STOPPED),
        (signal.SIGUSR1, 2, rolling.STOPPED),
    ],
)
def test_a_stopped_run_ends_in_the_weights_of_an_unstopped_one(
    finished, manifest, tmp_path, number, step, status
):
    if step is None:
        step = random.randrange(1, 6)
        print(f"killed in step {step}")
    assert exit_status(start(RECIPE, manifest, tmp_path, step, number)) == status
    assert not (tmp_path / "backbone.safetensors").exists()
    if status == rolling.STOPPED:
        assert _logged(tmp_path) == step + 1
    assert exit_status(start(RECIPE, manifest, tmp_path)) == 0
    ours, theirs = (folder / "backbone.safetensors" for folder in (tmp_path, finished))
    assert ours.read_bytes() == theirs.read_bytes()
    assert results.read(tmp_path / "pretrain.json", results.Pretraining).images_seen == 44
    assert rows(tmp_path) == rows(finished)


def _logged(folder: Path) -> int:
    """Return the number of steps in TensorBoard's log."""
    (events,) = (folder / "work").glob("*/tensorboard/events*")
    logged = [e.summary.value for e in EventFileLoader(str(events)).Load() if e.HasField("summary")]
    return sum(value.tag == "loss" for values in logged for value in values)


def _copy_of_work(finished: Path, folder: Path) -> Path:
    for path in (finished / "work").glob("*/*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _job(folder, manifest, recipe=RECIPE, execution=Execution()):  # noqa: B008
    return pretrain.Job(recipe, execution, Dataset.open(manifest), torch.device("cpu"), folder)


def _resume(work: Path, manifest, recipe=RECIPE):
    network = pretrain.build(recipe)
    optimizer = pretrain.build_optimizer(recipe, network)
    return pretrain.resume(_job(work, manifest, recipe), network, optimizer)


def test_a_checkpoint_of_another_recipe_is_refused_and_both_are_named(finished, manifest, tmp_path):
    work = _copy_of_work(finished, tmp_path)
    other = RECIPE.model_copy(update={"architecture": "resnet34_w0.125", "seed": 7})
    with pytest.raises(BadInput, match="found one of another") as error:
        _resume(work, manifest, other)
    assert "recipe.architecture is resnet18_w0.125 there, resnet34_w0.125 here" in str(error.value)
    assert "recipe.seed is 0 there, 7 here; delete it" in str(error.value)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(finished, manifest, tmp_path, capsys):
    work = _copy_of_work(finished, tmp_path)
    older, newest = sorted(work.glob("checkpoint-*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)
    state = _resume(work, manifest)
    assert state["step"] == 5
    assert f"{newest} is broken" in capsys.readouterr().err
    # What is broken does not stand in the way of what is saved next.
    for step in (5, 6):
        rolling.save(work, step, pretrain.run_of(RECIPE, Dataset.open(manifest)), {})
        assert torch.load(work / f"checkpoint-{step:09d}.pt")["step"] == step
    for path in (older, newest):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match="no rolling checkpoint is whole; delete it"):
        _resume(work, manifest)


def test_another_recipe_starts_afresh_and_both_runs_are_kept_apart(finished, manifest, tmp_path):
    recipe = RECIPE.model_copy(update={"epochs": 1, "warmup_epochs": 0.0})
    again = recipe.model_copy(update={"version": 2})
    for each in (recipe, again):
        assert exit_status(start(each, manifest, tmp_path)) == 0
    folders = list((tmp_path / "work").iterdir())
    runs = [json.loads((folder / "run.json").read_text()) for folder in folders]
    stamp = Dataset.open(manifest).dataset.manifest_sha256
    assert sorted(run["recipe"]["version"] for run in runs) == [1, 2]
    assert [Recipe(**run["recipe"]).epochs for run in runs] == [1, 1]
    assert {run["dataset_manifest"] for run in runs} == {stamp}
    steps = [sorted(path.name for path in folder.glob("checkpoint-*.pt")) for folder in folders]
    assert steps == [["checkpoint-000000002.pt", "checkpoint-000000003.pt"]] * 2


def _hold(work, run, ready):
    with files.workplace(work, run):
        ready.set()
        signal.pause()


def test_a_second_run_in_the_same_folder_is_refused(manifest, tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    run = pretrain.run_of(RECIPE, Dataset.open(manifest))
    first = context.Process(target=_hold, args=(tmp_path / "work", run, ready))
    first.start()
    try:
        assert ready.wait(60)
        with pytest.raises(BadInput, match="another run works in this folder"):
            pretrain.pretrain(RECIPE, Dataset.open(manifest), tmp_path / "b.safetensors", tmp_path / "work")
    finally:
        first.kill()
        first.join()
    with files.workplace(tmp_path / "work", run):
        pass


def _pretrain(manifest, folder, recipe=RECIPE, execution=Execution()):  # noqa: B008
    """Pretrain in this process."""
    output = folder / "backbone.safetensors"
    pretrain.pretrain(recipe, Dataset.open(manifest), output, folder / "work", execution)
    return results.read(folder / "pretrain.json", results.Pretraining)


def _spoil(monkeypatch, name, spoilt_step, spoil):
    """Replace `pretrain.<name>` by one whose result is spoilt in one step."""
    steps, function = iter(range(100)), getattr(pretrain, name)

    def spoilt(*arguments):
        result = function(*arguments)
        return spoil(result, *arguments) if next(steps) == spoilt_step else result

    monkeypatch.setattr(pretrain, name, spoilt)


SPOILT = {
    "loss": ("nt_xent", lambda loss, *_: loss + float("nan"), r"loss nan, gradient_norm \S+"),
    # Its value is that of the loss; its gradient is 0 · ∞.
    "gradient": ("nt_xent", lambda loss, z, *_: loss + (0 * z.sum()).sqrt(), r"loss \d.*, gradient_norm nan"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_not_finite_stops_at_once(manifest, tmp_path, monkeypatch, what):
    monkeypatch.setattr(pretrain, "SAVE_SECONDS", -1)
    name, spoil, said = SPOILT[what]
    _spoil(monkeypatch, name, 1, spoil)
    with pytest.raises(BadInput, match=rf"step 1: .*{said} at a learning rate of 0.00\d+; lower `lr`"):
        _pretrain(manifest, tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()
    assert [path.name for path in tmp_path.glob("work/*/*.pt")] == ["checkpoint-000000001.pt"]


def test_a_step_that_is_not_finite_can_be_undone_and_left_out(manifest, tmp_path, monkeypatch, capsys):
    """Images that are not numbers spoil BatchNorm's running statistics too, which must come back."""
    _spoil(monkeypatch, "augment", 1, lambda images, *_: images * float("nan"))
    record = _pretrain(manifest, tmp_path, execution=Execution(skip_steps=1))
    assert (record.skipped_steps, record.images_seen) == (1, 44 - 8)
    assert "step 1: loss nan" in capsys.readouterr().err
    found = rows(tmp_path)
    assert [row["loss"] == "" for row in found] == [False, True, False, False, False, False]
    assert [row["skipped_steps"] for row in found] == ["0", "1", "1", "1", "1", "1"]
    Backbone.open(tmp_path / "backbone.safetensors")  # all finite


def test_weights_that_are_not_finite_are_never_saved(manifest, tmp_path):
    job, network = _job(tmp_path, manifest), pretrain.build(RECIPE)
    optimizer = pretrain.build_optimizer(RECIPE, network)
    network.backbone.conv1.weight.data[0] = float("inf")
    with pytest.raises(BadInput, match="after step 9 a weight is not finite"):
        pretrain.save(job, 9, network, optimizer, {})
    assert not list(tmp_path.glob("*.pt"))


def test_nearest_neighbours_are_shown_and_change_nothing(finished, manifest, tmp_path):
    for every in (0, 1):
        assert (
            exit_status(start(RECIPE, manifest, tmp_path / str(every), execution=Execution(knn_every=every)))
            == 0
        )
    never, always = (Backbone.open(tmp_path / name / "backbone.safetensors").state() for name in "01")
    assert all(torch.equal(never[key], always[key]) for key in never)
    asked = [[row["knn"] != "" for row in rows(tmp_path / name)] for name in "01"]
    assert asked == [[False] * 6, [False, False, True] * 2]


# ---------------------------------------------------------------- micro-batches


def _network(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Flatten(),
        nn.Linear(12, 6),
        *([nn.BatchNorm1d(6)] if norm else []),
        nn.Tanh(),
        nn.Linear(6, 4),
    ]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("norm", [False, True])
def test_gradient_caching_gives_the_gradient_of_the_whole_batch(manifest, tmp_path, norm):
    """And with BatchNorm, of the whole batch's loss over projections that were normalised in pieces."""
    recipe = RECIPE.model_copy(
        update={"pipeline": "reference", "batch_norm": "process", "gradient_divisor": 4.0}
    )
    views = torch.randn(7, 2, 3, 2, 2, dtype=torch.float64)
    ours, theirs = _network(norm), _network(norm)
    loss, z = pretrain.gradients(_job(tmp_path, manifest, recipe, Execution(micro_batch=3)), ours, [views])
    parts = [views[first::3].transpose(0, 1).flatten(0, 1) for first in range(3)]
    expected_z = torch.cat([theirs(part).unflatten(0, (2, -1)) for part in parts], 1)
    expected = nt_xent(*expected_z, recipe.temperature)
    (expected / 4).backward()
    torch.testing.assert_close(
        (loss, z), (expected, expected_z.float()), check_dtype=False, rtol=1e-6, atol=1e-6
    )
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("micro_batches", "drop_last"), [((4, None), False), ((2, 2), True)])
def test_micro_batches_of_one_process_train_the_weights_of_several(
    manifest, tmp_path, micro_batches, drop_last
):
    """With BatchNorm over each process's own images, and so over each micro-batch's."""
    sgd = {"optimizer": "sgd", "lr": 0.003, "epochs": 1, "warmup_epochs": 0.0, "drop_last": drop_last}
    recipe = RECIPE.model_copy(update={"batch_norm": "process", **sgd})
    alone, together = tmp_path / "alone", tmp_path / "together"
    one_by_one, side_by_side = (Execution(micro_batch=size, knn_every=0) for size in micro_batches)
    processes = [start(recipe, manifest, alone, execution=one_by_one)]
    processes += start_ranks(recipe, manifest, together, execution=side_by_side)
    assert [exit_status(process) for process in processes] == [0, 0, 0]
    one, two = (Backbone.open(folder / "backbone.safetensors") for folder in (alone, together))
    ours, theirs, trained = one.state(), two.state(), dict(one.model().named_parameters())
    torch.manual_seed(recipe.seed)
    first = pretrain.build(recipe).backbone.state_dict()
    changes, differences = (
        torch.cat([(ours[key] - other[key]).flatten() for key in trained]) for other in (first, theirs)
    )
    assert differences.abs().max() < 1e-5
    assert differences.norm() < 1e-3 * changes.norm()
    images = "4" if micro_batches[1] is None else "2"
    assert one.metadata["batch_norm_images"] == two.metadata["batch_norm_images"] == images
    assert (one.metadata["processes"], two.metadata["processes"]) == ("1", "2")


def test_micro_batches_are_refused_where_the_recipe_wants_whole_batches(manifest, tmp_path):
    execution = Execution(micro_batch=4)
    with pytest.raises(
        BadInput, match=r"1 × 4 images pass at a time, .* statistics of all 8; set micro_batch"
    ):
        pretrain.count_steps(_job(tmp_path, manifest, execution=execution), IMAGES)
    in_pieces = RECIPE.model_copy(update={"batch_norm": "micro_batch"})
    assert pretrain.count_steps(_job(tmp_path, manifest, in_pieces, execution), IMAGES) == 3
    with pytest.raises(BadInput, match=r"a multiple of the 1 processes × execution.micro_batch 3, found 8"):
        pretrain.count_steps(_job(tmp_path, manifest, in_pieces, Execution(micro_batch=3)), IMAGES)


# ---------------------------------------------------------------- data


def test_the_manifest_of_another_dataset_is_refused(manifest, tmp_path):
    other = dataclasses.replace(Dataset.open(manifest), name="voc2007")
    with pytest.raises(BadInput, match="--dataset: expected the manifest of imagenet, found that of voc2007"):
        pretrain.pretrain(RECIPE, other, tmp_path / "b.safetensors", tmp_path / "work")


def test_a_batch_that_does_not_fit_is_refused(manifest, tmp_path, monkeypatch):
    job = _job(tmp_path, manifest, Recipe())
    with pytest.raises(BadInput, match="at most the 22 images of imagenet's train split, found 256"):
        pretrain.count_steps(job, 22)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(BadInput, match="a multiple of the 3 processes, found 256"):
        pretrain.count_steps(job, 1000)


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 3), (True, 2)])
def test_last_batch(manifest, tmp_path, drop_last, steps):
    job = _job(tmp_path, manifest, RECIPE.model_copy(update={"drop_last": drop_last}))
    assert pretrain.count_steps(job, IMAGES) == steps
    assert len(list(stream.keys(job.config, IMAGES, steps, 0))) == 2 * steps


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_epoch_is_a_new_permutation_and_a_step_has_the_same_images_on_any_number_of_ranks(world):
    def steps(epoch):
        ranks = [stream.order(22, 8, 0, epoch, rank, world) for rank in range(world)]
        assert len({tuple(map(len, rank)) for rank in ranks}) == 1  # equal shares
        return [np.concatenate(step) for step in zip(*ranks, strict=True)]

    alone = stream.order(22, 8, 0, 1, 0, 1)
    together = steps(1)
    assert [set(step) for step in together[:2]] == [set(step) for step in alone[:2]]
    assert set(together[2]) >= set(alone[2])
    assert [len(step) for step in together] == [8, 8, 6 + (-22 % world)]
    assert sorted(np.concatenate(alone)) == list(range(22))
    assert not np.array_equal(np.concatenate(steps(0)), np.concatenate(together))


def test_the_order_goes_on_where_it_stopped():
    whole = list(stream.keys(RECIPE, IMAGES, 3, 0))
    for step in range(7):
        assert list(stream.keys(RECIPE, IMAGES, 3, step)) == whole[step:]


@pytest.fixture
def spoilt(manifest, tmp_path, monkeypatch) -> Path:
    """The manifest of a copy of the images, of which one was truncated after it was verified."""
    monkeypatch.setattr(stream, "DECODED_BYTES", 0)
    root = shutil.copytree(manifest.parent, tmp_path / "images")
    said = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**said, "root": str(root)}))
    image = root / "train/n00000002/5.JPEG"
    os.truncate(image, image.stat().st_size // 2)
    return root / "manifest.json"


def test_an_image_that_cannot_be_decoded_is_named_and_ends_the_run(spoilt, tmp_path):
    with pytest.raises(BadInput, match=r"1 images cannot be decoded, more than .*n00000002/5.JPEG"):
        _pretrain(spoilt, tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()


def test_a_stated_number_of_images_may_be_skipped_and_is_counted(spoilt, tmp_path):
    record = _pretrain(spoilt, tmp_path, execution=Execution(skip_images=1))
    assert [Path(name).name for name in record.skipped_images] == [
        "5.JPEG"
    ]  # once, though met in both epochs
    assert (record.images_seen, rows(tmp_path)[-1]["skipped_images"]) == (44, "1")
    os.truncate(spoilt.parent / "train/n00000001/8.JPEG", 10)
    with pytest.raises(
        BadInput, match=r"2 images cannot be decoded, more than execution.skip_images: 1; .*8.JPEG"
    ):
        _pretrain(spoilt, tmp_path / "again", execution=Execution(skip_images=1))


def test_a_dataset_that_vanishes_ends_the_run_with_its_name(spoilt, tmp_path, monkeypatch):
    """The images go when the first step is done; the state after it stays."""
    monkeypatch.setattr(pretrain, "SAVE_SECONDS", -1)
    agree = pretrain.agree

    def vanish(*arguments):
        shutil.rmtree(spoilt.parent / "train", ignore_errors=True)
        return agree(*arguments)

    monkeypatch.setattr(pretrain, "agree", vanish)
    monkeypatch.setattr(loading, "divide_cores", lambda device: 0)  # so that no worker is ahead
    with pytest.raises(BadInput, match=r"images/train"):
        _pretrain(spoilt, tmp_path, execution=Execution(skip_images=1))
    assert list(tmp_path.glob("work/*/checkpoint-*.pt"))


@pytest.mark.parametrize("pipeline", ["device", "reference"])
def test_views_follow_from_seed_epoch_and_image_alone(manifest, pipeline):
    paths = datasets.samples(Dataset.open(manifest), "train").paths

    def view(epoch, image, seed=0):
        recipe = RECIPE.model_copy(update={"pipeline": pipeline, "seed": seed})
        (made, *_), undecodable = stream.Views(recipe, Execution(), paths)[epoch, image]
        assert undecodable == []
        return made

    assert torch.equal(view(0, 3), view(0, 3))
    for other in (view(1, 3), view(0, 4), view(0, 3, seed=1)):
        assert not torch.equal(view(0, 3), other)


def test_only_a_dataset_that_fits_is_decoded_beforehand(manifest):
    paths = datasets.samples(Dataset.open(manifest), "train").paths
    needed = IMAGES * 40 * 48 * 3
    for read in (datasets.decode, transforms.read_pixels):
        assert len(stream.decode_all(paths, read, needed)) == IMAGES
        assert stream.decode_all(paths, read, needed - 1) == []


# ---------------------------------------------------------------- several processes


def test_two_processes_train_the_backbone_of_one(manifest, tmp_path):
    """Gradients, BatchNorm statistics and batches are those of one process, so only rounding differs."""
    recipe = RECIPE.model_copy(update={"epochs": 1, "warmup_epochs": 0.0, "optimizer": "sgd", "lr": 0.003})
    alone, together = tmp_path / "alone", tmp_path / "together"
    processes = [start(recipe, manifest, alone), *start_ranks(recipe, manifest, together)]
    assert [exit_status(process) for process in processes] == [0, 0, 0]
    one, two = (Backbone.open(folder / "backbone.safetensors").state() for folder in (alone, together))
    torch.manual_seed(recipe.seed)
    first = pretrain.build(recipe).backbone.state_dict()
    # All of the change of weights and statistics; a ReLU that rounding flips may change one tensor by more.
    change, difference = (
        torch.cat([(one[key] - other[key]).double().flatten() for key in one]).norm()
        for other in (first, two)
    )
    assert difference < 1e-3 * change
    losses = [[float(row["loss"]) for row in rows(folder)] for folder in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(manifest, tmp_path):
    assert exit_status(start(RECIPE, manifest, tmp_path, 2, signal.SIGKILL)) == -signal.SIGKILL
    assert [exit_status(process) for process in start_ranks(RECIPE, manifest, tmp_path)] == [0, 0]
    said = (tmp_path / "stderr-0.txt").read_text()
    assert "going on after step 2: processes is 1 there, 2 here" in said
    assert "micro_batch is 8 there, 4 here; from here on only rounding differs" in said
    record = results.read(tmp_path / "pretrain.json", results.Pretraining)
    assert (record.processes, record.steps, record.images_seen) == (2, 6, 44)
    assert [(each["from_step"], each["processes"]) for each in record.machines] == [(0, 1), (2, 2)]


def test_processes_that_find_different_states_do_not_train_on(manifest, tmp_path, monkeypatch):
    """As where --work is on a disk of each node's own."""
    monkeypatch.setattr(distributed, "gather", lambda found: [found, found + 3])
    with pytest.raises(
        BadInput, match="expected one state for all 2 processes, found those after steps 0, 3; --work"
    ):
        _resume(tmp_path, manifest)


def test_when_one_process_dies_all_stop_and_nothing_is_half_written(manifest, tmp_path):
    processes = start_ranks(RECIPE, manifest, tmp_path, die_at=3, number=signal.SIGKILL)
    started = time.monotonic()
    statuses = [exit_status(process) for process in processes]
    assert time.monotonic() - started < 60
    assert statuses == [1, -signal.SIGKILL]
    assert (
        "BadInput: process 0 of 2 stops, because another one has ended"
        in (tmp_path / "stderr-0.txt").read_text()
    )
    assert not (tmp_path / "backbone.safetensors").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert [exit_status(process) for process in start_ranks(RECIPE, manifest, tmp_path)] == [0, 0]


# ---------------------------------------------------------------- from the shell


def _command(manifest, folder) -> list[str]:
    recipe = json.dumps(RECIPE.model_dump(mode="json"))
    files = ["--dataset", manifest, "--work", folder / "work", "--output", folder / "backbone.safetensors"]
    return [*map(str, ["-m", "simclr", "pretrain", *files]), "--config", recipe]


@pytest.mark.parametrize(
    "launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")]
)
def test_a_command_that_fails_ends(spoilt, tmp_path, launcher):
    """Its loader's workers, which ignore the signals of a cluster, do not keep it."""
    # The images decode in advance but for one, which the loader meets.
    command = [sys.executable, *launcher, *_command(spoilt, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == (1 if launcher else 2)
    assert re.search(
        r"simclr: 1 images cannot be decoded, more than execution.skip_images: 0; .*5.JPEG", done.stderr
    )


def test_an_interrupt_saves_and_ends_the_command_and_its_workers(manifest, tmp_path):
    command = [sys.executable, *_command(manifest, tmp_path)]
    slow = json.dumps(RECIPE.model_dump(mode="json") | {"epochs": 100_000})
    # Where the tests run in the background, the shell has them, and what they start, ignore interrupts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [*command[:-1], slow]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heed)
    try:
        assert "resnet18_w0.125 at 32 pixels, 100000 epochs of 22 images" in trainer.stdout.readline()
        assert "step 1 of" in trainer.stdout.readline()
        children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
        trainer.send_signal(signal.SIGINT)
        assert trainer.wait(60) == rolling.STOPPED
        assert list(tmp_path.glob("work/*/checkpoint-*.pt"))
        assert children
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        trainer.kill()
        trainer.wait()


# ---------------------------------------------------------------- the published recipes


def _of(recipe: Recipe) -> pretrain.Job:
    return pretrain.Job(recipe, Execution(), None, torch.device("cpu"), None)


def _published(name: str) -> Recipe:
    zoo = yaml.safe_load((Path(__file__).parent.parent / "config/config.yaml").read_text())
    return Recipe.model_validate(zoo["models"][name]["pretrain"])


@pytest.mark.parametrize(
    ("name", "batch", "lr", "epochs", "steps_per_epoch", "steps"),
    [
        ("resnet50_8xb32-coslr-200e", 256, 0.3, 200, 5_005, 1_001_000),
        ("resnet50_8xb64-coslr-200e", 512, 0.6, 200, 2_503, 500_600),
        ("resnet50_16xb256-coslr-200e", 4_096, 4.8, 200, 313, 62_600),
        ("resnet50_16xb256-coslr-800e", 4_096, 4.8, 800, 313, 250_400),
    ],
)
def test_published_recipes_have_the_published_numbers(name, batch, lr, epochs, steps_per_epoch, steps):
    recipe = _published(name)
    assert (recipe.batch_size, recipe.epochs) == (batch, epochs)
    assert recipe.lr * recipe.batch_size / 256 == pytest.approx(lr)
    assert pretrain.count_steps(_of(recipe), 1_281_167) == steps_per_epoch
    assert recipe.epochs * steps_per_epoch == steps
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("lars", 0.9, 1e-6)
    assert (recipe.trust_coefficient, recipe.temperature, recipe.warmup_epochs) == (0.001, 0.1, 10)
    assert (recipe.drop_last, recipe.batch_norm, recipe.zero_init_residual) == (False, "whole_batch", True)
    newer = name.endswith("800e")
    assert recipe.cosine == ("epoch_after_warmup" if newer else "epoch_from_start")
    assert recipe.lars_exclude == ("bias_and_bn" if newer else "bias_and_bn_but_shortcut")
    assert recipe.gradient_divisor == {256: 8, 512: 8, 4096: 16}[batch]
    assert recipe.augmentation == Augmentation(
        image_size=224,
        crop_area=(0.08, 1),
        crop_ratio=(3 / 4, 4 / 3),
        **{"flip": 0.5, "jitter": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2},
        **{"grayscale": 0.2, "blur": 0.5, "blur_sigma": (0.1, 2.0)},
    )
    with torch.device("meta"):
        network = pretrain.build(recipe)
    assert sum(p.numel() for p in network.parameters()) == 27_968_832
    adapted, excluded = parameter_groups(network, recipe.weight_decay, recipe.lars_exclude)
    assert (len(adapted["params"]), len(excluded["params"])) == ((55, 110) if newer else (59, 106))
    assert isinstance(network.projector[4], nn.BatchNorm1d)
    assert network.projector[4].affine


@pytest.mark.parametrize(("images", "per_process"), [(1_281_167, 18)])
def test_last_step_of_an_epoch_has_the_published_share(images, per_process):
    assert len(stream.order(images, 256, 0, 0, 7, 8)[-1]) == per_process


def test_the_papers_own_recipe():
    recipe = _published("resnet50_paper-1000e")
    assert (recipe.batch_size, recipe.epochs, recipe.lr * 4096 / 256) == (4096, 1000, pytest.approx(4.8))
    assert (recipe.cosine, recipe.lars_exclude) == ("step_after_warmup", "bias_and_bn")
    assert (recipe.drop_last, recipe.gradient_divisor, recipe.zero_init_residual) == (True, 1, True)
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("lars", 0.9, 1e-6)
    assert (recipe.temperature, recipe.warmup_epochs, recipe.projector) == (0.1, 10, (2048, 128))
    assert (recipe.batch_norm, recipe.augmentation) == ("whole_batch", Augmentation())
    assert pretrain.count_steps(_of(recipe), 1_281_167) == 312


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_epochs: expected less than the 5 epochs, found 10"):
        Recipe(epochs=5)
