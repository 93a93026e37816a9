"""Low-shot SVMs against the published scripts, written with scikit-learn."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from sklearn.model_selection import cross_val_score
from test__svm import COSTS, fit, liblinear, unit
from test_voc07_svm import LAYERS, voc

from simclr import BadInput
from simclr.benchmarks import _svm, voc07_lowshot, voc07_svm
from simclr.benchmarks.voc07_lowshot import Config, draw, evaluate
from simclr.features import Features
from simclr.metrics import average_precision
from simclr.results import DatasetStamp, Record

SMALL = {"shots": [1, 2, 4], "negatives": 2, "samples": 3, "costs": [1.0, 0.0625, 10.0], "layer": "feature5"}


def published(train, test, config):
    """mAP `(costs, K, samples)` on test, and in cross-validation within the draw, problem by problem."""
    rows = [unit(f.layers[config.layer].astype(np.float64)) for f in (train, test)]
    tested, validated = np.zeros((2, len(config.costs), len(config.shots), config.samples))
    for cost, k, sample in np.ndindex(tested.shape):
        signs = draw(train.labels, config.shots[k], sample, config)
        folds = min(config.folds, config.shots[k])
        for column, labels in zip(signs.T, test.labels.T, strict=True):
            images, targets = rows[0][column != 0], column[column != 0]
            scores = fit(config.costs[cost], images, targets).decision_function(rows[1][labels >= 0])
            tested[cost, k, sample] += average_precision(scores, labels[labels >= 0] == 1)
            if folds > 1:
                svm = liblinear(config.costs[cost])
                of_folds = cross_val_score(svm, images, targets, cv=folds, scoring="average_precision")
                validated[cost, k, sample] += of_folds.mean()
    return 100 * tested / train.labels.shape[1], validated / train.labels.shape[1]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("on", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_equals_the_published_scripts(on):
    train, test, config = voc(1, 60, 12), voc(2, 40, 12), Config(**SMALL)
    found = evaluate(train, test, config)
    tested, validated = published(train, test, config)
    assert set(found) == {f"k{k}{kind}" for k in config.shots for kind in ("", "_cross_validated")}
    for row, k in enumerate(config.shots):
        best = tested[:, row].mean(axis=1).argmax()
        check(found, f"k{k}", [best] * 3, tested[:, row], config)
        own = validated[:, max(row, 1)].argmax(axis=0)  # k = 1 takes the cost of k = 2
        check(found, f"k{k}_cross_validated", own, tested[:, row], config)
    certificate = found.details["certificate"]
    assert certificate["worst_relative_duality_gap"] <= certificate["tolerance"] == 1e-12
    assert certificate["problems"] == 3 * 3 * 3 * (1 + 3 + 4)  # costs × classes × samples × (1 + folds) of k
    assert "optimistic" in found.details["choice_of_cost"]["k"]


def check(found, key, chosen, tested, config):
    maps = tested[chosen, range(config.samples)]
    assert found[key] == pytest.approx(maps.mean())
    assert found.spread[key] == pytest.approx(np.sqrt(np.mean((maps - maps.mean()) ** 2)))
    assert found.trials[key] == 3
    assert found.details[key]["cost"] == [config.costs[at] for at in chosen]
    assert found.details[key]["map_of_each_draw"] == pytest.approx(maps)


def test_the_test_set_has_no_part_in_the_cross_validation():
    train, config = voc(1, 60, 12), Config(**SMALL)
    found = [evaluate(train, voc(seed, 40, 12), config).details for seed in (2, 3)]
    for key in ("k1_cross_validated", "k2_cross_validated", "k4_cross_validated"):
        assert found[0][key]["cost"] == found[1][key]["cost"]


def test_without_a_larger_k_there_is_no_cross_validation_at_one():
    train, test = voc(1, 60, 12), voc(2, 40, 12)
    assert set(evaluate(train, test, Config(**{**SMALL, "shots": [1]}))) == {"k1"}
    assert "k1_cross_validated" in evaluate(train, test, Config(**{**SMALL, "shots": [2, 1]}))


def test_the_result_does_not_depend_on_how_many_draws_are_solved_together(monkeypatch):
    train, test, config = voc(1, 60, 12), voc(2, 40, 12), Config(**SMALL)
    together = evaluate(train, test, config)
    monkeypatch.setattr(_svm, "BLOCK", 1)
    singly = evaluate(train, test, config)
    assert singly == pytest.approx(together)
    for key in together:
        assert singly.details[key]["cost"] == together.details[key]["cost"]
        maps = together.details[key]["map_of_each_draw"]
        assert singly.details[key]["map_of_each_draw"] == pytest.approx(maps)


def test_a_draw_takes_k_positives_and_the_negatives_without_difficult_images():
    labels = voc(1, 60, 12).labels
    config = Config(**SMALL)
    for k in (1, 4, 8):
        signs = draw(labels, k, 0, config)
        assert ((signs == 1).sum(axis=0) == k).all()
        assert ((signs == -1).sum(axis=0) == 2 * k).all()
        assert (labels[signs == 1] == 1).all()
        assert (labels[signs == -1] == 0).all()


def test_draws_follow_the_seed_and_differ_by_sample_class_and_k():
    labels = np.tile([[1, 1], [0, 0]], (50, 1)).astype(np.int8)

    def one(k=4, sample=0, seed=0):
        return draw(labels, k, sample, Config(**SMALL, seed=seed))

    assert (one() == one()).all()
    assert (one() != one(sample=1)).any()
    assert (one() != one(seed=1)).any()
    assert (one()[:, 0] != one()[:, 1]).any()
    longer = draw(labels, 4, 0, Config(**{**SMALL, "shots": [1, 2, 4, 8]}))
    assert (one() == longer).all()  # another list of k leaves the draws of a k as they are


def test_draws_are_uniform():
    labels = np.tile([[1], [0]], (5, 1)).astype(np.int8)
    drawn = sum(draw(labels, 1, sample, Config(**SMALL)) == 1 for sample in range(2000))[::2, 0]
    np.testing.assert_allclose(drawn, 400, atol=5 * np.sqrt(2000 * 0.2 * 0.8))


def test_the_record_holds_a_hash_of_every_draw():
    train, test, config = voc(1, 60, 12), voc(2, 40, 12), Config(**SMALL)
    hashes = evaluate(train, test, config).details["draws_sha256"]
    for k in config.shots:
        drawn = [draw(train.labels, k, sample, config) for sample in range(config.samples)]
        assert hashes[f"k{k}"] == [hashlib.sha256(signs.tobytes()).hexdigest() for signs in drawn]


def record(**changes):
    return Record(
        **{
            "benchmark": "voc07_svm",
            "protocol_version": 1,
            "model": "m",
            "metrics": {"best_layer": 2, "svm": 50},
            "config": {},
            "checkpoint_sha256": "0" * 64,
            "dataset": DatasetStamp(name="voc2007", manifest_sha256="0" * 64),
            "software": {},
            "hardware": {},
            "seconds": 1,
        }
        | changes
    )


def test_the_layer_is_the_best_of_the_svm_record_or_of_the_svm_itself():
    train, test = voc(1, 60, 12), voc(2, 40, 12)
    config = Config(**{**SMALL, "layer": "best"})
    assert evaluate(train, test, config, svm=record()).details["layer"] == "feature2"
    best = voc07_svm.evaluate(train, test, voc07_svm.Config(costs=SMALL["costs"]))["best_layer"]
    assert evaluate(train, test, config).details["layer"] == f"feature{best:.0f}"
    named = evaluate(train, test, Config(**{**SMALL, "layer": "feature3"}), svm=record())
    assert named.details["layer"] == "feature3"
    with pytest.raises(BadInput, match="--svm: expected the record of voc07_svm, found that of imagenet_knn"):
        evaluate(train, test, config, svm=record(benchmark="imagenet_knn"))


def test_the_published_protocol_is_the_default():
    config = Config()
    assert config.shots == [1, 2, 4, 8, 16, 32, 64, 96]
    assert (config.negatives, config.samples, config.layer) == (19, 5, "best")
    assert (config.costs, config.layers) == (COSTS, LAYERS)
    assert list(voc07_lowshot.COLUMNS) == [f"k{k}" for k in config.shots]


def test_bad_input_is_refused():
    train, test = voc(1, 60, 12), voc(2, 40, 12)
    positives = int((train.labels[:, 0] == 1).sum())
    with pytest.raises(
        BadInput, match=rf"class 0: k = 59 needs 59 positive training images; found {positives}"
    ):
        evaluate(train, test, Config(**{**SMALL, "shots": [59]}))
    with pytest.raises(BadInput, match=r"class 0: k = 2 needs 60 negative training images; found \d+"):
        evaluate(train, test, Config(**{**SMALL, "shots": [2], "negatives": 30}))
    with pytest.raises(BadInput, match="train features have no feature5"):
        evaluate(Features({"feature1": np.ones((60, 2))}, train.labels), test, Config(**SMALL))
    difficult = train.labels.copy()
    difficult[:, 2] = -1
    with pytest.raises(BadInput, match=r"class 2: k = 1 needs 1 positive training images; found 0"):
        evaluate(Features(train.layers, difficult), test, Config(**SMALL))
    empty = test.labels.copy()
    empty[:, 1] = 0
    with pytest.raises(BadInput, match="class 1: the test split needs positives"):
        evaluate(train, Features(test.layers, empty), Config(**SMALL))
