"""Nearest neighbours against a loop over all pairs."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from simclr import BadInput
from simclr.benchmarks import imagenet_knn
from simclr.benchmarks.imagenet_knn import (
    TEST_ROWS,
    TRAIN_ROWS,
    Config,
    Tiling,
    classify,
    evaluate,
    footprint,
    nearest,
    tiling,
)
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
    similarity, index = joined(nearest(train.layers["avgpool"], test.layers["avgpool"], 2))
    assert index.tolist() == [[1, 2]] * 2
    assert similarity.tolist() == [[1, 1]] * 2
    assert evaluate(train, test, Config(neighbours=[2]))["k2"] == 50
    assert evaluate(train, test, Config(neighbours=[1]))["k1"] == 50


def sorted_in_full(train, test, k):
    """Similarity and index of the k nearest: every pair, then one sort by similarity and index."""
    bank = train / np.linalg.norm(train, axis=1, keepdims=True)
    similarity = (test / np.linalg.norm(test, axis=1, keepdims=True)) @ bank.T
    index = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, index, axis=1), index


def joined(found):
    similarity, index = zip(*found, strict=True)
    return np.concatenate(similarity), np.concatenate(index)


@pytest.mark.parametrize("tiles", [(4, 1, 1), (8, 4, 8), (28, 25, 25), (52, 3, 7), (1000, 40, 40)])
@pytest.mark.parametrize("k", [1, 12, 50])
def test_equal_images_tie_whatever_the_tiles(monkeypatch, tiles, k):
    monkeypatch.setattr(imagenet_knn, "GROUP", 4)
    random = np.random.default_rng(3)
    distinct = random.normal(size=(10, 33)).astype(np.float32)
    train, test = np.tile(distinct, (5, 1)), random.normal(size=(25, 33)).astype(np.float32)
    _, found = joined(nearest(train, test, k, Tiling(*tiles)))
    ranked = np.argsort(-(test @ (distinct / np.linalg.norm(distinct, axis=1, keepdims=True)).T), axis=1)
    copies = np.arange(0, 50, 10)
    expected = np.concatenate([ranked[:, [i]] + copies for i in range(10)], axis=1)[:, :k]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("order", ["shuffled", "near last", "by class"])
@pytest.mark.parametrize("tiles", [(128, 16, 16), (640, 7, 23), (2048, 40, 40)])
def test_few_groups_of_many_images_are_looked_at(tiles, order):
    """Similarities are exact, multiples of 1/8, with many ties; a block may hold no or only near images."""
    random = np.random.default_rng(0)
    train = 1.0 - 2.0 * random.integers(2, size=(2000, 16))
    test = 1.0 - 2.0 * random.integers(2, size=(40, 16))
    if order == "near last":
        train = train[np.argsort(train @ test[0], kind="stable")]
    elif order == "by class":
        train = train[np.lexsort(train.T)]
    found = joined(nearest(train.astype(np.float16), test.astype(np.float16), 30, Tiling(*tiles)))
    similarity, index = sorted_in_full(train, test, 30)
    np.testing.assert_array_equal(found[1], index)
    np.testing.assert_array_equal(found[0], similarity)


def test_equal_images_have_equal_similarities_at_full_width():
    """The columns at the edge of a product are computed like all others."""
    random = np.random.default_rng(0)
    one, test = random.random((1, 2048), np.float32), random.random((3, 2048), np.float32)
    train = np.tile(one, (1000, 1))
    similarity, index = joined(nearest(train, test, 1000, Tiling(352, 2, 3)))
    assert (index == np.arange(1000)).all()
    assert (similarity == similarity[:, :1]).all()


def test_the_footprint_is_within_the_memory():
    """The sizes of ImageNet, and sizes that fit in no other way than in parts."""
    for sizes in [(1_281_167, 50_000, 2048, 200), (1_281_167, 10**7, 2048, 200), (10**7, 50_000, 9216, 1000)]:
        tiles = tiling(*sizes)
        assert footprint(tiles, *sizes[2:]) <= imagenet_knn.MEMORY <= 8e9
        assert tiles.train_rows <= TRAIN_ROWS
        assert tiles.test_rows <= TEST_ROWS
    assert tiling(1_281_167, 50_000, 2048, 200).held_rows == 50_000  # the training set is read once
    for memory in (10**7, 10**8, 10**9):
        assert footprint(tiling(10**6, 10**6, 512, 100, memory), 512, 100) <= memory


# `start` begins to measure the most memory that the program has, files that are mapped included. (ru_maxrss
# begins with that of the program that started this one, and would see nothing below it.)
MEASURE = """
def memory(kind):
    with open("/proc/self/status") as status:
        return 1024 * int(status.read().split(kind)[1].split()[0])

def start():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory("VmRSS:")
"""


def peak_memory_of(script, *arguments):
    """Return the bytes that `script`, run in a process of its own, prints."""
    command = [sys.executable, "-c", MEASURE + script, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_search_takes_the_memory_of_its_footprint():
    """All similarities at once would take 800 MB."""
    script = """
import numpy as np, torch
from simclr.benchmarks.imagenet_knn import nearest, tiling
torch.set_num_threads(1)
random = np.random.default_rng(0)
train, test = (random.standard_normal((n, 16), np.float32).astype(np.float16) for n in (50_000, 4_000))
next(nearest(train[:64], test[:64], 8))
before = start()
for _ in nearest(train, test, 50, tiling(50_000, 4_000, 16, 50, 50_000_000)):
    pass
