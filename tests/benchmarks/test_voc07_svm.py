"""The SVM solver against LIBLINEAR; the protocol against the published script, with scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from simclr import BadInput
from simclr.benchmarks import _svm, voc07_svm
from simclr.benchmarks.voc07_svm import Config, evaluate, stratified_folds
from simclr.features import Features
from simclr.metrics import average_precision

COSTS = Config().costs
LAYERS = ["feature1", "feature2", "feature3", "feature4", "feature5"]


def liblinear(cost):
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, tol=1e-10, max_iter=1_000_000)


def fit(cost, rows, signs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at cost 100 LIBLINEAR's own stopping rule can be out of reach
        return liblinear(cost).fit(rows, signs)


def unit(rows):
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def problem(kind):
    """Return images `(n, D)` and the signs `(n, P)` of three problems."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 8)) + 0.5
    if kind == "wide":
        rows = random.normal(size=(30, 70))
    elif kind == "rank deficient":
        rows = random.normal(size=(40, 3)) @ random.normal(size=(3, 20))
    elif kind == "duplicate rows":
        rows = np.tile(random.normal(size=(13, 8)), (3, 1))
    elif kind == "zero rows":
        rows[::3] = 0
    signs = np.where(random.random((len(rows), 3)) < 0.3, 1, -1)
    signs[:2] = [[1], [-1]]
    if kind == "one positive":
        signs[1:] = -1
    return unit(rows), signs


KINDS = ["tall", "wide", "rank deficient", "duplicate rows", "zero rows", "one positive"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_solver_equals_liblinear(kind):
    rows, signs = problem(kind)
    images = torch.from_numpy(rows)
    solutions = {s.cost: s for s in _svm.Problems(_svm.gram(images, images), signs).path(COSTS)}
    assert sorted(solutions) == sorted(COSTS)
    for cost in COSTS:
        for column in range(3):
            expected = fit(cost, rows, signs[:, column]).decision_function(rows)
            found = solutions[cost]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found.scores[:, column], expected, rtol=0, atol=1e-5 * scale)
            on_kernel = _svm.gram(images, images) @ found.coefficients[:, column]
            np.testing.assert_allclose(on_kernel, found.scores[:, column], rtol=0, atol=1e-6 * scale)
            assert found.gap[column] < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_is_that_of_primal_and_dual(kind):
    """The duality gap from its two definitions, at a point that is not the solution."""
    rows, signs = problem(kind)
    images = torch.from_numpy(rows)
    problems = _svm.Problems(_svm.gram(images, images), signs)
    w = torch.full((problems.basis.shape[1], 3), 0.1, dtype=torch.float64)
    found = problems._solution(0.7, w)
    weights = 0.7 * np.where(signs > 0, 2, 1)
    slack = np.maximum(0, 1 - signs * found.scores.numpy())
    primal = (w**2).sum(0).numpy() / 2 + (weights * slack**2).sum(0)
    alpha = 2 * weights * slack
    dual_w = np.concatenate([rows, np.ones((len(rows), 1))], axis=1).T @ (alpha * signs)
    dual = alpha.sum(0) - (dual_w**2).sum(0) / 2 - (alpha**2 / (4 * weights)).sum(0)
    np.testing.assert_allclose(found.gap, (primal - dual) / primal, rtol=1e-8)


@pytest.mark.parametrize("way", ["factored", "conjugate gradients"])
def test_both_ways_to_a_newton_step_reach_the_solution(way, monkeypatch):
    def step(self, state, iterations, tolerance):
        if way == "conjugate gradients":
            return self._conjugate_gradients(state, tolerance)
        columns = range(state.w.shape[1])
        active = state.curvature > 0
        steps = [self._factored_step(state, c, active[:, c].nonzero().flatten()) for c in columns]
        return torch.stack(steps, dim=1), iterations

    monkeypatch.setattr(_svm.Problems, "_newton_step", step)
    test_the_solver_equals_liblinear("wide")


def hard(duplicates):
    """Return nearly parallel images `(120, D)` of decaying spectrum, with labels at random, 20 % positive."""
    random = np.random.default_rng(0)
    width = 40 if duplicates else 120
    latent = 0.05 * random.normal(size=(120, width)) * np.exp(-5 * np.arange(width) / width)
    rows = np.maximum(1 + latent @ random.normal(size=(width, width)), 0)
    if duplicates:
        rows[-20:] = rows[:20]
    return unit(rows), np.where(random.random((120, 8)) < 0.2, 1, -1)


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize(("cost", "tolerance"), [(100.0, 1e-8), (100.0, 1e-10), (1e4, 1e-8), (1e5, 1e-8)])
def test_hard_features_converge_with_room_to_spare(duplicates, cost, tolerance, monkeypatch):
    """Steps whose rounding errors do not shrink with the gradient stall before these tolerances."""
    rows, signs = hard(duplicates)
    images = torch.from_numpy(rows)
    monkeypatch.setattr(_svm, "TOLERANCE", tolerance)
    monkeypatch.setattr(_svm, "MAX_STEPS", 30)
    (found,) = _svm.Problems(_svm.gram(images, images), signs).path([cost])
    assert found.gap.max() < (1e-16 if cost < 1e5 else 1e-13)
    if cost == 100:
        expected = fit(cost, rows, signs[:, 0])
        np.testing.assert_allclose(found.scores[:, 0], expected.decision_function(rows), rtol=0, atol=1e-6)


