from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simclr import BadInput
from simclr.benchmarks import _linear, _semi, imagenet_semi
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
CPU = torch.device("cpu")


def test_defaults_are_the_published_protocol():
    config = imagenet_semi.Config()
    assert (config.batch_size, config.epochs, config.milestones) == (256, 20, (12, 16))
    assert (config.lrs, config.head_multipliers) == ((0.1, 0.01, 0.001), (1, 10, 100))
    assert (config.momentum, config.weight_decay_1percent, config.weight_decay_10percent) == (0.9, 5e-4, 1e-4)
    schedule = _linear.steps(config.milestones, 0.2)
    assert [schedule(epoch) for epoch in (11, 12, 16, 19)] == pytest.approx([1, 0.2, 0.04, 0.04])


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
    held_out_top1 = {(1.0, 1): None, (1.0, 10): 40.0, (0.1, 1): 60.0, (0.1, 10): 60.0}
    calls = []

    def tune(train, test, lr, head_multiplier, folder):
        calls.append((len(train), len(test), lr, head_multiplier, folder.name))
        if folder.name == "refit":
            return {"top1": 70.0, "top5": 90.0}
        top1 = held_out_top1[lr, head_multiplier]
        return {"top1": top1, "top5": None if top1 is None else 95.0}

    val = Samples(np.array(["v.jpg"]), np.array([0]))
    result, details = _semi.choose_and_refit(tune, labelled(), val, config, tmp_path)
    assert result == {"top1": 70.0, "top5": 90.0}
    assert calls[:-1] == [
        (16, 4, 1.0, 1, "lr1_head1"),
        (16, 4, 1.0, 10, "lr1_head10"),
        (16, 4, 0.1, 1, "lr0.1_head1"),
        (16, 4, 0.1, 10, "lr0.1_head10"),
    ]
    assert calls[-1] == (20, 1, 0.1, 1, "refit")  # the first of two equal cells, on everything
    assert details["chosen"] == {"lr": 0.1, "head_multiplier": 1}
    assert [cell["top1"] for cell in details["held_out_accuracy"]] == [None, 40.0, 60.0, 60.0]


def test_a_grid_that_diverges_everywhere_is_an_error(tmp_path):
    def tune(train, test, lr, head_multiplier, folder):
        return {"top1": None, "top5": None}

    with pytest.raises(BadInput, match="all 9 cells of the grid diverged; add smaller values to lrs"):
        _semi.choose_and_refit(tune, labelled(), labelled(), imagenet_semi.Config(), tmp_path)


def test_everything_is_fine_tuned_at_its_own_rate(few_images, small_backbone, tmp_path, monkeypatch):
    dataset = few_images(2, 1)
    train, val = _linear.train_and_val(dataset)
    seen = {}

    def spy(model, optimizer, images, config, schedule, *rest):
        seen.update(model=model, groups=optimizer.param_groups)
        model.train()
        seen["modes"] = {module.training for module in model.modules()}
        fit(model, optimizer, images, config, schedule, *rest)

    fit = _semi.fit
    monkeypatch.setattr(_semi, "fit", spy)
    result = _semi.fine_tune(small_backbone, 10, MINIATURE, 0.01, CPU, train, val, 0.02, 10, tmp_path)
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
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert not (tmp_path / "state.pt").exists()
    monkeypatch.setattr(_semi, "fit", None)
    assert _semi.fine_tune(small_backbone, 10, MINIATURE, 0.01, CPU, train, val, 0.02, 10, tmp_path) == result


def test_a_diverging_cell_has_no_accuracy(few_images, small_backbone, tmp_path):
    train, val = _linear.train_and_val(few_images(2, 1))
    config = MINIATURE.model_copy(update={"batch_size": 4})
    result = _semi.fine_tune(small_backbone, 10, config, 0.0, CPU, train, val, 1e30, 1, tmp_path)
    assert result == {"top1": None, "top5": None}


def test_the_published_list_is_used(monkeypatch):
    subset = Samples(np.array(["a.jpg", "b.jpg"]), np.array([0, 1]))
    asked = []
    monkeypatch.setattr(_semi.datasets, "subset", lambda dataset, name: asked.append(name) or subset)
    dataset = SimpleNamespace(name="imagenet", classes=2)
    found = _semi.labelled_subset(dataset, None, 10, imagenet_semi.Config())
    assert found is subset
    assert asked == ["train_10percent"]
    with pytest.raises(BadInput, match="expected labels 0…0, found 1"):
        _semi.labelled_subset(SimpleNamespace(name="imagenet", classes=1), None, 1, imagenet_semi.Config())


def test_the_miniature_runs(dataset, small_backbone, tmp_path):
    """With the lists of the miniature, of 20 and 280 images."""
    imagenet = dataset("imagenet")
    config = MINIATURE.model_copy(update={"subsets": "listed", "epochs": 1, "batch_size": 64})
    train, val = _linear.train_and_val(imagenet)
    small = Samples(val.paths[:20], val.labels[:20])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear, "samples", lambda dataset, split: train if split == "train" else small)
        metrics = imagenet_semi.evaluate(small_backbone, imagenet, config, tmp_path)
    assert list(metrics) == list(imagenet_semi.COLUMNS)
    assert all(0 <= value <= 100 for value in metrics.values())
    for percent in ("1percent", "10percent"):
        details = metrics.details[percent]
        assert details["subset"] == "listed"
        assert len(details["subset_sha256"]) == 64
        assert len(details["held_out_accuracy"]) == 2
    json.dumps(metrics.details, allow_nan=False)
