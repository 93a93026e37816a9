"""What the tests of trained classifiers share: a few images in ImageNet's layout, and a small backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from simclr import config, datasets
from simclr.checkpoint import Backbone, random_init


@pytest.fixture(scope="session")
def few_images(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., datasets.Dataset]:
    """`few_images(train, val)`: so many images of each of the ten classes of the miniature ImageNet."""

    def make(train: int, val: int) -> datasets.Dataset:
        folder = tmp_path_factory.mktemp("few")
        for split, count in (("train", train), ("val", val)):
            for wnid in sorted((demo_data / "imagenet" / split).iterdir()):
                (folder / "root" / split / wnid.name).mkdir(parents=True)
                for image in sorted(wnid.iterdir())[:count]:
                    (folder / "root" / split / wnid.name / image.name).symlink_to(image)
        counts = {"train": 10 * train, "val": 10 * val}
        block = config.Dataset(root=folder / "root", classes=10, images=counts, decode=0)
        datasets.verify("imagenet", block, folder / "imagenet.json")
        return datasets.Dataset.open(folder / "imagenet.json")

    return make


@pytest.fixture(scope="session")
def small_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """An eighth of a ResNet-18, at random weights."""
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    random_init(config.RandomInit(architecture="resnet18_w0.125"), path)
    return Backbone.open(path)
