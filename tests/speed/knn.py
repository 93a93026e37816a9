"""Nearest-neighbour classification beside faiss's flat index and the peers' loops, on the same features.

    python tests/speed/knn.py --sizes 12500x500 25000x1000 50000x2000

prints a Markdown table per size, then the growth law. Every method starts from the same memory-mapped float16
features and ends with the predicted classes for k = 10, 20, 100 and 200, for each of which the peers' loops
pass over the features; lightly's also for 200 alone. The methods take turns, so that whatever else the
machine does hits all of them; seconds are medians. Memory is the most anonymous memory that a method holds
beyond what was there before it, so the mapped files do not count.
Parity is the share of test images whose class, for every k, is that of float64.

faiss (faiss-cpu) and lightly are left out where they are not installed; PYTHONPATH will do.

On two cores of an AMD EPYC with AVX2, other work running on the machine beside it, with faiss-cpu 1.15.1 and
lightly 1.6.0:

| images | ours, s | faiss, s | MMSelfSup, s | lightly, k = 200 alone, s |
|---|---|---|---|---|
| 10,000 × 500 | 1.30 | 1.34 (× 1.02) | 5.68 (× 4.35) | 3.06 (× 2.34) |
| 20,000 × 1,000 | 4.09 | 4.99 (× 1.22) | 22.50 (× 5.50) | 10.34 (× 2.53) |
| 40,000 × 2,000 | 7.34 | 11.06 (× 1.51) | 34.96 (× 4.76) | 18.31 (× 2.49) |

with every class that of float64, by every method, and at 40,000 × 2,000 with 0.50, 0.76, 1.59 and 0.83 GB.
Processor time of ours on one core, which other work disturbs less, is 0.40, 1.38, 5.10 and (80,000 × 4,000)
20.6 s: it grows as pairs^0.95, at last as pairs^1.01. At 40,000 × 2,000 matrix products are 77 % of it,
ranking 18 %, reading, converting and normalising 4 %, votes 1 %. At 40,000 × 1,000 lightly's pass for a
single k takes 6.9 s of one core, ours for all 3.0 and the products alone 2.3: what makes them all can be 3.0
times faster at best.

All four k by every method, wall time of one thread: at 10,000 × 500 ours 2.89 s, lightly × 6.1 (k = 200 alone
× 4.1), MMSelfSup × 6.2; at 20,000 × 1,000 ours 6.09 s, lightly × 6.8 (k = 200 alone × 2.5), MMSelfSup × 5.2.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from simclr.benchmarks.imagenet_knn import Config, nearest, vote
from simclr.features import Features

try:
    import faiss
except ImportError:
    faiss = None
LIGHTLY = importlib.util.find_spec("lightly")

NEIGHBOURS, TEMPERATURE, CLASSES = Config().neighbours, Config().temperature, 1000
K = max(NEIGHBOURS)

# Predicted class of each test image, by k.
Predicted = dict[int, np.ndarray]
Method = Callable[[Features, Features], Predicted]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["12500x500", "25000x1000"], metavar="TRAINxTEST")
    parser.add_argument("--features", type=int, default=2_048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if faiss:
        faiss.omp_set_num_threads(args.threads)
    seconds = {}
    for size in args.sizes:
        images = [int(number) for number in size.split("x")]
        with tempfile.TemporaryDirectory() as folder:
            splits = [
                on_disk(Path(folder) / f"{n}.npy", n, args.features, seed) for seed, n in enumerate(images)
            ]
            print(f"\n{images[0]:,} × {images[1]:,} images of {args.features:,} features\n")
            seconds[size] = compare(*splits, args.methods, args.repeat)
    if len(args.sizes) > 1:
        pairs = [np.prod([float(n) for n in size.split("x")]) for size in args.sizes]
        exponent = np.polyfit(np.log(pairs), np.log([seconds[size] for size in args.sizes]), 1)[0]
        print(f"\nseconds of {args.methods[0]} grow as pairs^{exponent:.2f}")


def compare(train: Features, test: Features, methods: list[str], repeat: int) -> float:
    """Print the table; return the seconds of the first method."""
    truth = float64(train, test)
    seconds, memory, parity = {name: [] for name in methods}, {}, {}
    for _ in range(repeat):
        for name in methods:
            with peak_memory() as peak:
                started = time.perf_counter()
                predicted = METHODS[name](train, test)
                seconds[name].append(time.perf_counter() - started)
            memory[name] = max(peak)
            parity[name] = np.all([predicted[k] == truth[k] for k in predicted], axis=0).mean()
    print("| method | seconds | ours is faster by | peak memory, GB | parity with float64 |")
    print("|---|---|---|---|---|")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    first = medians[methods[0]]
    for name, median in medians.items():
        cells = (name, f"{median:.2f}", f"{median / first:.2f}", f"{memory[name] / 1e9:.2f}")
        print("|", " | ".join((*cells, f"{parity[name]:.2%}")), "|")
    return first


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list that in the end holds the anonymous memory, in bytes, at many moments of the block."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again unseen
    before, samples, done = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(anonymous() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def anonymous() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def on_disk(path: Path, images: int, width: int, seed: int) -> Features:
    """Return memory-mapped float16 features of overlapping classes, not negative, of decaying spectrum."""
    random, shared = np.random.default_rng(seed), np.random.default_rng(99)
    labels = random.integers(CLASSES, size=images)
    spread = np.arange(1, 129, dtype=np.float32) ** -0.5
    centres = 0.7 * shared.standard_normal((CLASSES, 128), dtype=np.float32)
    mixing = shared.standard_normal((128, width), dtype=np.float32)
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (images, width))
    for start in range(0, images, 8192):
        block = labels[start : start + 8192]
        latent = (centres[block] + random.standard_normal((len(block), 128), dtype=np.float32)) * spread
        rows[start : start + 8192] = np.maximum(latent @ mixing / 8 + 0.2, 0)
    rows.flush()
    return Features({"avgpool": np.load(path, mmap_mode="r")}, labels)


# ---------------------------------------------------------------- the methods


def ours(train: Features, test: Features) -> Predicted:
    """Stream both, all k in one pass."""
    return voted(train.labels, nearest(train.layers["avgpool"], test.layers["avgpool"], K))


def voted(labels: np.ndarray, found: Iterator[tuple[np.ndarray, np.ndarray]]) -> Predicted:
    parts = {k: [] for k in NEIGHBOURS}
    for similarity, index in found:
        for k in NEIGHBOURS:
            votes = vote(similarity[:, :k], labels[index[:, :k]], CLASSES, TEMPERATURE)
            parts[k].append(votes.argmax(axis=1))
    return {k: np.concatenate(part) for k, part in parts.items()}


def flat_index(train: Features, test: Features) -> Predicted:
    """Search faiss's IndexFlatIP over normalised float32 features."""
    bank, queries = (np.asarray(split.layers["avgpool"], dtype=np.float32) for split in (train, test))
    faiss.normalize_L2(bank)
    faiss.normalize_L2(queries)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    return voted(train.labels, iter([index.search(queries, K)]))