print(memory("VmHWM:") - before)
"""
    most = footprint(tiling(50_000, 4_000, 16, 50, 50_000_000), 16, 50)
    assert 4_000_000 <= peak_memory_of(script) <= most <= 20_000_000


def test_files_that_are_mapped_do_not_become_memory(tmp_path):
    """Features of 102 MB, opened and searched within less than half of that."""
    np.save(tmp_path / "avgpool.npy", np.ones((100_000, 512), np.float16))
    np.save(tmp_path / "labels.npy", np.zeros(100_000, np.int8))
    (tmp_path / "manifest.json").write_text(json.dumps({"dims": {"avgpool": 512}, "finished": True}))
    script = """
import sys, torch
from simclr.benchmarks.imagenet_knn import nearest, tiling
from simclr.features import Features
torch.set_num_threads(1)
next(nearest(torch.ones(64, 512), torch.ones(64, 512), 8))
before = start()
train = Features.open(sys.argv[1]).layers["avgpool"]
next(nearest(train, train[:100], 50, tiling(100_000, 100, 512, 50, 10_000_000)))
print(memory("VmHWM:") - before)
"""
    assert peak_memory_of(script, str(tmp_path)) <= 40_000_000


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 99, 2049])
def test_any_number_of_test_images(rows):
    random = np.random.default_rng(rows)
    train, test = random.normal(size=(100, 5)), random.normal(size=(rows, 5))
    similarity, index = joined(nearest(train.astype(np.float32), test.astype(np.float32), 100))
    expected = sorted_in_full(train, test, 100)
    assert index.shape == (rows, 100)
    np.testing.assert_allclose(similarity, expected[0], atol=1e-6)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(100), (rows, 1)))


@pytest.mark.parametrize(("k", "expected"), [(1, [[1], [0]]), (3, [[0, 1, 2], [0, 2, 3]])])
def test_the_first_of_equal_values_are_taken(k, expected):
    values = torch.tensor([[2.0, 3, 2, 2, 1], [5, 4, 5, 5, 5]])
    highest, columns = imagenet_knn.first_highest(values, k)
    assert columns.tolist() == expected
    assert highest.tolist() == [[values[row, c].item() for c in each] for row, each in enumerate(expected)]


# ---------------------------------------------------------------- votes


@pytest.mark.parametrize("k", [1, 7, 60])
def test_classify_is_the_vote_of_the_loop(k):
    train, test = gaussian(2)
    bank, queries = (torch.tensor(split.layers["avgpool"], requires_grad=True) for split in (train, test))
    predicted = classify(bank, torch.from_numpy(train.labels), queries, k)
    assert predicted.dtype == torch.int64
    assert 100 * (predicted.numpy() == test.labels).mean() == pytest.approx(slow(train, test, k, 1, 0.07))


def test_classify_needs_as_many_training_images_as_neighbours():
    with pytest.raises(BadInput, match="expected 1 to 3 neighbours, as many as training images; found 4"):
        classify(torch.ones(3, 2), torch.arange(3), torch.ones(1, 2), 4)


def test_votes_at_a_low_temperature_are_finite():
    votes = imagenet_knn.vote(np.float32([[1, 0.5]]), np.array([[2, 0]]), 3, 1e-4)
    assert votes.tolist() == [[0, 0, 1]]


def test_one_test_image_and_a_padded_bank_of_negative_similarities():
    train = features([[-1, 0.1], [-1, 0.2], [-1, 0.3]], [0, 1, 2])
    test = features([[1, 0]], [2])
    assert evaluate(train, test, Config(neighbours=[1]))["k1"] == 100  # no padding row (0) is a neighbour
    assert evaluate(train, test, Config(neighbours=[3]))["k3_top5"] == 100


def test_half_precision_features_are_compared_in_single():
    train, test = gaussian(1)
    halves = [Features({"avgpool": f.layers["avgpool"].astype(np.float16)}, f.labels) for f in (train, test)]
    assert evaluate(*halves, Config(neighbours=[5]))["k5"] == pytest.approx(slow(*halves, 5, 1, 0.07))


def test_the_published_protocol_is_the_default():
    assert Config().neighbours == [10, 20, 100, 200]
    assert Config().temperature == 0.07
    assert list(imagenet_knn.COLUMNS) == [f"k{k}" for k in Config().neighbours]


def test_gpus_that_are_not_there_are_not_replaced_by_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="expected the GPUs that CUDA_VISIBLE_DEVICES=0 names, found none"):
        evaluate(*gaussian(0), Config(neighbours=[3]))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 10, 300])
def test_a_gpu_finds_the_neighbours_of_the_cpu(k):
    """Of images whose similarities are exact in float32, so that equal ones tie on both."""
    random = np.random.default_rng(0)
    rows = np.zeros((2_500, 64), np.float16)
    for row in rows:
        row[random.choice(64, 4, replace=False)] = random.choice([-1, 1], 4)
    train, test = rows[:2_000], rows[2_000:]
    on_cpu = nearest(*(torch.from_numpy(of) for of in (train, test)), k)
    for found, expected in zip(nearest(train, test, k), on_cpu, strict=True):
        for of_gpu, of_cpu in zip(found, expected, strict=True):
            np.testing.assert_array_equal(of_gpu, of_cpu)


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
    with pytest.raises(BadInput, match="train labels: expected class numbers from 0; found int64 from -1"):
        evaluate(features(np.ones((2, 6)), [-1, 1]), test, Config(neighbours=[1]))
    with pytest.raises(BadInput, match="test labels: expected class numbers from 0; found float64"):
        evaluate(train, features(np.ones((2, 6)), [0.0, 1.0]), Config(neighbours=[1]))
