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


def jobs_from(folder: Path) -> dict[str, str]:
    """Return number → rule and state of the jobs that Snakemake sent to Slurm from `folder`, not ended yet.

    Empty where there is no Slurm, or none that answers.
    """
    if shutil.which("squeue") is None:
        return {}
    command = ["squeue", "--me", "--noheader", "--format", "%i|%T|%k|%Z"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    found = {}
    for row in said.splitlines():
        job, state, comment, place = row.split("|", 3)
        if comment.startswith(("rule_", "group_")) and os.path.realpath(place) == os.path.realpath(folder):
            found[job] = f"{comment.replace('_wildcards_', ' ')}, {state.lower()}"
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
