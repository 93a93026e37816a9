"""`snakemake --profile slurm all` to its end, with jobs of every kind, against the same on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import Cluster, running

RECIPE = {
    "architecture": "resnet18_w0.125",
    "epochs": 2,
    "batch_size": 20,
    "projector": [16, 8],
    "warmup_epochs": 1,
    "augmentation": {"image_size": 48},
}
MODELS = {
    "pair": {"gpus": 2, "pretrain": RECIPE},
    "apart": {"gpus": 4, "nodes": 2, "pretrain": RECIPE},
}
KINDS = {  # rule → nodes, GPUs
    "dataset": (1, 0),
    "pretrain": (1, 2),
    "pretrain_over_nodes": (2, 4),
    "features": (1, 1),
    "imagenet_knn_record": (1, 1),
    "convert_backbone": (1, 0),
}


def record(clone: Path, model: str, without: set[str]) -> dict[str, Any]:
    content = json.loads((clone / f"results/tiny/{model}/imagenet_knn.json").read_text())
    return {key: value for key, value in content.items() if key not in {"seconds", "hardware", *without}}


def kinds(cluster: Cluster, earlier: set[str]) -> dict[str, tuple[int, int]]:
    """Return rule → nodes and GPUs of the jobs since."""
    columns = "JobID:|,Comment:|,NumNodes:|,tres-per-job:|,tres-per-node:|"
    found = {}
    for row in cluster("squeue", "--noheader", "--states=all", "--Format", columns).splitlines():
        job, comment, nodes, of_job, of_node, _ = row.split("|")
        if job not in earlier:
            rule = comment.removeprefix("rule_").split("_wildcards_")[0]
            found[rule] = int(nodes), count(of_job) + int(nodes) * count(of_node)
    return found


def count(gpus: str) -> int:
    """Return how many GPUs `gres:gpu:2` are; "N/A" is none."""
    return int(gpus.rpartition(":")[2]) if ":" in gpus else 0


def test_the_page_comes_from_jobs_of_every_kind_with_the_numbers_of_a_local_run(idle, clone, configured):
    earlier = set(idle.jobs())
    arguments = configured(MODELS)
    manifest = clone / "results/tiny/datasets/imagenet.json"
    manifest.unlink()  # to be verified again, by a job
    with running(idle, clone, "all", *arguments, "--jobs", "4") as run:
        assert run.ends() == 0, run.said
    assert kinds(idle, earlier) == KINDS
    assert "pair" in (clone / "results/tiny/model_zoo.md").read_text()
    on_nodes, of_pair = (record(clone, name, {"model", "checkpoint_sha256"}) for name in ("apart", "pair"))
    assert on_nodes == of_pair

    on_cluster = record(clone, "pair", set())
    (clone / "results/tiny").rename(clone / "results/of_the_cluster")
    local = [sys.executable, "-m", "snakemake", "results/tiny/pair/imagenet_knn.json", *arguments]
    call = subprocess.run(local, cwd=clone, env=idle.environment, capture_output=True, text=True)
    assert call.returncode == 0, call.stdout + call.stderr
    assert record(clone, "pair", set()) == on_cluster