def published(train: Features, test: Features) -> Predicted:
    """Do as MMSelfSup v0.11.0's test_knn.py: for each k, chunks of test images by the whole bank.

    Its chunks are a hundredth of the test images: 500 of ImageNet's, so 500 here at every size.
    """
    arrays = (split.layers["avgpool"].astype(np.float32) for split in (train, test))
    bank, queries = (torch.from_numpy(array) for array in arrays)
    labels = torch.from_numpy(train.labels)
    return {k: published_for(k, bank, labels, queries).numpy() for k in NEIGHBOURS}


def published_for(k: int, bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    bank, queries = F.normalize(bank, dim=1).t(), F.normalize(queries, dim=1)
    predicted = []
    for chunk in queries.split(500):
        similarity, index = torch.mm(chunk, bank).topk(k)
        one_hot = torch.zeros(len(chunk) * k, CLASSES).scatter_(1, labels[index].view(-1, 1), 1)
        weights = (similarity / TEMPERATURE).exp().view(len(chunk), k, 1)
        votes = (one_hot.view(len(chunk), k, CLASSES) * weights).sum(dim=1)
        predicted.append(votes.sort(dim=1, descending=True).indices[:, 0])
    return torch.cat(predicted)


def lightly_loop(train: Features, test: Features, neighbours: list[int] = NEIGHBOURS) -> Predicted:
    """Call lightly's knn_predict, on batches of 256 test images, as its KNNClassifier does."""
    knn_predict = lightly_function()
    arrays = (split.layers["avgpool"].astype(np.float32) for split in (train, test))
    bank, queries = (F.normalize(torch.from_numpy(array), dim=1) for array in arrays)
    bank, labels = bank.t().contiguous(), torch.from_numpy(train.labels)

    def predicted(k: int) -> np.ndarray:
        ranked = [knn_predict(batch, bank, labels, CLASSES, k, TEMPERATURE) for batch in queries.split(256)]
        return torch.cat(ranked)[:, 0].numpy()

    return {k: predicted(k) for k in neighbours}


def lightly_function() -> Callable[..., torch.Tensor]:
    """Return knn_predict of lightly, without the training framework that importing its package wants."""
    path = Path(LIGHTLY.origin).parent / "utils/benchmarking/knn.py"
    spec = importlib.util.spec_from_file_location("lightly_knn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.knn_predict


def float64(train: Features, test: Features) -> Predicted:
    """Rank all pairs in float64."""
    bank = train.layers["avgpool"].astype(np.float64)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(test.labels), 500):
            queries = test.layers["avgpool"][start : start + 500].astype(np.float64)
            queries /= np.linalg.norm(queries, axis=1, keepdims=True)
            similarity = torch.from_numpy(queries @ bank.T).sort(dim=1, descending=True, stable=True)
            yield similarity.values[:, :K].numpy(), similarity.indices[:, :K].numpy()

    return voted(train.labels, blocks())


METHODS: dict[str, Method] = {"ours": ours}
if faiss:
    METHODS["faiss IndexFlatIP"] = flat_index
METHODS["MMSelfSup's chunks"] = published
if LIGHTLY:
    METHODS["lightly's batches"] = lightly_loop
    METHODS["lightly's batches, k = 200"] = partial(lightly_loop, neighbours=[K])


if __name__ == "__main__":
    main()
