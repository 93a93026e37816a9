"""The VOC SVM of one layer beside LinearSVC fitted in a loop: time, memory, and the same results.

    PYTHONPATH=. python tests/speed/svm.py --features 2048

prints one Markdown table. `joblib loop`: all classes and costs, the features shared between the workers.
`published script`: the pool of train_svm_kfold_parallel.py of MMSelfSup v0.11.0, which sends all features to
a worker with each task. A task is that script's, in both: for one class and cost, cross_val_score with three
folds and a fit; and the scores of the test images. Both are timed on `--loop-classes` of the 20 classes and
every `--loop-step`-th cost, and scaled up. The ways take turns, `--repeats` times; seconds are medians.

Features are synthetic and non-negative, with a decaying spectrum; classes are as frequent as in VOC2007.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from simclr.benchmarks import voc07_svm
from simclr.features import Features
from simclr.metrics import average_precision

# Images of VOC2007 trainval that show each class, from aeroplane to tvmonitor
POSITIVES = [238, 243, 330, 181, 244, 186, 713, 337, 445, 141]
POSITIVES += [200, 421, 287, 245, 2008, 245, 96, 229, 261, 256]
TRAIN, TEST = 5011, 4952
PUBLISHED = {"tol": 1e-4, "max_iter": 2000}
CONVERGED = {"tol": 1e-7, "max_iter": 100_000}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parity-classes", type=int, default=1, help="0: do not compare the results")
    args = parser.parse_args()
    train, test = synthetic(args.features)
    config = voc07_svm.Config(layers=["feature5"])
    rows = [unit(features.layers["feature5"]) for features in (train, test)]
    costs = config.costs[:: args.loop_step]
    loop = [(*rows, signs(train, index), cost) for index in range(args.loop_classes) for cost in costs]
    metrics = compare(
        "VOC SVM, 1,520 fits",
        lambda: voc07_svm.evaluate(train, test, config),
        fit_with_folds,
        published_pool,
        loop,
        len(POSITIVES) * len(config.costs),
        args,
    )
    details = metrics.details["feature5"]
    print(f"\nmAP {metrics['svm']:.2f}, {details['certificate']}")
    for index in range(args.parity_classes):
        tasks = [(*rows, signs(train, index), cost, CONVERGED) for cost in config.costs]
        validated, scores, _ = zip(*joblib_loop(fit_with_folds, tasks, args.threads)[0], strict=True)
        chosen = int(np.argmax(validated))
        kept = test.labels[:, index] >= 0
        expected = 100 * average_precision(scores[chosen][kept], test.labels[kept, index] == 1)
        print(
            f"class {index}: cost {details['cost'][index]:g}, AP {details['average_precision'][index]:.4f}; "
            f"LIBLINEAR to convergence: cost {config.costs[chosen]:g}, AP {expected:.4f}"
        )


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--loop-classes", type=int, default=1)
    parser.add_argument("--loop-step", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def synthetic(width: int) -> tuple[Features, Features]:
    """Return train and test features as many as VOC2007 has, of decaying spectrum, mAP about 75."""
    random = np.random.default_rng(0)
    labels = np.concatenate([drawn_labels(random, images) for images in (TRAIN, TEST)])
    decay = np.arange(1, 513)
    latent = random.normal(size=(len(labels), 512)) * decay**-0.5
    strength = 0.35 * random.random(labels.shape) ** 2  # how clearly an image shows a class
    latent += ((labels == 1) * strength) @ (random.normal(size=(labels.shape[1], 512)) * decay**-0.25)
    rows = latent @ random.normal(size=(512, width)) + 0.3 * random.normal(size=(len(labels), width))
    rows = np.maximum(rows, 0).astype(np.float32)
    return tuple(
        Features({"feature5": rows[part]}, labels[part]) for part in (slice(TRAIN), slice(TRAIN, None))
    )


def drawn_labels(random: np.random.Generator, images: int) -> np.ndarray:
    """Return labels `(images, 20)`: 1 as often as in VOC2007, −1 (difficult) for 1 %, else 0."""
    labels = np.zeros((images, len(POSITIVES)), dtype=np.int8)
    for column, positives in zip(labels.T, POSITIVES, strict=True):
        order = random.permutation(images)
        count = round(positives * images / TRAIN)
        column[order[:count]] = 1
        column[order[count : count + images // 100]] = -1
    return labels


def unit(rows: np.ndarray) -> np.ndarray:
    """Return `rows` as svm_helper.normalize_features of the published script does."""
    rows = rows.astype(np.float64)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def signs(features: Features, index: int) -> np.ndarray:
    return np.where(features.labels[:, index] == 1, 1, -1)


def compare(
    title: str,
    ours: Callable[[], Any],
    task: Callable[..., Any],
    published: Callable[..., tuple[list[Any], float, float]],
    tasks: list[tuple],
    whole: int,
    args: argparse.Namespace,
) -> Any:
    """Time the three ways in turns, print the table, and return what `ours` returns; see the top."""
    found = {}

    def timed_ours() -> tuple[float, float]:
        started = time.perf_counter()
        found["ours"] = ours()
        return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    ways = {
        "ours": timed_ours,
        "joblib loop": lambda: joblib_loop(task, tasks, args.threads)[1:],
        "published script": lambda: published(task, tasks, args.threads)[1:],
    }
    seconds, peak = {way: [] for way in ways}, {}
    for _ in range(args.repeats):
        for way, run in ways.items():
            taken, memory = run()
            peak.setdefault(way, memory / 2**20)
            seconds[way].append(taken if way == "ours" else taken * whole / len(tasks))
    print(
        f"{title}, {TRAIN} × {args.features}, {args.threads} cores, median of {args.repeats}; the loops are"
    )
    print(f"timed on {len(tasks)} of {whole} tasks and scaled up\n")
    print("| way | seconds | all runs | ratio | peak memory, GiB |\n|---|---|---|---|---|")
    for way, runs in seconds.items():
        ratio = median(runs) / median(seconds["ours"])
        every = ", ".join(f"{run:.0f}" for run in runs)
        print(f"| {way} | {median(runs):.0f} | {every} | {ratio:.1f} | {peak[way]:.1f} |", flush=True)
    return found["ours"]


def joblib_loop(task: Callable[..., Any], tasks: list[tuple], jobs: int) -> tuple[list[Any], float, float]:
    """Return the results, the seconds without the start of the workers, and their peak memory in KiB."""
    with Parallel(n_jobs=jobs) as parallel:
        parallel(delayed(worker)(tasks[0]) for _ in range(jobs))  # starts them, and shares the features
        started = time.perf_counter()
        results = parallel(delayed(task)(*arguments) for arguments in tasks)
        seconds = time.perf_counter() - started
    return results, seconds, peak_of_all(results)


def published_pool(task: Callable[..., Any], tasks: list[tuple], jobs: int) -> tuple[list[Any], float, float]:
    """Return the same, from a pool that is sent all features with each task."""
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        started = time.perf_counter()
        results = list(pool.imap_unordered(star, ((task, arguments) for arguments in tasks)))
        return results, time.perf_counter() - started, peak_of_all(results)


def peak_of_all(results: list[tuple[float, np.ndarray, tuple[int, int]]]) -> float:
    return sum({process: peak for *_, (process, peak) in results}.values())


def star(call: tuple[Callable[..., Any], tuple]) -> Any:
    task, arguments = call
    return task(*arguments)


def fit_with_folds(
    images: np.ndarray, others: np.ndarray, column: np.ndarray, cost: float, stopping: dict = PUBLISHED
) -> tuple[float, np.ndarray, tuple[int, int]]:
    """Return the mean AP over three folds, and the scores of `others`; as train_svm_kfold_parallel.py."""
    svm = linear_svc(cost, stopping)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 2,000 iterations do not always converge
        validated = cross_val_score(svm, images, column, cv=3, scoring="average_precision").mean()
        scores = svm.fit(images, column).decision_function(others)
    return validated, scores, worker()


def linear_svc(cost: float, stopping: dict = PUBLISHED) -> LinearSVC:
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, **stopping)


def worker(_: Any = None) -> tuple[int, int]:
    """Return this process, and its peak memory in KiB."""
    return multiprocessing.current_process().pid, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
