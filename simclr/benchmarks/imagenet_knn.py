"""ImageNet Nearest-Neighbor Classification: a weighted vote of the k most similar training images.

Protocol: MMSelfSup v0.11.0, tools/benchmarks/classification/knn_imagenet/test_knn.py and
mmselfsup/models/utils/knn_classifier.py: average-pooled features, cosine similarity, a neighbour of
similarity s votes exp(s / temperature) for its class. Exact, over the whole training set.

One deviation: features are stored as float16 by default (`features.imagenet.dtype`), where the published
ones are float32; the products are float32. The effect has not been measured at ImageNet scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveInt

from simclr import BadInput
from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from simclr.features import Features

TITLE = "ImageNet Nearest-Neighbor Classification"

COLUMNS = {
    "k10": Column("k=10"),
    "k20": Column("k=20"),
    "k100": Column("k=100"),
    "k200": Column("k=200"),
}

LAYER = "avgpool"

# Rows of one matrix product, and test rows held at a time. They bound the memory (2 GB at most for 2,048
# features), whatever the number of images. Every product has the same shape, the last ones padded with
# zeros, so that equal training images get equal similarities wherever they stand.
TRAIN_ROWS, TEST_ROWS, TEST_ROWS_HELD = 16_384, 1_024, 65_536


class Config(Protocol):
    """Defaults are the published protocol, but for the features' float16."""

    dataset: ClassVar[str] = "imagenet"

    neighbours: list[PositiveInt] = Field(
        [10, 20, 100, 200], min_length=1, description="k: how many training images vote (test_knn.py)."
    )
    temperature: float = Field(
        0.07, gt=0, description="Of the votes exp(similarity / temperature) (test_knn.py; others use 0.1)."
    )


def evaluate(train: Features, test: Features, config: Config) -> Metrics:
    """Return top-1 (`k10`, …) and top-5 accuracy (`k10_top5`, …) in percent for every k.

    Training images of equal similarity are ranked by their index, classes of equal votes by their number.
    Raises `BadInput` for a k beyond the training set, or a test label that no training image has.
    """
    import numpy as np

    from simclr.metrics import label_rank

    _check(train, test, config)
    classes = int(np.max(train.labels)) + 1
    ranks = {k: [] for k in config.neighbours}
    rows = 0
    for similarity, index in nearest(train.layers[LAYER], test.layers[LAYER], max(config.neighbours)):
        labels = np.asarray(test.labels[rows : rows + len(index)])
        rows += len(index)
        for k in config.neighbours:
            votes = vote(similarity[:, :k], train.labels[index[:, :k]], classes, config.temperature)
            ranks[k].append(label_rank(votes, labels))
    metrics = Metrics()
    for k, parts in ranks.items():
        rank = np.concatenate(parts)
        metrics[f"k{k}"] = 100 * float((rank < 1).mean())
        metrics[f"k{k}_top5"] = 100 * float((rank < 5).mean())
    return metrics


def _check(train: Features, test: Features, config: Config) -> None:
    import numpy as np

    for split, features in (("train", train), ("test", test)):
        if LAYER not in features.layers:
            raise BadInput(f"{split} features have no {LAYER}, only {', '.join(features.layers)}")
        if features.labels.ndim != 1 or len(features.labels) == 0:
            raise BadInput(f"{split} labels: expected one class per image; found {features.labels.shape}")
    widths = [features.layers[LAYER].shape[1] for features in (train, test)]
    if widths[0] != widths[1]:
        raise BadInput(f"{LAYER}: train features are {widths[0]} wide, test features {widths[1]}")
    images = len(train.labels)
    if max(config.neighbours) > images:
        raise BadInput(
            f"k = {max(config.neighbours)} neighbours are more than the {images} training images; "
            "lower benchmarks.imagenet_knn.neighbours"
        )
    unknown = np.setdiff1d(test.labels, train.labels)
    if len(unknown):
        raise BadInput(
            f"test label {unknown[0]} is not a label of any training image; are both of one dataset?"
        )


def nearest(
    train: np.ndarray,
    test: np.ndarray,
    k: int,
    train_rows: int = TRAIN_ROWS,
    test_rows: int = TEST_ROWS,
    test_rows_held: int = TEST_ROWS_HELD,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for successive blocks of `test` `(M, D)`, the cosine similarities and the indices `(m, k)` of
    the k most similar rows of `train` `(N, D)`, the most similar first, then the lower index.

    `train` is read once per `test_rows_held` test rows; nothing of size (M, N) is made.
    """
    for start in range(0, len(test), test_rows_held):
        held = test[start : start + test_rows_held]
        queries = list(_blocks(held, test_rows))
        best = [None] * len(queries)
        for first, count, bank in _blocks(train, train_rows):
            for number, (_, _, query) in enumerate(queries):
                values, columns = top((query @ bank.T)[:, :count], k)
                best[number] = merge(best[number], (values, columns + first), k)
        for (_, count, _), (similarity, index) in zip(queries, best, strict=True):
            yield similarity[:count].cpu().numpy(), index[:count].cpu().numpy()


def _blocks(rows: np.ndarray, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the first row, the number of rows, and the rows at unit length in float32, padded to `size`."""
    import numpy as np
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        block = np.zeros((size, rows.shape[1]), dtype=np.float32)
        block[: len(part)] = part
        yield first, len(part), torch.nn.functional.normalize(torch.from_numpy(block).to(device), dim=1)


def top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of each row of `similarity` `(m, n)`, and their columns; ties: the lower column.

    `topk` leaves open which of several equal columns it takes: rows in which that matters are sorted.
    """
    k = min(k, similarity.shape[1])
    values, columns = similarity.topk(k, dim=1)
    open_rows = ((similarity >= values[:, -1:]).sum(dim=1) > k).nonzero().flatten()
    if len(open_rows):
        ranked = similarity[open_rows].sort(dim=1, descending=True, stable=True)
        values[open_rows], columns[open_rows] = ranked.values[:, :k], ranked.indices[:, :k]
    columns, order = columns.sort(dim=1)
    values, again = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, again)


def merge(
    before: tuple[Tensor, Tensor] | None, after: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """Return the k best of two ranked lists; the indices of `before` are all lower than those of `after`."""
    import torch

    if before is None:
        return after
    values, order = torch.cat([before[0], after[0]], dim=1).sort(dim=1, descending=True, stable=True)
    return values[:, :k], torch.cat([before[1], after[1]], dim=1).gather(1, order[:, :k])


def vote(similarity: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Return the votes `(m, classes)` of neighbours with `similarity` and `labels` `(m, k)`."""
    import numpy as np
    import torch

    weights = torch.from_numpy(np.exp(similarity.astype(np.float64) / temperature))
    votes = torch.zeros(len(labels), classes, dtype=torch.float64)
    return votes.scatter_add_(1, torch.from_numpy(labels.astype(np.int64)), weights).numpy()
