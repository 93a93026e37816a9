"""VOC SVM: linear SVMs on frozen features of VOC2007, one per class; mean average precision on test.

Protocol: MMSelfSup v0.11.0, tools/benchmarks/classification/svm_voc07 (train_svm_kfold.py, test_svm.py,
svm_helper.py), which come from fair_self_supervision_benchmark. For every layer and class the cost is
chosen by 3-fold cross-validation on trainval. The published script solves to a tolerance of 1e-4 with an
unseeded solver; here every problem is solved to a certified duality gap (see `_svm.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from simclr import BadInput
from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    import numpy as np

    from simclr.features import Features

TITLE = "VOC SVM"

COLUMNS = {
    "best_layer": Column("Best Layer", unit="", format="feature{:.0f}"),
    "svm": Column("SVM"),
}

SPLITS = "trainval", "test"

Layer = Literal["feature1", "feature2", "feature3", "feature4", "feature5"]


class Config(Protocol):
    """Defaults are the published protocol."""

    dataset: ClassVar[str] = "voc2007"

    layers: list[Layer] = Field(
        ["feature1", "feature2", "feature3", "feature4", "feature5"],
        min_length=1,
        description="Layers that compete; the one with the highest mAP on test is reported.",
    )
    costs: list[Annotated[float, Field(gt=0, le=1e3)]] = Field(
        [1.0, 10.0, 100.0, *(0.5**power for power in range(4, 20))],
        min_length=1,
        description="Costs C of the SVM, in the order in which ties are broken: the first wins "
        "(MMSelfSup svm_helper.parse_cost_list: 1, 10, 100 and the powers 0.5⁴ … 0.5¹⁹). Up to 1000: beyond, "
        "rounding keeps the solver from its tolerance.",
    )
    folds: int = Field(
        3, ge=2, description="Folds of the cross-validation, stratified, unshuffled (train_svm_kfold.py)."
    )


def evaluate(train: Features, test: Features, config: Config) -> Metrics:
    """Return `svm` (mAP of the best layer, percent), `best_layer` (1–5) and the mAP of every layer.

    Images of only difficult objects (label −1) are negatives in training and removed in testing. Details:
    per layer the chosen cost and the test AP of each class, and the certificate of convergence.
    Raises `BadInput` for features of another dataset or split, a layer that is missing, labels that do not
    fit, or a class without enough positives or negatives.
    """
    import numpy as np

    check(train, test, config.layers)
    held_out = stratified_folds(train.labels, config.folds)
    details = {layer: evaluate_layer(train, test, layer, held_out, config.costs) for layer in config.layers}
    means = {layer: float(np.mean(found["average_precision"])) for layer, found in details.items()}
    best = max(means, key=means.get)
    return Metrics(
        {"best_layer": int(best.removeprefix("feature")), "svm": means[best], **means}, details=details
    )


def check(train: Features, test: Features, layers: list[str]) -> None:
    """Raise `BadInput` unless they are VOC2007's splits, with `layers` and labels of the same classes."""
    from simclr.features import check_splits

    check_splits(train, test, Config.dataset, SPLITS, layers)
    for split, features in (("train", train), ("test", test)):
        if features.labels.ndim != 2:
            raise BadInput(
                f"{split} labels: expected one column per class; found shape {features.labels.shape}"
            )
    classes = [features.labels.shape[1] for features in (train, test)]
    if classes[0] != classes[1]:
        raise BadInput(f"train labels have {classes[0]} classes, test labels {classes[1]}")
    for index, column in enumerate(test.labels.T):
        if not (column == 1).any() or not (column == 0).any():
            raise BadInput(
                f"class {index}: the test split needs positives and negatives; found {(column == 1).sum()} "
                f"positive and {(column == 0).sum()} negative images"
            )


def stratified_folds(labels: np.ndarray, folds: int) -> np.ndarray:
    """Return `(N, C)`: the fold that holds each image out, per class; `labels` as in a features folder.

    The folds are those of scikit-learn's unshuffled StratifiedKFold, which the published script uses.
    Raises `BadInput` when a fold would be left without a positive or a negative.
    """
    import numpy as np

    held_out = np.empty(labels.shape, dtype=np.int64)
    for index, positive in enumerate((labels == 1).T):
        counts = (~positive).sum(), positive.sum()
        if min(counts) < folds:
            raise BadInput(
                f"class {index}: {folds} folds need at least {folds} positive and {folds} negative training "
                f"images; found {counts[1]} and {counts[0]}"
            )
        dealt = np.sort(positive != positive[0])  # images of the first one's kind come first,
        for kind in (positive[0], not positive[0]):
            shares = [int((dealt[fold::folds] == (kind != positive[0])).sum()) for fold in range(folds)]
            held_out[positive == kind, index] = np.arange(folds).repeat(shares)  # and are dealt in turn
    return held_out


def evaluate_layer(
    train: Features, test: Features, layer: str, held_out: np.ndarray, costs: list[float]
) -> dict[str, Any]:
    """Return, per class, the cost chosen by cross-validation and the AP on test in percent, of one layer."""
    import numpy as np
    import torch

    from simclr.benchmarks import _svm

    positives = train.labels == 1
    signs, folds = np.where(positives, 1, -1), int(held_out.max()) + 1
    every = np.concatenate([signs, *(signs * (held_out != fold) for fold in range(folds))], axis=1)
    images = _svm.scaled(train.layers[layer])
    kernel = _svm.gram(images, images)
    final, validated, gaps = {}, {}, []
    for solution in _svm.Problems(kernel[None], every.T[None], _svm.leading(kernel)).path(costs):
        final[solution.cost], *_ = solution.coefficients[0].chunk(folds + 1)
        _, *scores = np.split(solution.scores[0].cpu().numpy().T, folds + 1, axis=1)
        validated[solution.cost] = precision_on_folds(scores, positives, held_out)
        gaps.append(solution.gap)
    chosen = [costs[at] for at in np.argmax([validated[cost] for cost in costs], axis=0)]  # the first maximum
    coefficients = torch.stack([final[cost][index] for index, cost in enumerate(chosen)])
    scores = _svm.scores(coefficients, images, _svm.scaled(test.layers[layer])).cpu().numpy().T
    return {
        "cost": chosen,
        "average_precision": (100 * precision_on_test(scores, test.labels)).tolist(),
        "certificate": _svm.certificate(gaps),
    }


def precision_on_folds(scores: list[np.ndarray], positives: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return the step-wise average precision `(C,)`, the mean over folds; `scores[fold]` is `(N, C)`."""
    import numpy as np

    from simclr.metrics import stepwise_average_precision

    precisions = np.empty((len(scores), positives.shape[1]))
    for fold, index in np.ndindex(precisions.shape):
        rows = held_out[:, index] == fold
        precisions[fold, index] = stepwise_average_precision(
            scores[fold][rows, index], positives[rows, index]
        )
    return precisions.mean(axis=0)


def precision_on_test(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the average precision `(C,)` of `scores` `(N, C)`, without the images of label −1."""
    import numpy as np

    from simclr.metrics import average_precision

    columns = zip(scores.T, labels.T, strict=True)
    return np.array([average_precision(of[label >= 0], label[label >= 0] == 1) for of, label in columns])
