"""Time and peak memory of the exact nearest-neighbour search.

    python tests/speed/knn.py --train 100000 --test 2000 --features 2048

prints one line. The whole protocol is 1,281,167 × 50,000 images of 2,048 features; time is proportional to
the number of pairs.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from simclr.benchmarks.imagenet_knn import Config, evaluate
from simclr.features import Features


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--test", type=int, default=2_000)
    parser.add_argument("--features", type=int, default=2_048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        train = on_disk(Path(folder) / "train.npy", args.train, args.features)
        test = on_disk(Path(folder) / "test.npy", args.test, args.features)
        started = time.perf_counter()
        evaluate(train, test, Config())
        seconds = time.perf_counter() - started
    operations = 2 * args.train * args.test * args.features
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.train} × {args.test} × {args.features}: {seconds:.1f} s, {operations / seconds / 1e9:.0f} "
        f"GFLOP/s, peak memory {memory:.2f} GiB (mapped files included)"
    )


def on_disk(path: Path, images: int, width: int) -> Features:
    """Return memory-mapped float16 features of 100 classes, written block by block."""
    random = np.random.default_rng(images)
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (images, width))
    labels = np.arange(images) % 100
    centres = np.random.default_rng(0).random((100, width), dtype=np.float32)
    for start in range(0, images, 8192):
        block = labels[start : start + 8192]
        rows[start : start + 8192] = centres[block] + random.random((len(block), width), dtype=np.float32)
    rows.flush()
    return Features({"avgpool": np.load(path, mmap_mode="r")}, labels)


if __name__ == "__main__":
    main()
