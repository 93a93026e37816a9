"""What a run says of itself: the plan before it, and when it ends the summary and the page."""

import os
import re
import time
from functools import cache
from pathlib import Path
from statistics import median

from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

import simclr.jobs
import simclr.model_zoo
import simclr.slurm


def step(job):
    """Return the name of what a job does, as the page and `python -m simclr` call it."""
    return job.rule.name.removesuffix("_record").removesuffix("_over_nodes")


def held(job, resource):
    """Return a resource of a job as a number; 0 where it asks for none."""
    return int(job.resources.get(resource, 0))


def job_gpus(job):
    """Return the GPUs of a job, over all of its nodes."""
    of_a_node = re.search(r"\bgpu(:[^:,]+)?:(\d+)", str(job.resources.get("gres", "")))
    return held(job, "gpu") or (max(1, held(job, "nodes")) * int(of_a_node[2]) if of_a_node else 0)


def job_cores(job):
    """Return the cores of a job, over all of its nodes, where the profile or the rule says so; else its threads."""
    per_gpu = held(job, "cpus_per_gpu") * job_gpus(job)
    return held(job, "cpus_per_task") * max(1, job_gpus(job)) or per_gpu or job.threads


took_before = cache(simclr.jobs.took)  # of a job with this benchmark file


@cache
def took_for_others(place, gpus):
    """Return the median of the seconds in the benchmark files at `place` of all models with so many GPUs, or None."""
    alike = [name for name, model in CONFIG.models.items() if model.gpus == gpus]
    times = [took_before(CONFIG.output / name / place) for name in alike]
    return median([seconds for seconds in times if seconds is not None] or [None])


def earlier(job):
    """Return the seconds that a job took before, or else its like for other models, or None.

    What another model's pretraining took tells nothing.
    """
    path, model = Path(str(job.benchmark)), job.wildcards_dict.get("model")
    seconds = took_before(path)
    if seconds is not None or model is None or step(job) == "pretrain":
        return seconds
    return took_for_others(path.relative_to(CONFIG.output / model), CONFIG.models[model].gpus)


def planned(job):
    """Return what a job that is to run will take."""
    # By attempt 0 all of it, in however many turns the site's limit makes it run.
    whole = job.rule.expand_resources(job.wildcards, job.input, attempt=0).get("runtime", 0)
    return simclr.jobs.Planned(step(job), job_gpus(job), 60 * whole, earlier(job) if job.benchmark else None)


def finished(job):
    """Return what a job of this run took; None of one that was not run to its end in it."""
    path = Path(str(job.benchmark))
    if not (job.benchmark and path.is_file() and path.stat().st_mtime >= workflow.start_time.timestamp()):
        return None
    took = simclr.jobs.measured(path)
    name = " ".join([step(job), *job.wildcards_dict.values()])
    return took and simclr.jobs.Finished(
        name, job_gpus(job), job_cores(job), took["s"], took["cpu_time"], took["max_rss"]
    )


def in_page_order(jobs):
    """Return jobs, those of groups too, but for those that only name targets, in the order of the Snakefile."""
    order = list(workflow.rules)
    single = (each for job in jobs for each in getattr(job, "jobs", [job]))
    return sorted((job for job in single if job.rule.log), key=lambda job: order.index(job.rule))


@cache
def plan():
    """Return the plan of this run; a dry run says it twice."""
    jobs = in_page_order(workflow.dag.needrun_jobs(exclude_finished=False))
    return simclr.jobs.plan(map(planned, jobs))


def with_plan(record):
    """Add the plan to what Snakemake says before a run, dry or not: its table of jobs."""
    if getattr(record, "event", None) == LogEvent.RUN_INFO:
        record.msg = f"{record.msg}\n{plan()}\n"
    return True


def joined(job):
    """Return the wildcards of a job as the Slurm plugin joins them."""
    return "_".join(job.wildcards_dict.values())


def refuse_twice():
    """Raise where a job that this run needs is in Slurm already, sent by a Snakemake that works or was killed.

    Of an array of jobs Slurm knows the wildcards of the first alone, so it is taken for all jobs of its rule; of a
    group its name and its rules, so it is taken for all jobs of a group of this name.
    """
    try:
        there = simclr.slurm.jobs_from(Path.cwd())
    except simclr.BadInput as error:
        if workflow.local_exec:
            return
        raise WorkflowError(str(error))
    jobs = list(workflow.dag.needrun_jobs())
    mine = {(job.rule.name, joined(job)) for job in jobs} | {(job.rule.name, None) for job in jobs}
    groups = tuple(f"{job.group}_" for job in jobs if job.group)
    left = [job for job in there if (job.rule, job.wildcards) in mine or job.rule.startswith(groups)]
    if left:
        listing = "; ".join(f"{job.number} ({job.rule} {job.wildcards or ''}, {job.state})" for job in left)
        raise WorkflowError(
            f"Another run in this folder, or an earlier one, left jobs in Slurm: {listing}. Wait for them; or, if no "
            f"other run is alive, stop them with `scancel {' '.join(job.number for job in left)}`, which costs a "
            "training no more than a step. Then give the same command again."
        )


def slurm_log(job):
    """Return the newest of the logs that Slurm itself wrote of a job; it need not exist."""
    folder = Path(".snakemake/slurm_logs") / f"rule_{job.rule.name}" / joined(job)
    return max(folder.glob("*.log"), key=lambda log: log.stat().st_mtime, default=folder / "none.log")


def say_failures():
    """Say of each job that failed to the last what it was, why, and where more stands."""
    for job in in_page_order(workflow.scheduler.failed):
        limits = held(job, "mem_mb"), held(job, "runtime")
        cause = simclr.slurm.cause_of_death(slurm_log(job), job.rule.name, *limits)
        name = " ".join([job.rule.name, *job.wildcards_dict.values()])
        last = simclr.jobs.last_line(Path(job.log[0])) if job.log else None
        why = cause or last or "it did not start, for what Slurm said above"
        logger.error(f"{name} failed at attempt {job.attempt}: {why}; log: {', '.join(job.log)}")


def say_summary():
    """Say what this run took."""
    jobs = [job for job in map(finished, in_page_order(workflow.dag.jobs)) if job]
    if jobs:
        logger.info(simclr.jobs.summary(jobs, wall=time.time() - workflow.start_time.timestamp()))


def make_page():
    """Make the page from the records that exist, unless a job did, with the reason for each that does not; say where.

    Not after a run that was for data alone.
    """
    if all(job.rule.name in ("demo", "dataset", "datasets") for job in workflow.dag.jobs):
        return
    records = [Path(path) for path in page_records() if os.path.exists(path)]
    page = CONFIG.output / "model_zoo.md"
    try:
        if not any(job.rule.name.startswith("model_zoo") for job in workflow.dag.finished_jobs):
            simclr.model_zoo.model_zoo(records, CONFIG, Path("results/published.yaml"), page)
    except simclr.BadInput as error:
        logger.error(f"The page was not made: {error}")
    else:
        logger.info(f"The page: {page}")


logger.addFilter(with_plan)


onstart:
    refuse_twice()
