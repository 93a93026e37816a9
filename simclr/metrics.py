"""Metrics: arrays in, numbers out. Everything is a fraction in [0, 1]; benchmarks report percent."""

from __future__ import annotations

import numpy as np

from simclr import BadInput


def label_rank(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the rank `(N,)`, from 0, of each row's label in `scores` `(N, C)`; `labels` is `(N,)`.

    The share of ranks below k is the top-k accuracy. Among equal scores the lower class ranks first, so the
    result does not depend on a sort. Raises `BadInput` for NaN, or a label outside 0…C-1.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    _check(scores, labels)
    classes = scores.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise BadInput(
            f"expected labels 0…{classes - 1} for {classes} scores per image; found "
            f"{labels.min()}…{labels.max()}"
        )
    own = np.take_along_axis(scores, labels[:, None].astype(np.int64), axis=1)
    lower_class = np.arange(classes) < labels[:, None]
    return ((scores > own) | ((scores == own) & lower_class)).sum(axis=1)


def average_precision(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the area under the precision envelope over all recall steps; `scores`, `positives` `(N,)`.

    The precision at a recall is the best at that recall or a higher one (VOC2010 and later; not the
    11-point rule of VOC2007). Images of equal score enter together, as one threshold, so the result does
    not depend on the order of the images; the published script ranks them in list order.
    Source: MMSelfSup v0.11.0, tools/benchmarks/classification/svm_voc07/svm_helper.py.
    Raises `BadInput` for NaN, or without a positive.
    """
    precision = _precision_at_positives(scores, positives)
    return float(np.maximum.accumulate(precision[::-1]).mean())


def stepwise_average_precision(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the mean precision over the recall steps, without envelope, as scikit-learn defines it.

    It chooses costs in cross-validation. Arguments, ties and errors as in `average_precision`.
    """
    return float(_precision_at_positives(scores, positives).mean())


def _precision_at_positives(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the precision `(P,)` at the score of each of the P positives, from the highest down.

    Each positive is one P-th of the recall, and between two positives precision only falls: these are all
    the thresholds that matter. Sorting the scores without their images is several times faster than with.
    """
    scores, positives = np.asarray(scores), np.asarray(positives, dtype=bool)
    _check(scores, positives)
    found = np.sort(scores[positives])
    if not len(found):
        raise BadInput(
            f"average precision needs at least one positive; found none in {len(positives)} images"
        )
    hits = len(found) - np.searchsorted(found, found)
    taken = len(scores) - np.searchsorted(np.sort(scores), found)
    return (hits / taken)[::-1]


def _check(scores: np.ndarray, labels: np.ndarray) -> None:
    if len(scores) != len(labels) or len(labels) == 0:
        raise BadInput(f"expected one row of scores per label; found {len(scores)} and {len(labels)}")
    if np.isnan(scores).any():
        row = int(np.argwhere(np.isnan(scores))[0, 0])
        raise BadInput(f"scores must be numbers, but row {row} holds NaN")
