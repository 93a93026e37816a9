"""What the tests share: the miniature datasets, made once per run, and openers for them.

Tests that are marked `gpu` run with `pytest -m gpu`. Without it every test is on the CPU, also where there
is a GPU: there, two runs of one training are equal bit for bit.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from simclr import config, datasets, demo

DEMO_CONFIG = Path(__file__).parent.parent / "config/demo.yaml"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; run with `pytest -m gpu`")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and pytest -m gpu"))


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of the miniature datasets; the workers of pytest-xdist share one."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "demo_data"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            demo.make(folder)
    return folder


@pytest.fixture(scope="session")
def demo_block(demo_data: Path) -> Callable[[str], config.Dataset]:
    """name → its block in config/demo.yaml, with the root in `demo_data`."""
    content = yaml.safe_load(DEMO_CONFIG.read_text())

    def block(name: str) -> config.Dataset:
        values = content["datasets"][name]
        root = demo_data / Path(values["root"]).relative_to(content["demo_data"])
        return config.Dataset(**{**values, "root": root}).completed(name)

    return block


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


@pytest.fixture
def dataset(demo_block: Callable[[str], config.Dataset], tmp_path: Path) -> Callable[[str], datasets.Dataset]:
    """name → the miniature dataset, verified and opened."""

    def opened(name: str) -> datasets.Dataset:
        manifest = tmp_path / "manifests" / f"{name}.json"
        if not manifest.exists():
            datasets.verify(name, demo_block(name), manifest)
        return datasets.Dataset.open(manifest)

    return opened
