"""Low-shot SVM: the VOC SVM on k positive and 19·k negative training images per class.

Protocol: MMSelfSup v0.11.0, tools/data_converters/create_voc_low_shot_challenge_samples.py and
svm_voc07/tools/{train,test}_svm_low_shot.py, aggregate_low_shot_svm_stats.py. Five draws are made for each
k, and for each k one cost serves all classes and draws: the one with the highest mean AP **on the test
set**. That is the published protocol and is optimistic; `k1_held_out` and so on are the same numbers with
the cost chosen on the trainval images that were not drawn, without a look at the test set. The published
draws are unseeded; here they follow `seed`, and the record holds a hash of each.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from simclr import BadInput
from simclr.benchmarks import voc07_svm
from simclr.protocol import Column, Metrics

if TYPE_CHECKING:
    import numpy as np

    from simclr.features import Features
    from simclr.results import Record

TITLE = "Low-shot SVM"

COLUMNS = {
    "k1": Column("k=1"),
    "k2": Column("k=2"),
    "k4": Column("k=4"),
    "k8": Column("k=8"),
    "k16": Column("k=16"),
    "k32": Column("k=32"),
    "k64": Column("k=64"),
    "k96": Column("k=96"),
}


class Config(voc07_svm.Config):
    """Defaults are the published protocol; `layers` and `folds` serve only to find the best layer."""

    dataset: ClassVar[str] = "voc2007"

    layer: Literal["best"] | voc07_svm.Layer = Field(
        "best", description="best: the layer that voc07_svm reports as best; or the layer's name."
    )
    shots: list[PositiveInt] = Field(
        [1, 2, 4, 8, 16, 32, 64, 96],
        min_length=1,
        description="k: positive images per class (96: all that VOC2007 trainval has of its rarest class).",
    )
    negatives: int = Field(
        19, ge=1, description="Negative images per positive one; VOC: the number of other classes."
    )
    samples: int = Field(5, ge=2, description="Independent draws for each k.")
    seed: int = Field(0, ge=0, description="Of the draws; the published draws are unseeded.")


def evaluate(train: Features, test: Features, config: Config, svm: Record | None = None) -> Metrics:
    """Return, for each k, the mean mAP in percent over the draws, at the cost that is best on the test set.

    `k1_held_out` and so on: at the cost that is best on the trainval images that were not drawn; left out
    where a draw takes every positive of every class. `spread`: population standard deviation over draws.
    `svm` is the record of voc07_svm, which knows the best layer; without it that benchmark is run.
    Raises `BadInput` for a class with fewer than k positives or k·`negatives` negatives.
    """
    import numpy as np

    layer = _layer(train, test, config, svm)
    voc07_svm.check(train, test, [layer])
    draws = np.stack(
        [[draw(train.labels, k, sample, config) for sample in range(config.samples)] for k in config.shots]
    )
    tested, held_out, gap = precision_of_all(train, test, layer, draws, config.costs)
    metrics = Metrics(
        {},
        details={
            "layer": layer,
            "worst_relative_duality_gap": gap,
            "draws_sha256": {
                f"k{k}": [hashlib.sha256(signs.tobytes()).hexdigest() for signs in draws[row]]
                for row, k in enumerate(config.shots)
            },
        },
    )
    for row, k in enumerate(config.shots):
        _report(metrics, f"k{k}", tested[:, row], tested[:, row], config.costs)
        if np.isfinite(held_out[:, row]).all():
            _report(metrics, f"k{k}_held_out", tested[:, row], held_out[:, row], config.costs)
    return metrics


def _layer(train: Features, test: Features, config: Config, svm: Record | None) -> str:
    if config.layer != "best":
        return config.layer
    if svm is None:
        best = voc07_svm.evaluate(train, test, config)["best_layer"]
    elif svm.benchmark == "voc07_svm":
        best = svm.metrics["best_layer"]
    else:
        raise BadInput(f"--svm: expected the record of voc07_svm, found that of {svm.benchmark}")
    return f"feature{best:.0f}"


def draw(labels: np.ndarray, k: int, sample: int, config: Config) -> np.ndarray:
    """Return `(N, C)` int8: 1 and −1 for the drawn positives and negatives of each class, 0 for the rest.

    Every class is drawn independently, uniformly, without replacement, from the images of label 1 and of
    label 0 (difficult images are never drawn).
    """
    import numpy as np

    signs = np.zeros(labels.shape, dtype=np.int8)
    for index, column in enumerate(labels.T):
        random = np.random.default_rng([config.seed, k, sample, index])
        for label, sign, count in ((1, 1, k), (0, -1, k * config.negatives)):
            candidates = np.flatnonzero(column == label)
            if len(candidates) < count:
                raise BadInput(
                    f"class {index}: k = {k} needs {count} {'positive' if label else 'negative'} training "
                    f"images; found {len(candidates)}; remove {k} from benchmarks.voc07_lowshot.shots"
                )
            signs[random.choice(candidates, count, replace=False), index] = sign
    return signs


def precision_of_all(
    train: Features, test: Features, layer: str, draws: np.ndarray, costs: list[float]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mAP on test and on undrawn images, each `(costs, K, samples)`, and the worst duality gap.

    `draws` is `(K, samples, N, C)`, as `draw` returns them. The mean over undrawn images leaves out classes
    that have no positive or no negative left; it is NaN where none has.
    """
    import numpy as np

    from simclr.benchmarks import _svm

    shape = (*draws.shape[:2], draws.shape[3])  # (K, samples, C)
    images = _svm.scaled(train.layers[layer])
    similarity = _svm.gram(_svm.scaled(test.layers[layer]), images)
    problems = _svm.Problems(_svm.gram(images, images), np.moveaxis(draws, 2, 0).reshape(len(images), -1))
    undrawn = np.where(draws == 0, train.labels, -1)
    tested = np.zeros((len(costs), *shape[:2]))
    held_out = np.zeros_like(tested)
    gap = 0.0
    for solution in problems.path(costs):
        cost = costs.index(solution.cost)
        on_test = (similarity @ solution.coefficients).cpu().numpy().reshape(-1, *shape)
        on_train = solution.scores.cpu().numpy().reshape(-1, *shape)
        for at in np.ndindex(shape[:2]):
            tested[(cost, *at)] = voc07_svm.precision_on_test(on_test[:, *at], test.labels).mean()
            held_out[(cost, *at)] = _mean_over_decidable(on_train[:, *at], undrawn[at])
        gap = max(gap, float(solution.gap.max()))
    return tested, held_out, gap


def _mean_over_decidable(scores: np.ndarray, labels: np.ndarray) -> float:
    classes = ((labels == 1).any(axis=0) & (labels == 0).any(axis=0)).nonzero()[0]
    if not len(classes):
        return float("nan")
    return voc07_svm.precision_on_test(scores[:, classes], labels[:, classes]).mean()


def _report(metrics: Metrics, key: str, tested: np.ndarray, judged: np.ndarray, costs: list[float]) -> None:
    """Add the mean over the draws of `tested` `(costs, samples)`, at the cost where `judged` is highest."""
    chosen = int(judged.mean(axis=1).argmax())  # the first maximum, in the stated order of the costs
    maps = 100 * tested[chosen]
    metrics[key] = float(maps.mean())
    metrics.spread[key] = float(maps.std())
    metrics.trials[key] = len(maps)
    metrics.details[key] = {"cost": costs[chosen], "map_of_each_draw": maps.tolist()}
