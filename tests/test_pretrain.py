from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn

from simclr import BadInput, config, datasets, distributed, pretrain
from simclr.checkpoint import Backbone
from simclr.config import Augmentation, Recipe
from simclr.datasets import Dataset
from simclr.optim import SCHEDULES, parameter_groups

RECIPE = Recipe(
    architecture="resnet18_w0.125",
    epochs=2,
    batch_size=8,
    projector=(16, 8),
    warmup_epochs=1,
    augmentation=Augmentation(image_size=32),
)
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


def _run(recipe, manifest, folder, die_at=None, number=None, environment=None):
    """Pretrain; send signal `number` to this very process in step `die_at`."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    pretrain.SAVE_SECONDS = -1  # after every step
    check_finite = pretrain.check_finite

    def dying(loss, step, *rest):
        if step == die_at:
            os.kill(os.getpid(), number)
        check_finite(loss, step, *rest)

    pretrain.check_finite = dying
    pretrain.pretrain(recipe, Dataset.open(manifest), folder / "backbone.safetensors", folder / "work")


def start(*arguments, **keywords):
    """Start `_run` in a process of its own; a fork server imports torch once for all of them."""
    multiprocessing.set_forkserver_preload(["simclr.pretrain", "matplotlib.pyplot", "torch._dynamo"])
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments, kwargs=keywords)
    process.start()
    return process


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
        return [{**row, "images_per_second": ""} for row in csv.DictReader(file)]


# ---------------------------------------------------------------- a run


def test_the_backbone_is_clean_and_says_where_it_comes_from(finished, manifest):
    backbone = Backbone.open(finished / "backbone.safetensors")
    assert not any("projector" in key for key in backbone.state())
    said = backbone.metadata
    assert (said["architecture"], said["source"], said["epochs"]) == ("resnet18_w0.125", "pretrain", "2")
    assert Recipe.model_validate_json(said["recipe"]) == RECIPE
    assert said["dataset_manifest_sha256"] == Dataset.open(manifest).dataset.manifest_sha256
    assert (said["steps"], said["images_seen"]) == ("6", "44")
    assert said["precision"] == ("bfloat16 autocast" if torch.cuda.is_available() else "float32")


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
    assert (finished / "pretrain.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "work").glob("*/tensorboard/events*"))
    assert len(list((finished / "work").glob("*/checkpoint-*.pt"))) == 2


def test_the_picture_is_a_function_of_the_rows(tmp_path):
    log = [{"step": i, "loss": 1 / i, "lr": 0.1} for i in range(1, 5)]
    for name in ("a.png", "b.png"):
        pretrain.plot(log, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_rows_are_means_of_steps_when_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "ROWS", 3)
    log = pretrain.Log(tmp_path, [], [], steps=8)
    for step in range(8):
        log.add(step, 0, 0.1, float(step), 4)
    assert [(row["step"], row["loss"]) for row in log.rows] == [(3, 1), (6, 4), (8, 6.5)]


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize(
    ("number", "step", "status"),
    [
        (signal.SIGKILL, 4, -signal.SIGKILL),
        (signal.SIGTERM, 1, pretrain.STOPPED),
        (signal.SIGUSR1, 2, pretrain.STOPPED),
    ],
)
def test_a_stopped_run_ends_in_the_weights_of_an_unstopped_one(
    finished, manifest, tmp_path, number, step, status
):
    assert exit_status(start(RECIPE, manifest, tmp_path, step, number)) == status
    assert not (tmp_path / "backbone.safetensors").exists()
    if status == pretrain.STOPPED:
        assert _logged(tmp_path) == step + 1
    assert exit_status(start(RECIPE, manifest, tmp_path)) == 0
    for name in ("backbone.safetensors", "pretrain.png"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert rows(tmp_path) == rows(finished)


def _logged(folder: Path) -> int:
    """Return the number of steps in TensorBoard's log."""
    (events,) = (folder / "work").glob("*/tensorboard/events*")
    return sum(event.HasField("summary") for event in EventFileLoader(str(events)).Load()) // 3


