"""The batched SVM solver beside a joblib loop over scikit-learn's LinearSVC, as the published script has it.

    python tests/speed/svm.py --images 1000 --features 2048 --classes 20 --loop-classes 2

prints, for every cost, the seconds for all classes and their three folds. The loop is measured on
`--loop-classes` of the classes and scaled up. Features are synthetic, non-negative, with a decaying spectrum.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.svm import LinearSVC

from simclr.benchmarks import _svm
from simclr.benchmarks.voc07_svm import Config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--loop-classes", type=int, default=2, help="0: leave the loop out")
    parser.add_argument("--noise", type=float, default=0.3, help="higher: harder to separate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows, signs = synthetic(args.images, args.features, args.classes, args.noise)
    fold = np.arange(args.images) % 3
    members = [fold >= 0, *(fold != out for out in range(3))]
    started = time.perf_counter()
    images = _svm.scaled(rows)
    every = np.concatenate([signs * member[:, None] for member in members], axis=1)
    problems = _svm.Problems(_svm.gram(images, images), every)
    print(f"Gram matrix and eigendecomposition: {time.perf_counter() - started:.1f} s on {_svm.device()}")
    print(f"{'cost':>9} {'batched s':>10} {'loop s':>9} {'ratio':>7} {'worst gap':>10} {'active':>7}")
    totals = np.array([time.perf_counter() - started, 0.0])
    path = problems.path(Config().costs)
    for cost in sorted(Config().costs):
        started = time.perf_counter()
        solution = next(path)
        seconds = [time.perf_counter() - started, 0.0]
        if args.loop_classes:
            started = time.perf_counter()
            loop(images.cpu().numpy(), signs[:, : args.loop_classes], members, cost, args.threads)
            seconds[1] = (time.perf_counter() - started) * args.classes / args.loop_classes
        totals += seconds
        active = float((solution.coefficients[:, : args.classes] != 0).double().mean())
        gap = float(solution.gap.max())
        print(f"{cost:9.2e} {row(seconds)} {gap:10.0e} {active:7.0%}", flush=True)
    print(f"{'total':>9} {row(totals)}")


def row(seconds: list[float]) -> str:
    return f"{seconds[0]:10.2f} {seconds[1]:9.1f} {seconds[1] / seconds[0]:7.1f}"


def synthetic(images: int, features: int, classes: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Return non-negative features `(N, D)` of decaying spectrum and signs `(N, C)`, 2 to 17 % positive."""
    random = np.random.default_rng(0)
    signs = np.where(random.random((images, classes)) < np.linspace(0.02, 0.17, classes), 1, -1)
    latent = random.normal(size=(images, 512)) * np.arange(1, 513) ** -0.5
    latent += (signs == 1) @ (0.3 * random.normal(size=(classes, 512)) * np.arange(1, 513) ** -0.25)
    rows = latent @ random.normal(size=(512, features)) + noise * random.normal(size=(images, features))
    return np.maximum(rows, 0), signs


def loop(
    rows: np.ndarray, signs: np.ndarray, members: list[np.ndarray], cost: float, jobs: int
) -> list[LinearSVC]:
    """Fit LinearSVC as train_svm_kfold.py of MMSelfSup v0.11.0 does, one problem at a time."""

    def fit(column: np.ndarray, member: np.ndarray) -> LinearSVC:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 2,000 iterations do not always converge
            svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, tol=1e-4, max_iter=2000)
            return svm.fit(rows[member], column[member])

    fits = (delayed(fit)(column, member) for column in signs.T for member in members)
    return Parallel(n_jobs=jobs)(fits)


if __name__ == "__main__":
    main()
