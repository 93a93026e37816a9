"""What tests of trained classifiers and of segmentation share: a small backbone; predictions and scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from simclr import config, datasets
from simclr.checkpoint import Backbone, random_init


@pytest.fixture(scope="session")
def small_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """An eighth of a ResNet-18, at random weights."""
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    random_init(config.RandomInit(architecture="resnet18_w0.125"), path)
    return Backbone.open(path)


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Image path → class numbers `(H, W)`, of every image that a segmentation benchmark tests meanwhile."""
    from simclr.benchmarks._segmentation import AreaMetric

    found, process = {}, AreaMetric.process

    def seen(self, data_batch, data_samples):
        for sample in data_samples:
            found[sample["img_path"]] = sample["pred_sem_seg"]["data"].squeeze().numpy()
        return process(self, data_batch, data_samples)

    monkeypatch.setattr(AreaMetric, "process", seen)
    return found


@pytest.fixture
def scores_of_maps() -> Callable[[np.ndarray, np.ndarray, int], dict[str, float]]:
    """`scores_of_maps(truth, prediction, classes)`: mIoU, mAcc, aAcc in percent by a confusion matrix."""

    def scores(truth: np.ndarray, prediction: np.ndarray, classes: int) -> dict[str, float]:
        confusion = np.zeros((classes, classes), int)
        for t, p in zip(truth.ravel(), prediction.ravel(), strict=True):
            if t != 255:
                confusion[t, p] += 1
        right, true, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        iou = [right[c] / (true[c] + said[c] - right[c]) for c in range(classes) if true[c] + said[c]]
        accuracy = [right[c] / true[c] for c in range(classes) if true[c]]
        return {
            "miou": 100 * np.mean(iou),
            "macc": 100 * np.mean(accuracy),
            "aacc": 100 * right.sum() / true.sum(),
        }

    return scores


@pytest.fixture
def scores_by_loop(scores_of_maps: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """`scores_by_loop(dataset, predictions)`: as `scores_of_maps`, on masks read from the dataset's lists."""

    def scores(dataset: datasets.Dataset, predictions: dict[str, np.ndarray]) -> dict[str, float]:
        images, masks = datasets.segmentation(dataset, "val")
        truth = np.concatenate([np.asarray(Image.open(mask)).ravel() for mask in masks])
        predicted = np.concatenate([predictions[str(image)].ravel() for image in images])
        return scores_of_maps(truth, predicted, dataset.classes)

    return scores
