"""What Slurm is asked: how long this job may run, to queue it again, what is in its queue; why a job died."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from simclr import BadInput

LEAD = 300  # seconds before the job's end for a step and a checkpoint; a tenth of its time where that is less


def seconds_left() -> float | None:
    """Return the seconds until this job should stop, to end before its time limit; None without a limit.

    There is none outside a job of Slurm either.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%S %e"]
    said = subprocess.run(command, capture_output=True, text=True)
    try:
        start, end = (datetime.fromisoformat(text).timestamp() for text in said.stdout.split())
    except ValueError:  # "N/A"; or Slurm does not answer
        if said.returncode:
            print(f"the time limit of job {job} is not watched: {said.stderr.strip()}", file=sys.stderr)
        return None
    return end - min(LEAD, (end - start) / 10) - time.time()


def requeue() -> None:
    """Queue this very job again, which ends it; say so, or why Slurm refuses."""
    job = os.environ["SLURM_JOB_ID"]
    said = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if said.returncode:
        print(f"job {job} is not queued again: {said.stderr.strip()}", file=sys.stderr)
    else:
        print(f"the time limit of job {job} is near; it is queued again", file=sys.stderr)


def jobs_from(folder: Path) -> dict[str, tuple[str, str]]:
    """Return number → (rule and wildcards, state) of the jobs in Slurm that Snakemake sent from `folder`.

    Jobs that have ended, or are about to, are not among them. Empty where there is no Slurm. Raises
    `BadInput` when Slurm does not answer.
    """
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--format", "%i|%T|%k|%Z"]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        raise BadInput(
            f"Slurm does not say which jobs run ({said.stderr.strip()}), and so not whether this run would "
            "start one twice; give the same command again when `squeue` answers"
        )
    found = {}
    for row in said.stdout.splitlines():
        job, state, comment, place = row.split("|", 3)
        mine = comment.startswith("rule_") and os.path.realpath(place) == os.path.realpath(folder)
        if mine and state != "COMPLETING":
            rule, _, wildcards = comment.removeprefix("rule_").partition("_wildcards_")
            found[job] = f"{rule} {wildcards}".strip(), state.lower()
    return found


def cause_of_death(log: Path, rule: str, memory_mb: int, minutes: int) -> str | None:
    """Return which limit of a job of `rule` Slurm names in its own `log`, and what to type; None for none.

    What the job itself says goes to the log of the rule.
    """
    said = log.read_text(errors="replace") if log.is_file() else ""
    if re.search("exceeded memory limit|oom[-_ ]?kill|out of memory", said, re.IGNORECASE):
        return f"over its memory limit of {memory_mb} MB; give more with --set-resources {rule}:mem_mb=…"
    if "DUE TO TIME LIMIT" in said:
        return f"over its time limit of {minutes} minutes; give more with --set-resources {rule}:runtime=…"
    if re.search(r"(JOB|STEP) \S+ ON \S+ CANCELLED AT", said):
        return "cancelled"
    return None