def test_the_step_length_is_the_minimum_along_the_line():
    """Against bisection of the slope, from a point with active and inactive images, for steps of any size."""
    rows, signs = hard(duplicates=False)
    images = torch.from_numpy(rows)
    problems = _svm.Problems(_svm.gram(images, images), signs)
    random = np.random.default_rng(1)
    w = torch.from_numpy(random.normal(size=(problems.basis.shape[1], 8)))
    state = problems._state(100.0, w, torch.arange(8))
    step = -state.gradient * torch.logspace(-9, 3, 8, dtype=torch.float64) / state.gradient.norm(dim=0)
    found = _svm._step_length(state, step, problems.basis @ step)

    def slope(length):
        return (problems._state(100.0, w + length * step, torch.arange(8)).gradient * step).sum(0)

    low, high = torch.zeros(8, dtype=torch.float64), torch.full((8,), 1e12, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = torch.where(slope(middle) < 0, middle, low), torch.where(slope(middle) < 0, high, middle)
    np.testing.assert_allclose(found, low, rtol=1e-5)


def test_features_are_scaled_to_almost_unit_length():
    found = _svm.scaled(np.array([[3, 4], [0, 0], [3e-5, 4e-5]], dtype=np.float32))
    np.testing.assert_allclose(found, [[3 / 5.00001, 4 / 5.00001], [0, 0], [0.5, 2 / 3]], rtol=1e-6)


def test_images_left_out_do_not_count_and_are_scored():
    rows, signs = problem("tall")
    images = torch.from_numpy(rows)
    signs[::4] = 0
    (found,) = _svm.Problems(_svm.gram(images, images), signs).path([1.0])
    for column in range(3):
        kept = signs[:, column] != 0
        expected = fit(1.0, rows[kept], signs[kept, column]).decision_function(rows)
        np.testing.assert_allclose(found.scores[:, column], expected, atol=1e-7)


def test_a_problem_that_does_not_converge_is_an_error(monkeypatch):
    rows, signs = problem("tall")
    images = torch.from_numpy(rows)
    monkeypatch.setattr(_svm, "MAX_STEPS", 2)
    with pytest.raises(ArithmeticError, match="3 of 3 problems did not converge at cost 10 in 2 steps"):
        list(_svm.Problems(_svm.gram(images, images), signs).path([10.0]))


def voc(seed, images, dims, signal=1.0, classes=3):
    """Return features with labels 1, 0 and −1 whose layers carry more or less of the labels."""
    random = np.random.default_rng(seed)
    labels = (random.random((images, classes)) < 0.3).astype(np.int8)
    labels[random.random(labels.shape) < 0.1] = -1
    mixing = np.random.default_rng(99).normal(size=(classes, dims))
    layers = {
        layer: (signal * number * (labels == 1) @ mixing + 4 * random.normal(size=(images, dims)) + 1)
        for number, layer in enumerate(LAYERS)
    }
    return Features({name: rows.astype(np.float32) for name, rows in layers.items()}, labels)


def published(train, test, layer, costs):
    """The published script, with scikit-learn: chosen cost and test AP of every class."""
    rows = [unit(f.layers[layer].astype(np.float64)) for f in (train, test)]
    chosen, precisions = [], []
    for column in range(train.labels.shape[1]):
        targets = np.where(train.labels[:, column] == 1, 1, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            validated = [
                cross_val_score(liblinear(c), rows[0], targets, cv=3, scoring="average_precision").mean()
                for c in costs
            ]
        chosen.append(costs[int(np.argmax(validated))])
        scores = fit(chosen[-1], rows[0], targets).decision_function(rows[1])
        kept = test.labels[:, column] != -1
        precisions.append(100 * average_precision(scores[kept], test.labels[kept, column] == 1))
    return chosen, precisions


def test_equals_the_published_script():
    train, test = voc(1, 60, 12), voc(2, 40, 12)
    costs = [1.0, 10.0, 0.0625, 0.00390625, 1.9073486328125e-06]
    found = evaluate(train, test, Config(costs=costs))
    means = {}
    for layer in LAYERS:
        chosen, precisions = published(train, test, layer, costs)
        assert found.details[layer]["cost"] == chosen
        assert found.details[layer]["average_precision"] == pytest.approx(precisions, abs=1e-9)
        assert found.details[layer]["worst_relative_duality_gap"] < 1e-14
        means[layer] = np.mean(precisions)
        assert found[layer] == pytest.approx(means[layer], abs=1e-9)
    best = max(means, key=means.get)
    assert found["svm"] == pytest.approx(means[best])
    assert f"feature{found['best_layer']:.0f}" == best
    assert set(found) == {"svm", "best_layer", *LAYERS}


def test_the_first_of_equal_costs_wins():
    """Features that separate the classes: every cost has a validation AP of 1."""
    labels = np.tile(np.eye(3, dtype=np.int8), (10, 1))
    perfect = Features({"feature5": labels.astype(np.float32)}, labels)
    for costs in ([1.0, 10.0], [10.0, 1.0]):
        found = evaluate(perfect, perfect, Config(layers=["feature5"], costs=costs))
        assert found.details["feature5"]["cost"] == [costs[0]] * 3
        assert found["svm"] == found["feature5"] == 100
        assert found["best_layer"] == 5


def test_difficult_images_are_negatives_in_training_and_removed_in_testing():
    train, test = voc(3, 60, 12), voc(4, 40, 12)
    config = Config(layers=["feature5"], costs=[1.0])
    found = evaluate(train, test, config)
    as_negatives = Features(train.layers, np.maximum(train.labels, 0))
    assert evaluate(as_negatives, test, config) == found
    as_absent = Features(test.layers, np.maximum(test.labels, 0))
    assert evaluate(train, as_absent, config) != found


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_those_of_scikit_learn(folds):
    random = np.random.default_rng(folds)
    for images in range(20, 40):
        positive = random.random((images, 3)) < [0.35, 0.5, 0.6]
        positive[: 2 * folds] = (np.arange(2 * folds) % 2 == 0)[:, None]
        held_out = stratified_folds(np.where(positive, 1, -random.integers(0, 2, positive.shape)), folds)
        for column, found in zip(positive.T, held_out.T, strict=True):
            for fold, (_, out) in enumerate(StratifiedKFold(folds).split(column, column)):
                np.testing.assert_array_equal(np.flatnonzero(found == fold), out)


def test_folds_are_those_of_the_published_script():
    labels = voc(5, 50, 4).labels
    held_out = stratified_folds(labels, 3)
    rows = np.random.default_rng(0).normal(size=(50, 4))
    for column in range(3):
        targets = np.where(labels[:, column] == 1, 1, -1)
        expected = cross_val_score(liblinear(1), rows, targets, cv=3, scoring="average_precision")
        for fold in range(3):
            out = held_out[:, column] == fold
            scores = fit(1, rows[~out], targets[~out]).decision_function(rows[out])
            assert average_precision_score(targets[out], scores) == pytest.approx(expected[fold])


def test_the_published_protocol_is_the_default():
    assert len(COSTS) == 19
    assert COSTS[:4] == [1, 10, 100, 0.0625]
    assert COSTS[-1] == pytest.approx(1.9073486e-6)
    assert Config().layers == LAYERS
    assert Config().folds == 3
    assert list(voc07_svm.COLUMNS) == ["best_layer", "svm"]


def test_bad_input_is_refused():
    train, test = voc(1, 60, 12), voc(2, 40, 12)
    config = Config(layers=["feature5"], costs=[1.0])

    def relabelled(features, column, labels):
        changed = features.labels.copy()
        changed[:, column] = labels
        return Features(features.layers, changed)

    two_positives = relabelled(train, 1, np.arange(60) < 2)
    with pytest.raises(BadInput, match=r"class 1: 3 folds need at least 3 positive .* found 2 and 58"):
        evaluate(two_positives, test, config)
    with pytest.raises(BadInput, match=r"class 0: 3 folds need .* found 60 and 0"):
        evaluate(relabelled(train, 0, 1), test, config)
    with pytest.raises(BadInput, match=r"class 2: the test split needs positives .* found 0 positive and 40"):
        evaluate(train, relabelled(test, 2, 0), config)
    with pytest.raises(BadInput, match="train features have no feature5, only feature1"):
        evaluate(Features({"feature1": np.ones((60, 2))}, train.labels), test, config)
    with pytest.raises(BadInput, match="feature5: train features are 12 wide, test features 13"):
        evaluate(train, voc(2, 40, 13), config)
    with pytest.raises(BadInput, match="train labels have 3 classes, test labels 4"):
        evaluate(train, voc(2, 40, 12, classes=4), config)
    with pytest.raises(BadInput, match="train labels: expected one column per class"):
        evaluate(Features(train.layers, np.zeros(60)), test, config)
    rows = train.layers["feature5"].copy()
    rows[7, 3] = np.nan
    with pytest.raises(BadInput, match="feature5: row 7 holds NaN"):
        Features({"feature5": rows}, train.labels)
    with pytest.raises(BadInput, match="feature5: expected one row for each of 59 labels"):
        Features({"feature5": train.layers["feature5"]}, train.labels[:59])
    with pytest.raises(BadInput, match="row 2 of the features holds NaN"):
        _svm.eigenbasis(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, torch.nan, 1]]))
