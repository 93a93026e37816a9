"""Jobs that fail, are cancelled, or of which Slurm knows nothing; and Snakemake itself that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from cluster import HERE, running, until

UNTRAINED = {"tiny": {"gpus": 0, "random_init": {"architecture": "resnet18_w0.125"}}}
SMALL = ("--snakefile", str(HERE / "Snakefile"), "--workflow-profile", "workflow/profiles/default")


def started(clone: Path, seconds: int) -> list[str]:
    """Return the jobs that have begun to sleep so long."""
    path = clone / f"started_{seconds}"
    return path.read_text().split() if path.exists() else []


# ---------------------------------------------------------------- memory


def test_a_job_over_its_memory_limit_gets_more(idle, clone):
    with running(idle, clone, *SMALL, "eaten/600.txt") as run:
        assert run.ends() == 0, run.said
    assert run.said.count("has been submitted") == 2
    assert "mem_mb=800" in run.said


def test_a_job_that_never_has_enough_memory_ends_with_rule_log_and_limit(idle, clone):
    with running(idle, clone, *SMALL, "eaten/3000.txt") as run:
        assert run.ends() == 1
    assert run.said.count("has been submitted") == 3
    assert (
        "eat 3000 failed at attempt 3: over its memory limit of 1200 MB; give more with --set-resources "
        "eat:mem_mb=…; log: logs/eat_3000.log\n"
    ) in run.said
    assert not (clone / "eaten/3000.txt").exists()


# ---------------------------------------------------------------- scancel


def test_a_job_that_is_cancelled_by_hand_is_reported_as_cancelled(idle, clone):
    with running(idle, clone, *SMALL, "slept/100.txt", "--retries", "0") as run:
        (job,) = until(lambda: started(clone, 100), "it sleeps")
        idle("scancel", job)
        assert run.ends() == 1
    assert f"SLURM-job '{job}' failed, SLURM status is: 'CANCELLED'" in run.said
    assert "sleep 100 failed at attempt 1: cancelled; log: logs/sleep_100.log" in run.said
    assert not (clone / "slept/100.txt").exists()


# ---------------------------------------------------------------- Snakemake killed


def test_snakemake_that_is_terminated_waits_for_its_jobs_and_a_restart_repeats_none(idle, clone):
    with running(idle, clone, *SMALL, "after/12.txt") as run:
        until(lambda: started(clone, 12), "it sleeps")
        run.process.send_signal(signal.SIGTERM)
        assert run.ends() == 1
    assert (clone / "slept/12.txt").exists()
    assert not (clone / "after/12.txt").exists()
    with running(idle, clone, *SMALL, "after/12.txt") as run:
        assert run.ends() == 0, run.said
    assert len(started(clone, 12)) == 1


# ---------------------------------------------------------------- status


def squeue(folder: Path, script: str) -> dict[str, str]:
    """Return the environment of a Snakemake that asks `script`, in which $SQUEUE is the real squeue."""
    program = folder / "programs/squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nSQUEUE={shutil.which('squeue')}\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_a_status_that_slurm_does_not_know_is_no_success(idle, clone, tmp_path):
    environment = squeue(tmp_path, "$SQUEUE \"$@\" | sed 's/|FAILED$/|UNKNOWN/'")
    arguments = ("eaten/3000.txt", "--retries", "0", "--latency-wait", "1")
    with running(idle, clone, *SMALL, *arguments, environment=environment) as run:
        assert run.ends() == 1
    assert "MissingOutputException" in run.said
    assert "eaten/3000.txt" in run.said


def test_no_job_is_forgotten_while_slurm_does_not_answer(idle, clone, tmp_path):
    mute, asked = tmp_path / "mute", tmp_path / "asked"
    environment = squeue(tmp_path, f'[ ! -e {mute} ] || {{ echo >> {asked}; exit 1; }}\nexec $SQUEUE "$@"')
    with running(idle, clone, *SMALL, "slept/10.txt", environment=environment) as run:
        until(lambda: started(clone, 10), "it sleeps")
        mute.touch()
        until(lambda: asked.exists() and len(asked.read_text()) > 10, "Slurm was asked in vain")
        mute.unlink()
        assert run.ends() == 0, run.said
    assert len(started(clone, 10)) == 1


# ---------------------------------------------------------------- a benchmark that fails


def test_a_benchmark_that_fails_leaves_the_others_and_the_page(idle, clone, configured):
    linear = {"image_size": 32, "resize": 32, "batch_size": 16, "epochs": 1}
    arguments = configured(UNTRAINED, imagenet_knn={"neighbours": [1000]}, imagenet_linear=linear)
    with running(idle, clone, "results/tiny/model_zoo.md", *arguments, "--retries", "0") as run:
        assert run.ends() == 1
    assert (clone / "results/tiny/tiny/imagenet_linear.json").exists()
    assert not (clone / "results/tiny/tiny/imagenet_knn.json").exists()
    page = (clone / "results/tiny/model_zoo.md").read_text()
    assert "imagenet_knn: no record yet; the log of imagenet_knn ends: simclr:" in page
    assert "imagenet_linear: no record" not in page


# ---------------------------------------------------------------- a full disk


def test_a_full_disk_is_said_and_leaves_nothing_half_written(idle, clone, configured):
    arguments = configured(UNTRAINED, output=str(idle.small_disk))
    backbone = idle.small_disk / "tiny/backbone.safetensors"
    with running(idle, clone, str(backbone), *arguments, "--retries", "0") as run:
        assert run.ends() == 1
    assert "No space left on device" in run.said
    assert "Traceback" not in run.said
    assert list(backbone.parent.glob("*backbone*")) == []
