"""What the tests on a real Slurm share: the cluster, a clone of the repository, and a small config."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, until
from test_workflow import make_clone

from simclr import config, datasets

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skip where no Slurm can be started."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("only root can start nodes that have their own processes and mounts")
    own = "mount -t tmpfs tmpfs /mnt && mknod /mnt/null c 1 3"
    command = ["unshare", "--uts", "--mount", "--pid", "--fork", "sh", "-c", own]
    call = subprocess.run(command, capture_output=True, text=True)
    if call.returncode:
        pytest.skip(f"root may not have namespaces, mounts and devices here: {call.stderr.strip()}")


@pytest.fixture(scope="session")
def cluster(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of two CPU nodes and two nodes of two fake GPUs each, for the whole session."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.small_disk.mkdir()
    # Before the nodes start: they see no mount that comes later.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", cluster.small_disk], check=True)
    try:
        cluster.script("start")
        yield cluster
    finally:
        cluster.script("stop")
        subprocess.run(["umount", cluster.small_disk], check=True)


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


# ---------------------------------------------------------------- a small config


@pytest.fixture(scope="session")
def images(few_images: Callable[..., datasets.Dataset]) -> dict[str, Any]:
    """The config block of an ImageNet with six training images of each of ten classes."""
    root = few_images(6, 4).root.resolve()
    return {"root": str(root), "classes": 10, "images": {"train": 60, "val": 40}}


@pytest.fixture
def configured(clone: Path, images: dict[str, Any]) -> Callable[..., tuple[str, str]]:
    """(models, benchmarks) → the arguments that name a config of them; the data is verified already."""

    def written(
        models: dict[str, Any], output: str = "results/tiny", **benchmarks: dict[str, Any]
    ) -> tuple[str, str]:
        content = {
            "output": output,
            "datasets": {"imagenet": images},
            "features": {"imagenet": {"resize": 48, "crop": 48, "pooling": "adaptive"}},
            "models": models,
            "benchmarks": benchmarks or {"imagenet_knn": {"neighbours": [1]}},
        }
        (clone / "config/tiny.yaml").write_text(yaml.safe_dump(content))
        datasets.verify("imagenet", config.Dataset(**images), clone / output / "datasets/imagenet.json")
        return "--configfile", "config/tiny.yaml"

    return written
