"""Low-shot SVMs against the published scripts, written with scikit-learn."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from test_voc07_svm import COSTS, LAYERS, fit, unit, voc

from simclr import BadInput
from simclr.benchmarks import voc07_lowshot, voc07_svm
from simclr.benchmarks.voc07_lowshot import Config, draw, evaluate
from simclr.features import Features
from simclr.metrics import average_precision
from simclr.results import DatasetStamp, Record

SMALL = {"shots": [1, 4], "negatives": 2, "samples": 3, "costs": [1.0, 0.0625, 10.0], "layer": "feature5"}


def published(train, test, config):
    """mAP `(costs, K, samples)` on test and on the undrawn images, problem by problem."""
    rows = [unit(f.layers[config.layer].astype(np.float64)) for f in (train, test)]
    found = np.zeros((2, len(config.costs), len(config.shots), config.samples))
    for cost, k, sample in np.ndindex(found.shape[1:]):
        signs = draw(train.labels, config.shots[k], sample, config)
        for index, column in enumerate(signs.T):
            svm = fit(config.costs[cost], rows[0][column != 0], column[column != 0])
            splits = ((test, rows[1], True), (train, rows[0], column == 0))
            for split, (features, images, wanted) in enumerate(splits):
                kept = (features.labels[:, index] >= 0) & wanted
                scores = svm.decision_function(images[kept])
                found[split, cost, k, sample] += average_precision(scores, features.labels[kept, index] == 1)
    return 100 * found / train.labels.shape[1]


def test_equals_the_published_scripts():
    train, test, config = voc(1, 60, 12), voc(2, 40, 12), Config(**SMALL)
    found = evaluate(train, test, config)
    tested, undrawn = published(train, test, config)
    assert set(found) == {"k1", "k4", "k1_held_out", "k4_held_out"}
    for row, key in enumerate(("k1", "k4")):
        best = tested[:, row].mean(axis=1).argmax()
        assert found[key] == pytest.approx(tested[best, row].mean())
        assert found.spread[key] == pytest.approx(np.sqrt(np.mean((tested[best, row] - found[key]) ** 2)))
        assert found.trials[key] == 3
        assert found.details[key]["cost"] == config.costs[best]
        assert found.details[key]["map_of_each_draw"] == pytest.approx(tested[best, row])
        honest = undrawn[:, row].mean(axis=1).argmax()
        assert found[f"{key}_held_out"] == pytest.approx(tested[honest, row].mean())
        assert found[f"{key}_held_out"] <= found[key]
    assert found.details["worst_relative_duality_gap"] < 1e-14


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


def test_held_out_is_left_out_where_every_positive_is_drawn():
    train, test = voc(1, 60, 12, classes=1), voc(2, 40, 12, classes=1)
    every = int((train.labels == 1).sum())
    found = evaluate(train, test, Config(**{**SMALL, "shots": [2, every], "negatives": 1}))
    assert set(found) == {"k2", "k2_held_out", f"k{every}"}


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
    empty = test.labels.copy()
    empty[:, 1] = 0
    with pytest.raises(BadInput, match="class 1: the test split needs positives"):
        evaluate(train, Features(test.layers, empty), Config(**SMALL))
