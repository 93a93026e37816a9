"""What Slurm is asked: how long this job may run, to queue it again, what is in its queue; why a job died."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from simclr import BadInput

MISSING = 127  # exit status of a program that is not there, as of a shell
ATTEMPTS, PAUSE = 5, 10  # while Slurm does not answer, and the seconds between two
REFUSED = re.compile("invalid job id|disabled|denied", re.IGNORECASE)  # Slurm does answer, but not as hoped
LEAD = 300  # seconds before the job's end for a step and a checkpoint; a tenth of its time where that is less


def seconds_left() -> float | None:
    """Return the seconds until this job should stop, to end before its time limit; None without a limit.

    There is none outside a job of Slurm either.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    status, answer = ask_again("squeue", "--noheader", "--jobs", job, "--format", "%S %e")
    if status:
        print(f"the time limit of job {job} is not watched: {answer}", file=sys.stderr)
        return None
    try:
        start, end = (datetime.fromisoformat(text).timestamp() for text in answer.split())
    except ValueError:  # "N/A"
        return None
    return end - min(LEAD, (end - start) / 10) - time.time()


def requeue() -> None:
    """Queue this very job again, which ends it; say so, or why Slurm refuses."""
    job = os.environ["SLURM_JOB_ID"]
    status, answer = ask_again("scontrol", "requeue", job)
    said = f"is not queued again: {answer}" if status else "is queued again: its time limit is near"
    print(f"job {job} {said}", file=sys.stderr)


def ask_again(*command: str) -> tuple[int, str]:
    """Do as `ask` until Slurm answers, some times: what a job asks only once must not fail by chance."""
    for _ in range(ATTEMPTS - 1):
        status, answer = ask(*command)
        if status in (0, MISSING) or REFUSED.search(answer):
            return status, answer
        time.sleep(PAUSE)
    return ask(*command)


def ask(*command: str) -> tuple[int, str]:
    """Run one of Slurm's programs; return its exit status, and what it said."""
    try:
        call = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # as in most containers
        return MISSING, f"there is no {command[0]} here"
    return call.returncode, (call.stderr if call.returncode else call.stdout).strip()


class Queued(NamedTuple):
    """A job that Snakemake sent to Slurm; of an array it does not know which `wildcards` are whose."""

    number: str
    state: str
    rule: str
    wildcards: str | None


def jobs_from(folder: Path) -> list[Queued]:
    """Return the jobs that Snakemake sent to Slurm from `folder` and that have not ended, nor are about to.

    Empty where there is no Slurm. Raises `BadInput` when Slurm does not answer.
    """
    status, answer = ask("squeue", "--me", "--noheader", "--format", "%i|%T|%k|%Z")
    if status == MISSING:
        return []
    if status:
        raise BadInput(
            f"Slurm does not say which jobs run ({answer}), and so not whether this run would start one "
            "twice; give the same command again when `squeue` answers"
        )
    found = []
    for row in answer.splitlines():
        number, state, comment, place = row.split("|", 3)
        mine = comment.startswith("rule_") and os.path.realpath(place) == os.path.realpath(folder)
        if mine and state != "COMPLETING":
            rule, _, wildcards = comment.removeprefix("rule_").partition("_wildcards_")
            found.append(Queued(number, state.lower(), rule, None if "_" in number else wildcards))
    return found


def cause_of_death(log: Path, rule: str, memory_mb: int, minutes: int) -> str | None:
    """Return which limit of a job of `rule` Slurm names in its own `log`, and what to type; None for none.

    What the job itself says goes to the log of the rule. Where Slurm appends to `log`, it also says how
    earlier turns ended; that the job was queued again does not count.
    """
    said = log.read_text(errors="replace") if log.is_file() else ""
    if re.search("exceeded memory limit|oom[-_ ]?kill|out of memory", said, re.IGNORECASE):
        return f"over its memory limit of {memory_mb} MB; give more with --set-resources {rule}:mem_mb=…"
    if "DUE TO TIME LIMIT" in said:
        return f"over its time limit of {minutes} minutes; give more with --set-resources {rule}:runtime=…"
    if re.search(
        r"(JOB|STEP) \S+ ON \S+ CANCELLED AT \S+ (?!DUE TO (JOB REQUEUE|PREEMPTION|NODE FAILURE))", said
    ):
        return "cancelled"
    return None
