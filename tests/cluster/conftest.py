"""What the tests on a real Slurm share: the cluster, a clone of the repository, and a small pretraining."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import Cluster, until
from PIL import Image
from test_workflow import make_clone

from simclr import config, datasets

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
IMAGES = 64


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skip where no Slurm can be started."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("only root can start nodes that have their own processes and mounts")


@pytest.fixture(scope="session")
def cluster(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of two CPU nodes and two nodes of two fake GPUs each, for the whole session."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.script("start")
        yield cluster
    finally:
        cluster.script("stop")


@pytest.fixture
def idle(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, all nodes up and without a job, before and after the test."""
    cluster.script("start")
    yield cluster
    cluster("scancel", "--quiet", "--signal=KILL", "--full", "--user=root")
    cluster("scancel", "--quiet", "--user=root")
    until(lambda: not cluster.jobs(states="running,pending,completing"), "the jobs have ended")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a fresh clone."""
    return make_clone(tmp_path)


# ---------------------------------------------------------------- a small pretraining


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet of two classes in 32 pixels."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 4)):
        for i in range(count):
            path = root / split / ("n00000001", "n00000002")[i % 2] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(path)
    (root / "meta").mkdir()
    (root / "meta/val.txt").write_text("".join(f"n0000000{i % 2 + 1}/{i}.JPEG {i % 2}\n" for i in range(4)))
    return root


@pytest.fixture
def tiny(clone: Path, images: Path) -> Callable[..., tuple[str, str]]:
    """(steps, gpus) → the arguments that name a config of one model, `tiny`; its data is verified already."""

    def written(steps: int, gpus: int = 0) -> tuple[str, str]:
        block = {"root": str(images), "classes": 2, "images": {"train": IMAGES, "val": 4}}
        recipe = {
            "architecture": "resnet18_w0.125",
            "epochs": steps // 8,
            "batch_size": IMAGES // 8,
            "projector": [16, 8],
            "warmup_epochs": 1,
            "augmentation": {"image_size": 32},
        }
        content = {
            "output": "results/tiny",
            "datasets": {"imagenet": block},
            "features": {"imagenet": {"resize": 32, "crop": 32, "pooling": "adaptive"}},
            "models": {"tiny": {"gpus": gpus, "pretrain": recipe}},
            "benchmarks": {"imagenet_knn": {"neighbours": [1]}},
        }
        (clone / "config/tiny.yaml").write_text(yaml.safe_dump(content))
        datasets.verify("imagenet", config.Dataset(**block), clone / "results/tiny/datasets/imagenet.json")
        return "--configfile", "config/tiny.yaml"

    return written
