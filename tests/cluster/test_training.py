"""A pretraining on Slurm that loses its place: to its time limit, to a more urgent job, or with its node."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cluster import Cluster, Run, running, until

BACKBONE = "results/tiny/tiny/backbone.safetensors"
STEPS, STEP = 40, 0.25  # of at least so many seconds: ten for what a test does meanwhile


def pretraining(gpus: int = 0, nodes: int = 1) -> dict[str, Any]:
    """Return the config block of one model that is pretrained in STEPS steps."""
    recipe = {
        "architecture": "resnet18_w0.125",
        "epochs": STEPS // 10,
        "batch_size": 6,
        "projector": [16, 8],
        "warmup_epochs": 1,
        "augmentation": {"image_size": 32},
    }
    return {"tiny": {"gpus": gpus, "nodes": nodes, "pretrain": recipe}}


def log(clone: Path) -> str:
    path = clone / "results/tiny/tiny/logs/pretrain.log"
    return path.read_text() if path.exists() else ""


def trains(cluster: Cluster, clone: Path, run: Run) -> str:
    """Wait until the training has made steps; return the job's number."""
    until(lambda: "\nstep " in log(clone) or run.process.poll() is not None, "it trains")
    (job,) = cluster.jobs(states="running")
    return job


def goes_on(clone: Path) -> int:
    """Wait until the training has started again; return the step that it goes on from."""
    found = until(lambda: re.search(r"going on after step (\d+)", log(clone)), "it goes on")
    return int(found[1])


def trained_to_the_end(clone: Path, run: Run) -> None:
    assert run.ends() == 0, run.said
    record = json.loads((clone / BACKBONE).with_name("pretrain.json").read_text())
    assert record["steps"] == STEPS
    assert run.said.count("has been submitted with SLURM jobid") == 1  # what goes on is the same job


def test_a_time_limit_ends_no_training(idle, clone, configured):
    hold = clone / "hold"
    arguments = (BACKBONE, *configured(pretraining(gpus=2)), "--set-resources", "pretrain:runtime=1")
    with running(idle, clone, *arguments, step_seconds=STEP, hold=hold) as run:
        job = trains(idle, clone, run)
        hold.touch()
        until(lambda: "SIGALRM: stopping" in log(clone), "its minute is nearly over")
        hold.unlink()
        assert goes_on(clone) > 0
        idle("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # one turn more is enough
        trained_to_the_end(clone, run)


def test_a_training_makes_way_for_an_urgent_job_and_goes_on_after_it(idle, clone, configured):
    arguments = (BACKBONE, *configured(pretraining(gpus=2, nodes=2)))
    with running(idle, clone, *arguments, step_seconds=STEP) as run:
        job = trains(idle, clone, run)
        urgent = ("-p", "urgent", "-w", "gn2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
        idle("sbatch", *urgent)
        until(lambda: idle.jobs()[job] == "PENDING", "the training has made way")
        assert goes_on(clone) > 0
        trained_to_the_end(clone, run)


def test_a_training_goes_on_elsewhere_when_its_node_dies(idle, clone, configured):
    arguments = (BACKBONE, *configured(pretraining()))
    with running(idle, clone, *arguments, step_seconds=STEP, save_seconds=0) as run:
        job = trains(idle, clone, run)
        work = clone / "results/tiny/tiny/work/pretrain"
        until(lambda: list(work.glob("*/checkpoint-*.pt")), "a state is saved")
        node = idle("squeue", "-h", "-j", job, "-o", "%N")
        idle.script("crash", node)
        # Slurm notices by itself within a minute.
        idle("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")
        assert goes_on(clone) > 0
        assert idle("squeue", "-h", "-j", job, "-o", "%N") not in ("", node)
        trained_to_the_end(clone, run)


def test_jobs_of_a_snakemake_that_was_killed_are_not_started_twice(idle, clone, configured):
    other = {"other": {"gpus": 0, "random_init": {"architecture": "resnet18_w0.125"}}}
    arguments, earlier = (BACKBONE, *configured(pretraining() | other)), set(idle.jobs())
    hold = clone / "hold"
    with running(idle, clone, *arguments, step_seconds=STEP, hold=hold) as run:
        job = trains(idle, clone, run)
        hold.touch()  # until there has been time for all that follows
        run.process.kill()
    with running(idle, clone, *arguments) as locked:
        assert locked.ends() == 1
    assert "--unlock" in locked.said
    with running(idle, clone, *arguments, "--unlock") as unlocking:
        assert unlocking.ends() == 0
    with running(idle, clone, *arguments) as refused:
        assert refused.ends() == 1
    assert f"left jobs in Slurm: {job} (pretrain tiny, running)" in refused.said
    assert f"scancel {job}" in refused.said
    assert set(idle.jobs()) - earlier == {job}
    with running(idle, clone, BACKBONE.replace("/tiny/b", "/other/b"), *arguments[1:]) as apart:
        assert apart.ends() == 0, apart.said  # what is not in the queue may run
    assert idle.jobs()[job] == "RUNNING"

    hold.unlink()
    until(lambda: idle.jobs()[job] == "COMPLETED", "the training has ended by itself")
    with running(idle, clone, *arguments) as done:
        assert done.ends() == 0
    assert "Nothing to be done" in done.said
    assert len(set(idle.jobs()) - earlier) == 2  # the other's is the second


def test_what_a_killed_snakemake_left_incomplete_is_done_again(idle, clone, configured):
    arguments = (BACKBONE, *configured(pretraining()))
    with running(idle, clone, *arguments, step_seconds=STEP) as run:
        job = trains(idle, clone, run)
        run.process.kill()
    idle("scancel", job)
    until(lambda: idle.jobs()[job] == "CANCELLED", "the training was cancelled")
    with running(idle, clone, *arguments, "--unlock") as unlocking:
        assert unlocking.ends() == 0
    with running(idle, clone, *arguments) as run:
        assert goes_on(clone) > 0
        trained_to_the_end(clone, run)
