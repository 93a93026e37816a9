"""The low-shot SVM of one layer beside LinearSVC fitted in a loop: time, memory, and the same results.

    PYTHONPATH=. python tests/speed/lowshot.py --features 2048

prints the tables of svm.py, see there. A task is that of train_svm_low_shot.py and test_svm_low_shot.py of
MMSelfSup v0.11.0: one of the 15,200 fits, on one class of one draw, and the scores of the test images; its
eval_svm_lowshot.sh runs them one after another. The loops are timed on the first draw of `--loop-classes`
classes, at all k. Ours is timed with the same 15,200 fits; and whole, with the cross-validation, beside loops
that cross-validate too (the published script does not).
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.model_selection import cross_val_score
from svm import (
    CONVERGED,
    PUBLISHED,
    arguments,
    compare,
    joblib_loop,
    linear_svc,
    peak_of_all,
    synthetic,
    unit,
    worker,
)

from simclr.benchmarks import voc07_lowshot
from simclr.benchmarks.voc07_svm import precision_on_test


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parity-draws", type=int, default=1, help="0: do not compare the results")
    args = parser.parse_args()
    train, test = synthetic(args.features)
    config = voc07_lowshot.Config(layer="feature5")
    rows = [unit(features.layers["feature5"]) for features in (train, test)]
    draws = {
        k: np.stack([voc07_lowshot.draw(train.labels, k, sample, config) for sample in range(config.samples)])
        for k in config.shots
    }
    costs = config.costs[:: args.loop_step]
    loop = [
        (*rows, draws[k][0, :, index], cost)
        for index in range(args.loop_classes)
        for k in config.shots
        for cost in costs
    ]
    fits = len(config.shots) * config.samples * train.labels.shape[1] * len(config.costs)
    alone = config.model_copy(update={"folds": 1})
    compare(
        "Low-shot SVM, 15,200 fits",
        lambda: voc07_lowshot.precision_of_all(train, test, "feature5", draws, alone),
        fit,
        one_after_another,
        loop,
        fits,
        args,
    )
    print()
    metrics = compare(
        "Low-shot SVM with cross-validation, 53,200 fits",
        lambda: voc07_lowshot.evaluate(train, test, config),
        fit_with_folds,
        one_after_another,
        loop,
        fits,
        args,
    )
    print(f"\n{dict(metrics)}\n{metrics.details['certificate']}")
    for sample in range(args.parity_draws):
        parity(metrics, draws, sample, rows, test.labels, config, args.threads)


def parity(metrics, draws, sample, rows, labels, config, threads) -> None:
    """Print the mAP of one draw of each k, at the chosen cost, beside that of LIBLINEAR to convergence."""
    for k in config.shots:
        found = metrics.details[f"k{k}"]
        tasks = [(*rows, column, found["cost"][sample], CONVERGED) for column in draws[k][sample].T]
        scores = np.stack([of for _, of, _ in joblib_loop(fit, tasks, threads)[0]], axis=1)
        expected = 100 * precision_on_test(scores, labels).mean()
        print(
            f"k = {k}, draw {sample}: mAP {found['map_of_each_draw'][sample]:.4f}; "
            f"LIBLINEAR to convergence {expected:.4f}"
        )


def one_after_another(task: Callable[..., Any], tasks: list[tuple], _: int) -> tuple[list[Any], float, float]:
    """Return the results of one process, the seconds they took, and its peak memory in KiB."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        results, seconds = pool.apply(every, (task, tasks))
    return results, seconds, peak_of_all(results)


def every(task: Callable[..., Any], tasks: list[tuple]) -> tuple[list[Any], float]:
    started = time.perf_counter()
    results = [task(*arguments) for arguments in tasks]
    return results, time.perf_counter() - started


def fit(
    images: np.ndarray, others: np.ndarray, column: np.ndarray, cost: float, stopping: dict = PUBLISHED
) -> tuple[float, np.ndarray, tuple[int, int]]:
    """Return the scores of `others` from the images that `column` holds ±1 for, not 0."""
    drawn = column != 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 2,000 iterations do not always converge
        svm = linear_svc(cost, stopping).fit(images[drawn], column[drawn])
    return 0.0, svm.decision_function(others), worker()


def fit_with_folds(
    images: np.ndarray, others: np.ndarray, column: np.ndarray, cost: float
) -> tuple[float, np.ndarray, tuple[int, int]]:
    """Return also the mean AP over as many folds as there are positives, three at most."""
    drawn, folds = column != 0, min(3, int((column > 0).sum()))
    _, scores, process = fit(images, others, column, cost)
    if folds == 1:
        return 0.0, scores, process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svm = linear_svc(cost)
        validated = cross_val_score(
            svm, images[drawn], column[drawn], cv=folds, scoring="average_precision"
        ).mean()
    return validated, scores, process


if __name__ == "__main__":
    main()
