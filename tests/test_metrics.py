"""Metrics against hand-worked values, slow definitions, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from simclr import BadInput
from simclr.metrics import average_precision, label_rank, stepwise_average_precision


def area_under_envelope(scores, positives):
    """AP by its definition: for every positive, the best precision at its recall or beyond."""
    recalls, precisions = [], []
    for threshold in sorted(set(scores), reverse=True):
        taken = [p for s, p in zip(scores, positives, strict=True) if s >= threshold]
        precisions.append(sum(taken) / len(taken))
        recalls.append(sum(taken) / sum(positives))
    area, previous = 0.0, 0.0
    for recall in recalls:
        best = max(p for p, r in zip(precisions, recalls, strict=True) if r >= recall)
        area += (recall - previous) * best
        previous = recall
    return area


def test_average_precision_by_hand():
    # Ranked: + - - + +  → precision at the positives 1, 2/4, 3/5; the envelope lifts 2/4 to 3/5.
    scores, positives = [5, 4, 3, 2, 1], [1, 0, 0, 1, 1]
    assert average_precision(scores, positives) == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    assert stepwise_average_precision(scores, positives) == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_against_definition_and_scikit_learn(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 8, size=40) if seed % 2 else random.normal(size=40)  # odd seeds: ties
    positives = np.append(random.random(39) < 0.3, True)
    assert average_precision(scores, positives) == pytest.approx(area_under_envelope(scores, positives))
    expected = average_precision_score(positives, scores)
    assert stepwise_average_precision(scores, positives) == pytest.approx(expected, abs=1e-12)


def test_average_precision_does_not_depend_on_the_order_of_ties():
    scores = np.array([1.0, 1.0, 1.0, 0.0])
    values = {average_precision(scores, np.roll([1, 0, 0, 0], shift)) for shift in range(3)}
    assert values == {1 / 3}


def test_ranks_give_the_accuracies_of_scikit_learn():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(200, 7)), random.integers(0, 7, size=200)
    for k in (1, 2, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert (label_rank(scores, labels) < k).mean() == pytest.approx(expected)


def test_the_lower_class_ranks_first_among_ties():
    assert label_rank(np.zeros((3, 3)), np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_bad_input_is_refused():
    with pytest.raises(BadInput, match="at least one positive; found none in 2 images"):
        average_precision([1, 2], [0, 0])
    with pytest.raises(BadInput, match="row 1 holds NaN"):
        stepwise_average_precision([1, np.nan], [0, 1])
    with pytest.raises(BadInput, match="found 3 and 2"):
        average_precision([1, 2, 3], [0, 1])
    with pytest.raises(BadInput, match="row 0 holds NaN"):
        label_rank(np.array([[np.nan, 1]]), np.array([1]))
    with pytest.raises(BadInput, match="labels 0…1 for 2 scores per image; found 0…2"):
        label_rank(np.zeros((2, 2)), np.array([0, 2]))
    with pytest.raises(BadInput, match="found 0 and 0"):
        label_rank(np.zeros((0, 2)), np.zeros(0, dtype=int))
