from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test__linear import exit_status, start, start_ranks

from simclr import BadInput, rolling
from simclr.benchmarks import _images, _linear, _semi, imagenet_semi
from simclr.benchmarks._images import train_and_val
from simclr.datasets import Samples

MINIATURE = imagenet_semi.Config(
    image_size=32,
    resize=32,
    subsets="drawn",
    lrs=(0.05,),
    head_multipliers=(1, 10),
    batch_size=16,
    epochs=2,
    milestones=(1,),
)


def job(folder, signals=(), config=MINIATURE):
    return _linear.Job(config, {"run": "this"}, folder, torch.device("cpu"), list(signals))


def test_defaults_are_those_of_imagenet_1percent_and_10percent():
    """MMSelfSup v0.11.0, configs/benchmarks/classification/imagenet/; the grid: OpenSelfSup, MODEL_ZOO.md."""
    config = imagenet_semi.Config()
    assert (config.batch_size, config.epochs, config.milestones) == (256, 20, (12, 16))
    assert (config.lrs, config.head_multipliers) == ((0.1, 0.01, 0.001), (1, 10, 100))
    assert (config.momentum, config.weight_decay_1percent, config.weight_decay_10percent) == (0.9, 5e-4, 1e-4)
    schedule = _linear.steps(config.milestones, 0.2)
    assert [schedule(epoch) for epoch in (11, 12, 16, 19)] == pytest.approx([1, 0.2, 0.04, 0.04])
    assert (config.image_size, config.resize, config.crop_area) == (224, 256, (0.08, 1.0))
    assert (config.precision, config.seed) == ("float32", 0)


