"""Nearest neighbours against a loop over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simclr import BadInput
from simclr.benchmarks import imagenet_knn
from simclr.benchmarks.imagenet_knn import Config, evaluate, nearest
from simclr.features import Features


def features(rows, labels):
    return Features({"avgpool": np.asarray(rows, dtype=np.float32)}, np.asarray(labels))


def slow(train, test, k, top, temperature):
    """Accuracy in percent, image by image, from the definition."""
    bank = [row / np.linalg.norm(row) for row in train.layers["avgpool"].astype(np.float64)]
    right = 0
    for row, label in zip(test.layers["avgpool"].astype(np.float64), test.labels, strict=True):
        similarity = [float(one @ row / np.linalg.norm(row)) for one in bank]
        ranked = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = {c: 0.0 for c in range(int(max(train.labels)) + 1)}
        for i in ranked:
            votes[int(train.labels[i])] += math.exp(similarity[i] / temperature)
        classes = sorted(votes, key=lambda c: (-votes[c], c))[:top]
        right += int(label) in classes
    return 100 * right / len(test.labels)


def gaussian(seed, train=60, test=25, dim=6, classes=7):
    random = np.random.default_rng(seed)
    bank = features(random.normal(size=(train, dim)), np.arange(train) % classes)
    return bank, features(random.normal(size=(test, dim)), random.integers(0, classes, size=test))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_loop_over_all_pairs(seed, temperature):
    train, test = gaussian(seed)
    found = evaluate(train, test, Config(neighbours=[1, 5, 20, 60], temperature=temperature))
    assert list(found) == [f"k{k}{top}" for k in (1, 5, 20, 60) for top in ("", "_top5")]
    for k in (1, 5, 20, 60):
        assert found[f"k{k}"] == pytest.approx(slow(train, test, k, 1, temperature))
        assert found[f"k{k}_top5"] == pytest.approx(slow(train, test, k, 5, temperature))


def test_ties_go_to_the_lower_index_and_the_lower_class():
    # Images 1, 2 and 4 are equally similar; two neighbours: 1 and 2, of classes 3 and 2, equal votes: 2.
    train = features([[0, 1], [1, 0], [2, 0], [-1, 0], [3, 0]], [0, 3, 2, 1, 2])
    test = features([[1, 0]] * 2, [2, 3])
    similarity, index = next(nearest(train.layers["avgpool"], test.layers["avgpool"], 2))
    assert index.tolist() == [[1, 2]] * 2
    assert similarity.tolist() == [[1, 1]] * 2
    assert evaluate(train, test, Config(neighbours=[2]))["k2"] == 50
    assert evaluate(train, test, Config(neighbours=[1]))["k1"] == 50


@pytest.mark.parametrize("blocks", [(1, 1, 1), (7, 4, 8), (16, 25, 25), (64, 3, 4096)])
def test_equal_images_tie_whatever_the_blocks(blocks):
    random = np.random.default_rng(3)
    distinct = random.normal(size=(10, 33)).astype(np.float32)
    train, test = np.tile(distinct, (5, 1)), random.normal(size=(25, 33)).astype(np.float32)
    names = ("train_rows", "test_rows", "test_rows_held")
    found = np.concatenate([i for _, i in nearest(train, test, 12, **dict(zip(names, blocks, strict=True)))])
    ranked = np.argsort(-(test @ (distinct / np.linalg.norm(distinct, axis=1, keepdims=True)).T), axis=1)
    copies = np.arange(0, 50, 10)
    expected = np.concatenate([ranked[:, [i]] + copies for i in range(3)], axis=1)[:, :12]
    np.testing.assert_array_equal(found, expected)


def test_one_test_image_and_a_padded_bank_of_negative_similarities():
    train = features([[-1, 0.1], [-1, 0.2], [-1, 0.3]], [0, 1, 2])
    test = features([[1, 0]], [2])
    assert evaluate(train, test, Config(neighbours=[1]))["k1"] == 100  # no padding row (0) is a neighbour
    assert evaluate(train, test, Config(neighbours=[3]))["k3_top5"] == 100


def test_half_precision_features_are_compared_in_single(monkeypatch):
    train, test = gaussian(1)
    halves = [Features({"avgpool": f.layers["avgpool"].astype(np.float16)}, f.labels) for f in (train, test)]
    assert evaluate(*halves, Config(neighbours=[5]))["k5"] == pytest.approx(slow(*halves, 5, 1, 0.07))


def test_the_published_protocol_is_the_default():
    assert Config().neighbours == [10, 20, 100, 200]
    assert Config().temperature == 0.07
    assert list(imagenet_knn.COLUMNS) == [f"k{k}" for k in Config().neighbours]


def test_bad_input_is_refused():
    train, test = gaussian(0)
    with pytest.raises(BadInput, match="k = 61 neighbours are more than the 60 training images"):
        evaluate(train, test, Config(neighbours=[5, 61]))
    with pytest.raises(BadInput, match="test label 9 is not a label of any training image"):
        evaluate(train, features(test.layers["avgpool"], [9] * 25), Config(neighbours=[5]))
    with pytest.raises(BadInput, match="train features are 6 wide, test features 4"):
        evaluate(train, features(np.ones((2, 4)), [0, 1]), Config(neighbours=[5]))
    with pytest.raises(BadInput, match="test features have no avgpool, only feature5"):
        evaluate(train, Features({"feature5": np.ones((2, 6))}, np.array([0, 1])), Config(neighbours=[5]))
    with pytest.raises(BadInput, match="expected one class per image"):
        evaluate(train, features(np.ones((2, 6)), np.ones((2, 3))), Config(neighbours=[5]))
    with pytest.raises(BadInput, match="avgpool: row 1 holds NaN"):
        features([[1, 2], [np.nan, 1]], [0, 1])
    with pytest.raises(BadInput, match="expected one row for each of 3 labels"):
        features([[1, 2], [3, 1]], [0, 1, 2])
