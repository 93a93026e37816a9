"""ImageNet Nearest-Neighbor Classification: a weighted vote of the k most similar training images.

Protocol: MMSelfSup v0.11.0, tools/benchmarks/classification/knn_imagenet/test_knn.py and
mmselfsup/models/utils/knn_classifier.py: average-pooled features, cosine similarity, a neighbour of
similarity s votes exp(s / temperature) for its class. Exact, over the whole training set, in float32 as
published; votes are summed in float64. Training images of equal similarity are ranked by their index, classes
of equal votes by their number.

One deviation: features are stored as float16 by default (`features.imagenet.dtype`), where the published
ones are float32; the products are float32. On the miniature that changes top-1 by one image of 400 at most
(tests/speed/float16.py); the effect has not been measured at ImageNet scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field, PositiveInt

from simclr import BadInput
from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from tqdm import tqdm

    from simclr.features import Features

TITLE = "ImageNet Nearest-Neighbor Classification"

COLUMNS = {
    "k10": Column("k=10"),
    "k20": Column("k=20"),
    "k100": Column("k=100"),
    "k200": Column("k=200"),
}

NOTE = "the published features are float32; similarities are computed in float32 from those of either type"

LAYER = "avgpool"
SPLITS = "train", "val"

# Images of one matrix product, training by test: large enough for the full speed of the processor or GPU.
TRAIN_ROWS, TEST_ROWS = 16_384, 2_048

# Bytes that a search may take, on the CPU or the GPU, however many the images; ImageNet takes a third of it.
MEMORY = 6_000_000_000

# Similarities that are looked at together, by their highest.
GROUP = 32


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

    Raises `BadInput` for a k beyond the training set, labels that do not fit, and features that are not of
    ImageNet's two splits or were not made in one way.
    """
    import numpy as np

    from simclr.metrics import label_rank

    _check(train, test, config)
    train_labels, classes = np.asarray(train.labels), int(np.max(train.labels)) + 1
    ranks = {k: [] for k in config.neighbours}
    found = nearest(train.layers[LAYER], test.layers[LAYER], max(config.neighbours), progress=True)
    rows = 0
    for similarity, index in found:
        labels = np.asarray(test.labels[rows : rows + len(index)])
        rows += len(index)
        for k in config.neighbours:
            votes = vote(similarity[:, :k], train_labels[index[:, :k]], classes, config.temperature)
            ranks[k].append(label_rank(votes, labels))
    metrics = Metrics()
    for k, parts in ranks.items():
        rank = np.concatenate(parts)
        metrics[f"k{k}"] = 100 * float((rank < 1).mean())
        metrics[f"k{k}_top5"] = 100 * float((rank < 5).mean())
    return metrics


def classify(train: Tensor, labels: Tensor, test: Tensor, k: int, temperature: float = 0.07) -> Tensor:
    """Return the class `(M,)` int64, on the CPU, that the k nearest of `train` `(N, D)` give `test` `(M, D)`.

    `labels` `(N,)` are those of `train`, on whose device the search runs. Raises `BadInput` for a k beyond
    the training set.
    """
    import torch

    if not 0 < k <= len(train):
        raise BadInput(f"k: expected 1 to {len(train)} neighbours, as many as training images; found {k}")
    labels = labels.cpu().numpy()
    classes = int(labels.max()) + 1
    found = nearest(train.detach(), test.detach(), k)
    votes = (vote(similarity, labels[index], classes, temperature) for similarity, index in found)
    return torch.cat([torch.from_numpy(part.argmax(axis=1)) for part in votes])


