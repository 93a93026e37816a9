"""What jobs ask for, as functions of the config and of the attempt, and how each is started with it."""

import os
from functools import cache
from math import inf
from pathlib import Path

from snakemake_executor_plugin_slurm.partitions import PartitionLimits, read_partition_file

PARTITIONS = "workflow/profiles/slurm/partitions.yaml"
PROFILE = {name: each.raw for name, each in (workflow.resource_settings.default_resources or {}).items()}
CORES_PER_GPU = PROFILE.get("cpus_per_gpu", 8)  # most of them are to decode images
if not isinstance(CORES_PER_GPU, int) or CORES_PER_GPU < 1:
    raise WorkflowError(f"cpus_per_gpu: expected a whole number of cores, at least 1, found {CORES_PER_GPU}")
ON_CLUSTER = "cpus_per_gpu" in PROFILE or not workflow.local_exec  # a dry run knows the profile alone
# Of a machine, for a training on the CPU, so that other jobs go on beside it.
HALF_THE_CORES = 4 if ON_CLUSTER else max(1, min(4, workflow.cores // 2))
CPU = 0.01  # of the speed of a GPU
DEPTH = {18: 0.44, 34: 0.9, 50: 1.0}  # operations of a ResNet for an image, those of ResNet-50 being 1


# ---------------------------------------------------------------- GPUs and cores


def gpus(wildcards):
    """Return the GPUs that pretraining the model takes; 0 is the CPU."""
    return CONFIG.models[wildcards.model].gpus


def nodes(wildcards):
    """Return the nodes that pretraining the model takes."""
    return CONFIG.models[wildcards.model].nodes


def node_gpus(wildcards):
    """Return the GPUs of a job that divides its work over those of one node."""
    return gpus(wildcards) // nodes(wildcards)


def gpu(wildcards):
    """Return the GPUs of a job that cannot divide its work: one, or none for a model on the CPU."""
    return min(1, gpus(wildcards))


def no_gpu(wildcards):
    return 0


def dividing_gpus(name):
    """Return a function of the wildcards: GPUs of one node, as many as divide the benchmark's batch evenly."""

    def most(wildcards):
        config = getattr(CONFIG.benchmarks, name)
        batch = getattr(config, "images_per_iteration", None) or config.batch_size
        return max((n for n in range(1, node_gpus(wildcards) + 1) if batch % n == 0), default=0)

    return most


def feature_gpus(wildcards):
    """Return the GPUs that extract the features of a split: one more for each 100,000 images, on one node."""
    return min(node_gpus(wildcards), 1 + images(wildcards.dataset, wildcards.split) // 100_000)


# Limits jobs on this machine alone, not those on a cluster.
resource_scopes:
    gpu_jobs="local",


def take_turns_on_this_machine():
    """Have one job at a time use GPUs where no Slurm gives each its own, and all take the first; or `gpu_jobs`."""
    if "gpu_jobs" not in workflow.global_resources:
        workflow.global_resources["gpu_jobs"] = 1
    for each in workflow.rules:
        if "gpu" in each.resources:
            each.resources["gpu_jobs"] = gpu


def cores(gpus):
    """Return a function of the wildcards: the cores of a job on so many GPUs; on the CPU, one."""
    return lambda wildcards: CORES_PER_GPU * gpus(wildcards) or 1


# ---------------------------------------------------------------- memory and time


@cache
def partitions():
    """Return the limits of the site's partitions, from the file by which the executor chooses one for each job.

    None within a job, where nothing is asked of the site any more.
    """
    if workflow.remote_exec:
        return []
    named = getattr(workflow.executor_settings, "partition_config", None)  # unknown to a dry run
    path = Path(named or os.environ.get("SNAKEMAKE_SLURM_PARTITIONS") or PARTITIONS)
    if not named and not path.is_file():
        return []
    try:
        limits = [each.limits for each in read_partition_file(path)]
    except (TypeError, ValueError, KeyError, WorkflowError) as error:
        raise WorkflowError(f"{path}: {error}")
    for each in limits:
        if isinstance(each.max_mem_mb, str):
            raise WorkflowError(f"{path}: max_mem_mb: expected a number of MB, found {each.max_mem_mb}")
    return limits


@cache
def partition(gpus, nodes=1):
    """Return the limits of the partition that gives so many GPUs of each node most time and, of equal ones, most memory.

    They are infinite where none says any. Raises where none has these GPUs, but on a machine without Slurm.
    """
    fitting = [each for each in partitions() if (each.max_gpu > 0) == (gpus > 0)]
    if gpus:
        fitting = [each for each in fitting if takes(each, gpus, nodes)]
        if partitions() and not fitting and ON_CLUSTER:
            raise WorkflowError(
                f"no partition takes {nodes} nodes with {gpus} GPUs and {CORES_PER_GPU} cores for each: the largest "
                f"max_gpu is {max(each.max_gpu for each in partitions())}; give the model fewer `gpus:` or more "
                "`nodes:`, or correct the file of the partitions"
            )
    return max(fitting, key=lambda each: (each.max_runtime, each.max_mem_mb), default=PartitionLimits())


def takes(limits, gpus, nodes):
    """Return whether a partition takes a job of so many GPUs of each of its nodes."""
    return limits.max_gpu >= gpus and limits.max_nodes >= nodes and limits.max_cpus_per_gpu >= CORES_PER_GPU


def place(gpus, wildcards):
    """Return how many GPUs of a node a job takes of so many, and how many nodes."""
    of_a_node = min(gpus, node_gpus(wildcards)) if gpus else 0
    return of_a_node, gpus // of_a_node if gpus else 1


def megabytes(fixed, per_gpu=0, gpus=no_gpu):
    """Return a function of the job: megabytes of one of its nodes, more with every attempt, within the site's limit."""

    def asked(wildcards, attempt):
        of_a_node, nodes = place(gpus(wildcards), wildcards)
        wanted = number(fixed, wildcards) + per_gpu * of_a_node
        return min(attempt * wanted, partition(of_a_node, nodes).max_mem_mb)

    return asked


def minutes(images=0, per_second=1, gpus=None, on=no_gpu):
    """Return a function of the job: the minutes that so many images take, and ten for everything else.

    More with every attempt, within the site's limit; all of them, whatever the limit, for attempt 0. Where `gpus`
    are given, `per_second` is of one that runs ResNet-50; `on` are those of a job whose time they do not change.
    """

    def asked(wildcards, attempt):
        taken = gpus(wildcards) if gpus else 0
        speed = per_second * (taken or CPU) / operations(wildcards) if gpus else per_second
        whole = 10 + int(number(images, wildcards) / speed / 60)
        limits = partition(*place(taken or on(wildcards), wildcards))
        return min(attempt * whole, limits.max_runtime) if attempt else whole

    return asked


def number(amount, wildcards):
    """Return an amount that may be a function of the wildcards."""
    return amount(wildcards) if callable(amount) else amount


def operations(wildcards):
    """Return the operations of the model's backbone for an image, those of ResNet-50 being 1."""
    model = CONFIG.models[wildcards.model]
    depth, _, width = getattr(model, model.source).architecture.removeprefix("resnet").partition("_w")
    return DEPTH[int(depth)] * float(width or 1) ** 2


def images(dataset, *splits):
    """Return how many images these splits of a dataset have; without splits, all of them."""
    counts = CONFIG.dataset(dataset).images
    return sum(counts[split] for split in splits or counts)


def pretrained_on(wildcards):
    """Return how many images pretraining the model sees."""
    return images("imagenet", "train") * CONFIG.models[wildcards.model].pretrain.epochs


def trained_on(name):
    """Return a function of the wildcards: how many images training for a benchmark sees."""

    def seen(wildcards):
        config = getattr(CONFIG.benchmarks, name)
        if hasattr(config, "epochs"):
            return images(config.dataset, "train") * config.epochs
        return config.iterations * config.batch_size * getattr(config, "trials", 1)

    return seen


# ---------------------------------------------------------------- processes


def python(wildcards, resources):
    """Return what starts one process; `resources` keeps it out of what is compared."""
    hidden = "" if resources.gpu else "CUDA_VISIBLE_DEVICES= "  # on the CPU, also where there is a GPU
    return f"{hidden}python"


def python_of_gpus(wildcards, resources):
    """Return what starts one process that starts one per GPU of the job itself; for `resources` see `python`.

    A machine without Slurm shows every job all of its GPUs.
    """
    return f"SIMCLR_GPUS={resources.gpu} python" if resources.gpu else python(wildcards, resources)


def launcher(wildcards, resources):
    """Return what starts a process per GPU of one node; for `resources` see `python`."""
    if resources.gpu <= 1:
        return python(wildcards, resources)
    # As an option it would be unknown to torch 2.8, and torchrun overwrites TORCHELASTIC_SIGNALS_TO_HANDLE.
    signals = "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1"
    return f"{signals} torchrun --standalone --nproc-per-node={resources.gpu}"


def launcher_over_nodes(wildcards, resources):
    """Return what starts a process per GPU on each of the nodes of the job; for `resources` see `python`.

    The processes meet where `simclr.distributed` says, which holds after a requeue on other nodes, too.
    """
    return (
        f"{resources.mpi} --nodes={resources.nodes} --ntasks-per-node={node_gpus(wildcards)}"
        f" --cpus-per-task={resources.cpus_per_task} --kill-on-bad-exit=1 python"
    )