def _copy_of_work(finished: Path, folder: Path) -> Path:
    for path in (finished / "work").glob("*/*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _resume(work: Path):
    network = pretrain.build(RECIPE)
    optimizer = pretrain.build_optimizer(RECIPE, network)
    return pretrain.resume(work, network, optimizer, torch.device("cpu"))


def test_a_truncated_checkpoint_falls_back_to_the_one_before(finished, tmp_path, capsys):
    work = _copy_of_work(finished, tmp_path)
    older, newest = sorted(work.glob("checkpoint-*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)
    assert _resume(work)["step"] == 5
    assert f"{newest} cannot be read" in capsys.readouterr().err
    older.write_bytes(b"")
    with pytest.raises(BadInput, match="no rolling checkpoint can be read; delete it"):
        _resume(work)


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
    with pretrain.workplace(work, run):
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
    with pretrain.workplace(tmp_path / "work", run):
        pass


def test_a_loss_that_is_not_finite_stops_at_once(manifest, tmp_path, monkeypatch):
    steps = iter([0.0, float("nan")])
    loss = pretrain.nt_xent
    monkeypatch.setattr(pretrain, "nt_xent", lambda *z: loss(*z) + next(steps))
    with pytest.raises(BadInput, match=r"step 1: the loss is nan at a learning rate of 0.00\d+; lower `lr`"):
        pretrain.pretrain(RECIPE, Dataset.open(manifest), tmp_path / "b.safetensors", tmp_path / "work")
    assert not (tmp_path / "b.safetensors").exists()


# ---------------------------------------------------------------- data


def test_a_batch_that_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(BadInput, match="at most the 22 images of imagenet's train split, found 256"):
        pretrain.count_steps(Recipe(), 22)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(BadInput, match="a multiple of the 3 processes, found 256"):
        pretrain.count_steps(Recipe(), 1000)


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 3), (True, 2)])
def test_last_batch(drop_last, steps):
    recipe = RECIPE.model_copy(update={"drop_last": drop_last})
    assert pretrain.count_steps(recipe, IMAGES) == steps
    assert len(list(pretrain.keys(recipe, IMAGES, 0))) == 2 * steps


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_epoch_is_a_new_permutation_and_a_step_has_the_same_images_on_any_number_of_ranks(world):
    def steps(epoch):
        ranks = [pretrain.order(22, 8, 0, epoch, rank, world) for rank in range(world)]
        assert len({tuple(map(len, rank)) for rank in ranks}) == 1  # equal shares
        return [np.concatenate(step) for step in zip(*ranks, strict=True)]

    alone = pretrain.order(22, 8, 0, 1, 0, 1)
    together = steps(1)
    assert [set(step) for step in together[:2]] == [set(step) for step in alone[:2]]
    assert set(together[2]) >= set(alone[2])
    assert [len(step) for step in together] == [8, 8, 6 + (-22 % world)]
    assert sorted(np.concatenate(alone)) == list(range(22))
    assert not np.array_equal(np.concatenate(steps(0)), np.concatenate(together))


def test_the_order_goes_on_where_it_stopped():
    whole = list(pretrain.keys(RECIPE, IMAGES, 0))
    for step in range(7):
        assert list(pretrain.keys(RECIPE, IMAGES, step)) == whole[step:]


def test_only_a_dataset_that_fits_is_decoded_beforehand(manifest):
    paths = datasets.samples(Dataset.open(manifest), "train").paths
    needed = IMAGES * 40 * 48 * 3
    assert len(pretrain.decode_all(paths, needed)) == IMAGES
    assert pretrain.decode_all(paths, needed - 1) == []


# ---------------------------------------------------------------- several processes


def test_two_processes_train_the_backbone_of_one(manifest, tmp_path):
    """Gradients, BatchNorm statistics and batches are those of one process, so only rounding differs."""
    recipe = RECIPE.model_copy(update={"epochs": 1, "warmup_epochs": 0.0, "optimizer": "sgd", "lr": 0.003})
    alone, together = tmp_path / "alone", tmp_path / "together"
    processes = [start(recipe, manifest, alone)]
    for rank in range(2):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 20_000 + os.getpid() % 20_000}
        environment = {key: str(value) for key, value in environment.items()}
        processes.append(start(recipe, manifest, together, environment=environment))
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


# ---------------------------------------------------------------- the published recipes


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
    assert pretrain.count_steps(recipe, 1_281_167) == steps_per_epoch
    assert recipe.epochs * steps_per_epoch == steps
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("lars", 0.9, 1e-6)
    assert (recipe.trust_coefficient, recipe.temperature, recipe.warmup_epochs) == (0.001, 0.1, 10)
    assert (recipe.drop_last, recipe.sync_bn, recipe.zero_init_residual) == (False, True, True)
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
    assert len(pretrain.order(images, 256, 0, 0, 7, 8)[-1]) == per_process


def test_the_papers_own_recipe():
    recipe = _published("resnet50_paper-1000e")
    assert (recipe.batch_size, recipe.epochs, recipe.lr * 4096 / 256) == (4096, 1000, pytest.approx(4.8))
    assert (recipe.cosine, recipe.lars_exclude) == ("step_after_warmup", "bias_and_bn")
    assert (recipe.drop_last, recipe.gradient_divisor, recipe.zero_init_residual) == (True, 1, True)
    assert pretrain.count_steps(recipe, 1_281_167) == 312


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_epochs: expected less than the 5 epochs, found 10"):
        Recipe(epochs=5)
