"""The VOC SVM against the published script, with scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from test__svm import COSTS, fit, liblinear, unit

from simclr import BadInput
from simclr.benchmarks import voc07_svm
from simclr.benchmarks.voc07_svm import Config, evaluate, stratified_folds
from simclr.features import Features
from simclr.metrics import average_precision

LAYERS = ["feature1", "feature2", "feature3", "feature4", "feature5"]


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


@pytest.mark.parametrize("on", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_equals_the_published_script(on):
    train, test = voc(1, 60, 12), voc(2, 40, 12)
    costs = [1.0, 10.0, 0.0625, 0.00390625, 1.9073486328125e-06]
    found = evaluate(train, test, Config(costs=costs))
    means = {}
    for layer in LAYERS:
        chosen, precisions = published(train, test, layer, costs)
        assert found.details[layer]["cost"] == chosen
        assert found.details[layer]["average_precision"] == pytest.approx(precisions, abs=1e-9)
        certificate = found.details[layer]["certificate"]
        assert certificate["worst_relative_duality_gap"] <= certificate["tolerance"] == 1e-12
        assert certificate["problems"] == 5 * 3 * 4  # costs × classes × (folds + 1)
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


def test_costs_that_rounding_does_not_allow_are_refused():
    assert Config(costs=[1e3]).costs == [1e3]
    for cost in (1.1e3, 0, -1, np.inf):
        with pytest.raises(ValueError, match="costs"):
            Config(costs=[cost])


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
    with pytest.raises(BadInput, match=r"class 0: 3 folds need .* found 0 and 60"):
        evaluate(relabelled(train, 0, -1), test, config)
    with pytest.raises(BadInput, match=r"class 2: the test split needs .* found 0 positive and 0 negative"):
        evaluate(train, relabelled(test, 2, -1), config)