def test_the_optimiser_decays_all_of_both_and_is_not_nesterovs(small_backbone):
    network, head = small_backbone.model(), torch.nn.Linear(8, 3)
    optimizer = _semi.sgd(imagenet_semi.Config(), network, head, 0.01, 100, 5e-4)
    backbone, classifier = optimizer.param_groups
    assert (backbone["lr"], classifier["lr"]) == (0.01, 1.0)
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.9, False)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {5e-4}
    assert len(backbone["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize(
    ("percent", "published"), [(1, {13: 811, 12: 189}), (10, {128: 884, 129: 116})], ids=["1%", "10%"]
)
def test_drawn_subsets_have_the_published_counts(percent, published):
    labels = np.random.default_rng(0).permutation(np.arange(1_281_167) % 1000)
    chosen = _semi.draw(labels, 1000, percent, seed=0)
    assert Counter(np.bincount(labels[chosen]).tolist()) == published
    assert len(np.unique(chosen)) == len(chosen)


def test_draws_follow_the_seed():
    labels = np.arange(2000) % 10
    first, again, other = (_semi.draw(labels, 10, 1, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_class_with_too_few_images_is_refused():
    labels = np.array([0] * 199 + [1])
    with pytest.raises(BadInput, match="10 % of 200 images are 10 of class 1, which has 1"):
        _semi.draw(labels, 2, 10, seed=0)


def test_hold_out_is_a_share_of_every_class():
    labels = np.repeat([0, 1, 2], [2, 10, 25])
    train, held_out = _semi.hold_out(labels, 0.2, seed=0)
    assert sorted([*train, *held_out]) == list(range(37))
    assert np.bincount(labels[held_out]).tolist() == [1, 2, 5]
    with pytest.raises(BadInput, match="class 1 has one labelled image"):
        _semi.hold_out(np.array([0, 0, 1]), 0.2, seed=0)


def labelled(n=20):
    return Samples(np.array([f"{i}.jpg" for i in range(n)]), np.arange(n) % 2)


def test_the_best_held_out_cell_is_refitted_and_val_seen_once(tmp_path):
    config = imagenet_semi.Config(lrs=(1.0, 0.1), head_multipliers=(1, 10))
    held_out = {
        (1.0, 1): (None, None),
        (1.0, 10): (60.0, 94.0),
        (0.1, 1): (60.0, 95.0),
        (0.1, 10): (60.0, 95.0),
    }
    calls = []

    def tune(train, test, lr, head_multiplier, folder):
        calls.append((len(train), len(test), lr, head_multiplier, folder.name))
        if folder.name == "refit":
            return {"top1": 70.0, "top5": 90.0, "curve": [1]}
        top1, top5 = held_out[lr, head_multiplier]
        return {"top1": top1, "top5": top5, "curve": [0]}

    val = Samples(np.array(["v.jpg"]), np.array([0]))
    result, details = _semi.choose_and_refit(tune, labelled(), val, config, tmp_path)
    assert result == {"top1": 70.0, "top5": 90.0, "curve": [1]}
    assert calls[:-1] == [
        (16, 4, 1.0, 1, "lr1_head1"),
        (16, 4, 1.0, 10, "lr1_head10"),
        (16, 4, 0.1, 1, "lr0.1_head1"),
        (16, 4, 0.1, 10, "lr0.1_head10"),
    ]
    assert calls[-1] == (20, 1, 0.1, 1, "refit")  # the first of the two best cells, on everything
    assert details["chosen"] == {"lr": 0.1, "head_multiplier": 1}
    assert [cell["top1"] for cell in details["held_out_accuracy"]] == [None, 60.0, 60.0, 60.0]
    assert set(details["held_out_accuracy"][0]) == {"lr", "head_multiplier", "top1", "top5"}


def test_a_grid_that_diverges_everywhere_is_an_error(tmp_path):
    def tune(train, test, lr, head_multiplier, folder):
        return {"top1": None, "top5": None, "curve": []}

    with pytest.raises(BadInput, match="all 9 cells of the grid diverged; add smaller values to lrs"):
        _semi.choose_and_refit(tune, labelled(), labelled(), imagenet_semi.Config(), tmp_path)


def test_everything_is_fine_tuned_at_its_own_rate(few_images, small_backbone, tmp_path, monkeypatch):
    dataset = few_images(2, 1)
    train, val = train_and_val(dataset, MINIATURE)
    seen = {}

    def spy(job, model, optimizer, images, schedule, *rest, autocast):
        seen.update(model=model, groups=optimizer.param_groups)
        found = fit(job, model, optimizer, images, schedule, *rest, autocast=autocast)
        seen["modes"] = {module.training for module in model.modules()}
        return found

    fit = _semi.fit
    monkeypatch.setattr(_semi, "fit", spy)
    arguments = (job(tmp_path), small_backbone, 10, 0.01, train, val, 0.02, 10, tmp_path / "cell")
    result = _semi.fine_tune(*arguments)
    before = small_backbone.state()
    network = seen["model"]["image"][0]
    assert all(not torch.equal(p.detach(), before[name]) for name, p in network.named_parameters())
    assert not torch.equal(network.bn1.running_mean, before["bn1.running_mean"])
    assert seen["modes"] == {True}
    backbone, head = seen["groups"]
    assert (backbone["initial_lr"], head["initial_lr"]) == (0.02, 0.2)
    assert backbone["weight_decay"] == head["weight_decay"] == 0.01
    assert len(backbone["params"]) + len(head["params"]) == len(list(seen["model"].parameters()))
    # The result is kept, the large state is not; asked again, nothing is trained.
    assert json.loads((tmp_path / "cell/result.json").read_text()) == result
    assert [row["epoch"] for row in result["curve"]] == [1, 2]
    assert [row["lr"] for row in result["curve"]] == pytest.approx([0.02, 0.02 / 5])  # after the milestone
    assert not list((tmp_path / "cell").glob("*.pt"))
    monkeypatch.setattr(_semi, "fit", None)
    assert _semi.fine_tune(*arguments) == result


def test_a_stopped_fine_tuning_goes_on_in_its_own_folder(few_images, small_backbone, tmp_path):
    train, val = train_and_val(few_images(4, 1), MINIATURE)
    arguments = (small_backbone, 10, 0.01, train, val, 0.02, 10)
    whole = _semi.fine_tune(job(tmp_path), *arguments, tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        _semi.fine_tune(job(tmp_path, [signal.SIGTERM]), *arguments, tmp_path / "cell")
    assert stopped.value.code == rolling.STOPPED
    (checkpoint,) = (tmp_path / "cell").glob("*.pt")
    assert checkpoint.name == "checkpoint-000000001.pt"
    shutil.copytree(tmp_path / "cell", tmp_path / "other")
    with pytest.raises(BadInput, match="fine_tuning is cell there, other here"):
        _semi.fine_tune(job(tmp_path), *arguments, tmp_path / "other")
    assert _semi.fine_tune(job(tmp_path), *arguments, tmp_path / "cell") == whole


def test_a_diverging_cell_has_no_accuracy(few_images, small_backbone, tmp_path):
    train, val = train_and_val(few_images(2, 1), MINIATURE)
    config = MINIATURE.model_copy(update={"batch_size": 4})
    arguments = (small_backbone, 10, 0.0, train, val, 1e30, 1)
    result = _semi.fine_tune(job(tmp_path, config=config), *arguments, tmp_path / "cell")
    assert result == {"top1": None, "top5": None, "curve": []}


def test_the_published_list_is_used(monkeypatch):
    subset = Samples(np.array(["a.jpg", "b.jpg"]), np.array([0, 1]))
    asked = []
    monkeypatch.setattr(_semi.datasets, "subset", lambda dataset, name: asked.append(name) or subset)
    dataset = SimpleNamespace(name="imagenet", classes=2)
    found = _semi.labelled_subset(dataset, range(20), 10, imagenet_semi.Config())
    assert found is subset
    assert asked == ["train_10percent"]
    with pytest.raises(BadInput, match="expected labels 0…0, found 1"):
        _semi.labelled_subset(SimpleNamespace(name="imagenet", classes=1), [], 1, imagenet_semi.Config())
    with pytest.raises(
        BadInput, match="imagenet 1 % list: expected about 20 images, found 2; fetch the list"
    ):
        _semi.labelled_subset(dataset, range(2000), 1, imagenet_semi.Config())


@pytest.mark.parametrize(
    ("images", "refused"), [(12_811, False), (11_900, False), (11_000, True), (128_116, True)]
)
def test_a_list_of_another_size_is_refused(images, refused):
    """Up to one image of each class more or less, as a list may round for each class."""
    files = Samples(np.arange(images), np.arange(images) % 1000)
    refusal = pytest.raises(BadInput, match=f"expected about 12812 images, found {images}")
    with refusal if refused else nullcontext():
        _semi.check_size(files, 1_281_167 / 100, 1000, "imagenet 1 % list")


@pytest.mark.parametrize("grid", [{"lrs": [0.0]}, {"lrs": [0.1, -0.1]}, {"head_multipliers": [0]}])
def test_rates_that_train_nothing_or_away_are_refused(grid):
    with pytest.raises(ValidationError, match="greater than 0"):
        imagenet_semi.Config(**grid)


def test_each_share_of_the_labels_has_its_own_subset_and_weight_decay(
    few_images, small_backbone, tmp_path, monkeypatch
):
    asked = {}

    def chosen(tune, labelled, val, config, folder):
        asked[folder.name] = (len(labelled), len(val), tune.args[-1])
        return {"top1": 1.0, "top5": 2.0, "curve": []}, {}

    monkeypatch.setattr(_semi, "choose_and_refit", chosen)
    config = MINIATURE.model_copy(update={"weight_decay_1percent": 0.5, "weight_decay_10percent": 0.1})
    imagenet_semi.evaluate(small_backbone, few_images(20, 3), config, tmp_path)
    assert asked == {"1percent": (2, 30, 0.5), "10percent": (20, 30, 0.1)}


def test_a_list_that_is_not_balanced_or_names_an_image_twice_is_refused():
    files = np.array(["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"])
    _semi.check_balanced(Samples(files, np.array([0, 0, 1, 1, 1])), 2, "1 % list")
    with pytest.raises(BadInput, match=r"1 % list: expected as many .* found 1 of class 0 and 4 of class 1"):
        _semi.check_balanced(Samples(files, np.array([0, 1, 1, 1, 1])), 2, "1 % list")
    with pytest.raises(BadInput, match="found 0 of class 2 and 3 of class 1"):
        _semi.check_balanced(Samples(files, np.array([0, 0, 1, 1, 1])), 3, "1 % list")
    files[4] = "c.jpg"
    with pytest.raises(BadInput, match="expected every image once, found 5 lines of 4 images; fetch"):
        _semi.check_balanced(Samples(files, np.array([0, 0, 1, 1, 1])), 2, "1 % list")


def test_the_miniature_runs(dataset, small_backbone, tmp_path):
    """With the lists of the miniature, of 28 and 280 images."""
    imagenet = dataset("imagenet")
    config = MINIATURE.model_copy(update={"subsets": "listed", "epochs": 1, "batch_size": 64})
    train, val = train_and_val(imagenet, config)
    small = Samples(val.paths[:20], val.labels[:20])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_images, "samples", lambda dataset, split: train if split == "train" else small)
        metrics = imagenet_semi.evaluate(small_backbone, imagenet, config, tmp_path, tmp_path / "curve.csv")
    assert list(metrics) == list(imagenet_semi.COLUMNS)
    assert all(0 <= value <= 100 for value in metrics.values())
    for percent in ("1percent", "10percent"):
        details = metrics.details[percent]
        assert details["subset"] == "listed"
        assert len(details["subset_sha256"]) == 64
        assert len(details["held_out_accuracy"]) == 2
    assert (metrics.details["processes"], metrics.details["precision"]) == (1, "float32")
    json.dumps(metrics.details, allow_nan=False)
    header = "epoch,lr_1percent,lr_10percent,loss_1percent,loss_10percent"
    assert (tmp_path / "curve.csv").read_text().splitlines()[0] == header
    assert (tmp_path / "curve.png").exists()


def test_two_processes_fine_tune_as_one(dataset, small_backbone, tmp_path):
    """Compared on the short fine-tuning: a training with BatchNorm over few images magnifies rounding."""
    short = {"lrs": (0.01,), "head_multipliers": (1,), "epochs": 1, "milestones": ()}
    config = MINIATURE.model_copy(update={"subsets": "listed", **short})
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = config, small_backbone.path, dataset("imagenet").manifest
    assert [exit_status(each) for each in [start(*arguments, one), *start_ranks(*arguments, two)]] == [0] * 3
    found, expected = (json.loads((folder / "metrics.json").read_text())[1] for folder in (two, one))
    assert (found["processes"], expected["processes"]) == (2, 1)
    for key in ("subset_sha256", "images", "held_out_images"):
        assert found["1percent"][key] == expected["1percent"][key]
        assert found["10percent"][key] == expected["10percent"][key]
    losses = [np.loadtxt(folder / "curve.csv", delimiter=",", skiprows=1)[3] for folder in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