def vote(similarity: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Return the votes `(m, classes)` of neighbours with `similarity` and `labels` `(m, k)`, k ≥ 1.

    They are exp(similarity / temperature) over that of the nearest, which keeps them finite.
    """
    import numpy as np
    import torch

    similarity = similarity.astype(np.float64)
    weights = np.exp((similarity - similarity.max(axis=1, keepdims=True)) / temperature)
    votes = torch.zeros(len(labels), classes, dtype=torch.float64)
    return votes.scatter_add_(1, torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(weights)).numpy()


def _check(train: Features, test: Features, config: Config) -> None:
    import numpy as np

    from simclr.features import check_splits

    check_splits(train, test, config.dataset, SPLITS, [LAYER])
    for split, features in (("train", train), ("test", test)):
        if features.labels.ndim != 1 or len(features.labels) == 0:
            raise BadInput(f"{split} labels: expected one class per image; found {features.labels.shape}")
        if features.labels.dtype.kind not in "iu" or np.min(features.labels) < 0:
            raise BadInput(
                f"{split} labels: expected class numbers from 0; found {features.labels.dtype} from "
                f"{np.min(features.labels)}; extract the features again"
            )
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


# ---------------------------------------------------------------- the search


class Tiling(NamedTuple):
    """How a search is cut: the images of one product, and the test images held while `train` is read."""

    train_rows: int
    test_rows: int
    held_rows: int


def tiling(train_images: int, test_images: int, width: int, k: int, memory: int = MEMORY) -> Tiling:
    """Return the tiling of a search whose `footprint` is at most `memory` bytes.

    Half of them hold test images, so that `train` is read as seldom as can be; a quarter each is for a block
    of training images and for a tile of similarities.
    """
    train_rows = balanced(train_images, min(TRAIN_ROWS, memory // 4 // _of_a_training_image(width)), GROUP)
    test_rows = balanced(test_images, min(TEST_ROWS, memory // 4 // _of_a_row(train_rows, k)))
    held_rows = balanced(test_images, memory // 2 // _of_a_test_image(width, k))
    return Tiling(train_rows, min(test_rows, held_rows), held_rows)


def footprint(tiles: Tiling, width: int, k: int) -> int:
    """Return the bytes that a search of features of `width` numbers takes at its highest."""
    return (
        tiles.train_rows * _of_a_training_image(width)
        + tiles.test_rows * _of_a_row(tiles.train_rows, k)
        + tiles.held_rows * _of_a_test_image(width, k)
    )


def _of_a_training_image(width: int) -> int:
    """Return the bytes of its features, as read and in float32."""
    return (4 + 4) * width


def _of_a_row(train_rows: int, k: int) -> int:
    """Return the bytes of a tile's row of similarities: themselves, a copy, and both sorted with indices."""
    return 32 * train_rows + 40 * k


def _of_a_test_image(width: int, k: int) -> int:
    """Return the bytes of its features in float32, and of similarity and index of its neighbours, twice."""
    return 4 * width + 2 * (4 + 8) * k


def balanced(rows: int, most: int, multiple: int = 1) -> int:
    """Return the size, at most `most` but at least `multiple`, of equal parts of `rows`; a `multiple`."""
    most = max(most // multiple, 1) * multiple
    parts = -(-rows // most)
    return -(-rows // (parts * multiple)) * multiple


def nearest(
    train: np.ndarray | Tensor,
    test: np.ndarray | Tensor,
    k: int,
    tiles: Tiling | None = None,
    progress: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for successive blocks of `test` `(M, D)`, the cosine similarities (float32) and the indices
    (int64) `(m, k)` of the k ≤ N most similar rows of `train` `(N, D)`: the most similar first, then the
    lower index.

    Arrays, memory-mapped or not, are searched on the GPU where there is one, tensors where they are.
    `train` is read once per `tiles.held_rows` test images; nothing of size (M, N) is made.
    """
    import torch
    from tqdm import tqdm

    from simclr import devices

    device = train.device if isinstance(train, torch.Tensor) else devices.first()
    tiles = tiles or tiling(len(train), *test.shape, k)
    bar = tqdm(
        total=len(train) * len(test),
        unit=" pairs",
        unit_scale=True,
        mininterval=1,
        disable=not progress,
    )
    with bar:
        for first in range(0, len(test), tiles.held_rows):
            queries = torch.empty(len(test[first : first + tiles.held_rows]), test.shape[1], device=device)
            for part in _slices(len(queries), tiles.train_rows):
                _load(test, slice(first + part.start, first + part.stop), queries[part])
            values, index = _search(train, queries, k, tiles, bar)
            for part in _slices(len(queries), tiles.test_rows):
                ranked, order = values[part].sort(dim=1, descending=True, stable=True)
                yield ranked.cpu().numpy(), index[part].gather(1, order).cpu().numpy()


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _search(
    train: np.ndarray | Tensor, queries: Tensor, k: int, tiles: Tiling, bar: tqdm
) -> tuple[Tensor, Tensor]:
    """Return similarity and index `(m, k)` of the k nearest of `train` to `queries` `(m, D)`, by index."""
    import torch

    values = queries.new_full((len(queries), k), -torch.inf)
    index = torch.full((len(queries), k), -1, device=queries.device)
    block = queries.new_empty(tiles.train_rows, queries.shape[1])
    product = queries.new_empty(tiles.test_rows, tiles.train_rows)
    for images in _slices(len(train), tiles.train_rows):
        count = images.stop - images.start
        _load(train, images, block)
        for part in _slices(len(queries), tiles.test_rows):
            similarity = torch.mm(queries[part], block.T, out=product[: part.stop - part.start])
            similarity[:, count:] = -torch.inf  # what pads the last block is no image
            _offer(values[part], index[part], similarity, images.start)
            bar.update(len(similarity) * count)
    return values, index


def _load(features: np.ndarray | Tensor, rows: slice, block: Tensor) -> None:
    """Write `rows` of `features` into `block`, at unit length in float32; zeros follow the last one.

    All products with a block have one shape, so that equal training images get equal similarities wherever
    they stand.
    """
    import torch

    from simclr.features import copied

    if isinstance(features, torch.Tensor):
        found = features[rows]
    else:
        found = torch.from_numpy(copied(features, rows)).to(block.device)
    block[: len(found)] = found
    block[len(found) :] = 0
    block /= torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(1e-12)


def _offer(values: Tensor, index: Tensor, similarity: Tensor, start: int) -> None:
    """Let the columns of `similarity` `(m, n)`, images `start` …, compete for the k best `(m, k)`, in place.

    The k best are kept in the order of `index`, all of which are below `start`, so the first of equal ones is
    that of the lowest index.
    """
    import torch

    k = values.shape[1]
    candidates, columns = _candidates(similarity, values.amin(dim=1, keepdim=True), k)
    best, chosen = first_highest(torch.cat([values, candidates], dim=1), k)
    index[:] = torch.cat([index, columns + start], dim=1).gather(1, chosen)
    values[:] = best


def _candidates(similarity: Tensor, lowest: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what is above `lowest` `(m, 1)` and among the k highest of its row in `similarity` `(m, n)`, and
    more, with its columns and in their order.

    Once most images have been seen, few are near: of each row those groups of columns are taken whose highest
    is above `lowest`, or the next best, as many as the row with most of them has.
    """
    import torch

    groups = similarity.unflatten(1, (-1, GROUP))
    peaks = groups.amax(dim=2)
    hot = int((peaks > lowest).sum(dim=1).max())
    if 3 * hot > peaks.shape[1]:
        return first_highest(similarity, k)
    chosen = peaks.topk(hot, dim=1).indices.sort(dim=1).values[:, :, None]
    columns = chosen * GROUP + torch.arange(GROUP, device=similarity.device)
    return groups.gather(1, chosen.expand(-1, -1, GROUP)).flatten(1), columns.flatten(1)


def first_highest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of each row of `values` `(m, n)` and their columns, in the order of the columns.

    They are all n where k ≥ n. Of equal values the first ones are taken; `topk` leaves that open, so rows in
    which it matters are sorted.
    """
    highest, columns = values.topk(min(k + 1, values.shape[1]), dim=1)
    if values.shape[1] > k:
        open_rows = (highest[:, k - 1] == highest[:, k]).nonzero().flatten()
        columns = columns[:, :k]
        if len(open_rows):
            ranked = values[open_rows].sort(dim=1, descending=True, stable=True)
            columns[open_rows] = ranked.indices[:, :k]
    columns = columns.sort(dim=1).values
    return values.gather(1, columns), columns
