"""What a run of the workflow costs: the plan before it, the summary after it. No job is run or asked here."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from simclr import BadInput, results

HOUR = 3600
SLOWEST = 10
CAUSE = re.compile(r"simclr: |[\w.]*(Error|Exception|Interrupt)\b")
LAUNCHER = re.compile(r"torch.distributed.elastic|^srun: error")


@dataclass(frozen=True)
class Planned:
    """A job that is to run: its step, its GPUs, and how long it may take or, of earlier ones, took."""

    step: str
    gpus: int
    limit: float  # seconds
    earlier: float | None = None  # seconds that this job took before, or its like for other models

    @property
    def seconds(self) -> float:
        return self.limit if self.earlier is None else self.earlier


@dataclass(frozen=True)
class Finished:
    """A job that was run: what it was called, and what Snakemake's benchmark file says of it."""

    name: str
    gpus: int
    cores: int
    seconds: float
    cpu_seconds: float | None  # None: too short to be sampled
    memory_mb: float | None  # largest resident set


def plan(jobs: Iterable[Planned]) -> str:
    """Return a table of jobs, hours and GPU-hours step by step, in the order of `jobs`, and their sums."""
    jobs = list(jobs)
    steps = {job.step: [other for other in jobs if other.step == job.step] for job in jobs}
    rows = [
        (step, len(each), _span({job.gpus for job in each}), *_hours(each), _basis(each))
        for step, each in steps.items()
    ]
    rows.append(("total", len(jobs), "", *_hours(jobs), ""))
    heading = ("plan", "jobs", "GPUs each", "job-hours", "GPU-hours", "estimated from")
    return _table([heading, *rows], left={0, 5})


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _hours(jobs: list[Planned]) -> tuple[str, str]:
    return (
        _number(sum(job.seconds for job in jobs) / HOUR),
        _number(sum(job.gpus * job.seconds for job in jobs) / HOUR),
    )


def _basis(jobs: list[Planned]) -> str:
    measured = sum(job.earlier is not None for job in jobs)
    if measured == 0:
        return "the recipe: at most"
    return "earlier runs" if measured == len(jobs) else f"earlier runs ({measured} of {len(jobs)} jobs)"


def summary(jobs: Iterable[Finished], wall: float) -> str:
    """Return jobs, time, GPU-hours and efficiency of a run of `wall` seconds, and its slowest ten jobs.

    Efficiency is CPU time per second and core that jobs held, of those that were long enough to be sampled.
    """
    jobs = list(jobs)
    sampled = [job for job in jobs if job.cpu_seconds is not None]
    held = sum(job.cores * job.seconds for job in sampled)
    used = sum(job.cpu_seconds for job in sampled)
    line = (
        f"{len(jobs)} jobs done in {clock(wall)}: {clock(sum(job.seconds for job in jobs))} of work, "
        f"{_number(sum(job.gpus * job.seconds for job in jobs) / HOUR)} GPU-hours"
    )
    if held:
        line += f", CPUs used to {100 * used / held:.0f} %"
    slowest = sorted(jobs, key=lambda job: -job.seconds)[:SLOWEST]
    rows = [
        (job.name, clock(job.seconds), job.gpus, job.cores, _efficiency(job), _gigabytes(job.memory_mb))
        for job in slowest
    ]
    heading = ("slowest", "time", "GPUs", "cores", "CPUs used", "memory")
    return f"{line}\n{_table([heading, *rows], left={0})}"


def _efficiency(job: Finished) -> str:
    return "" if job.cpu_seconds is None else f"{100 * job.cpu_seconds / (job.cores * job.seconds):.0f} %"


def _gigabytes(megabytes: float | None) -> str:
    return "" if megabytes is None else f"{megabytes / 1000:.1f} GB"


def measured(path: Path) -> dict[str, float | None] | None:
    """Return what a benchmark file of Snakemake measured, by column; None where there is no whole file.

    `s` are seconds, `cpu_time` CPU seconds, `max_rss` MB; of a job that was too short they are None, but `s`.
    """
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        row = next(csv.DictReader(file, delimiter="\t"), None)
    if row is None or not row.get("s"):
        return None
    return {key: None if value in ("NA", "-", "", None) else _float(value) for key, value in row.items()}


def _float(value: str) -> float | None:
    return None if ":" in value else float(value)


def took(times: Path) -> float | None:
    """Return the seconds of an earlier run of the job with the benchmark file `times`; None without any.

    Of a job that ran in turns the file has the last alone; those of a record may be of all.
    """
    last = measured(times)
    return max(last["s"] if last else 0, _worked(times.parent.parent / f"{times.stem}.json")) or None


def _worked(record: Path) -> float:
    """Return the seconds that a record has of all turns of its job; 0 where it, or what it says, has none."""
    try:
        if record.name == "pretrain.json":
            return results.read(record, results.Pretraining).seconds
        details = results.read(record).details
    except BadInput:
        return 0
    return HOUR * details.get("gpu_hours", 0) / details.get("processes", 1)


def last_line(log: Path) -> str | None:
    """Return the line of a log that tells how it ended; None of an empty log, or where there is none.

    That is the last line that says anything; or, above what `torchrun` or `srun` reports of a failed process,
    the sentence of this program, or the exception, that it failed of.
    """
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    lines = [line.strip() for line in lines if line.strip(" =-\r")]
    reported = next((i for i, line in enumerate(lines) if LAUNCHER.search(line)), len(lines))
    causes = [line for line in lines[:reported] if CAUSE.match(line)]
    return (causes if causes and reported < len(lines) else lines or [None])[-1]


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.2g}"


def _table(rows: list[tuple[object, ...]], left: set[int]) -> str:
    """Return rows as aligned columns, those in `left` to the left, under a rule below the first."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if i in left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
