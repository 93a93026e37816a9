"""The workflow: which jobs each target has, what an edit reruns, what is refused before any job.

Snakemake is imported once and each call runs in a forked process, in a folder that links to the repository.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from test_page import a_pretraining

from simclr import model_zoo, results
from simclr.__main__ import STEPS, _parser, find, read_block
from simclr.benchmarks import BENCHMARKS, load

ROOT = Path(__file__).parent.parent
DEMO = ("--configfile", "config/demo.yaml")


class Call(NamedTuple):
    status: int
    said: str

    def jobs(self) -> dict[str, int]:
        """Return rule → number of jobs, without the rules that only name targets."""
        table = re.search(r"^Job stats:\n.*?\n(.*?)^total", self.said, re.M | re.S)
        rows = (line.split() for line in table[1].splitlines() if re.search(r" \d+$", line)) if table else ()
        return {rule: int(count) for rule, count in rows if rule not in (*BENCHMARKS, "all")}


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder that looks like a fresh clone."""
    return make_clone(tmp_path)


def make_clone(folder: Path) -> Path:
    for name in ("workflow", "simclr", "envs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "results").mkdir()
    shutil.copy(ROOT / "results/published.yaml", folder / "results")
    return folder


def snakemake(folder: Path, *arguments: str) -> Call:
    """Run `snakemake` with these arguments in `folder`, in a fork of this process."""
    import snakemake.cli

    out = folder / "said.txt"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = out.open("w", buffering=1)
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stdout.fileno(), 2)
            sys.argv[1:] = arguments
            snakemake.cli.main(list(arguments))
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return Call(os.waitstatus_to_exitcode(status), out.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Callable[[], Call]:
    """A clone in which every job of the demo has been done, as far as Snakemake knows."""
    folder = make_clone(tmp_path_factory.mktemp("finished"))
    planned = snakemake(folder, "-n", "all", *DEMO)
    assert planned.status == 0, planned.said
    for line in re.findall(r"^    output: (.*)$", planned.said, re.M):
        for output in map(Path, line.replace(" (update)", "").split(", ")):
            path = folder / output
            if "features" in output.parts:
                path.mkdir(parents=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    assert snakemake(folder, "--touch", "--forceall", "all", *DEMO).status == 0
    return folder


def edited(folder: Path, change: Callable[[dict], None]) -> tuple[str, str]:
    """Write config/demo.yaml, changed, and return the arguments that name it."""
    content = yaml.safe_load((folder / "config/demo.yaml").read_text())
    change(content)
    file = folder / "config/edited.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return "--configfile", "config/edited.yaml"


# ---------------------------------------------------------------- which jobs

GOLDEN_DEMO = {
    "demo": 1,
    "dataset": 8,
    "pretrain": 1,
    "random_init": 1,
    "convert_backbone": 4,
    "features": 8,
    **{f"{name}_record": 2 for name in BENCHMARKS},
    "model_zoo_page": 1,
}
GOLDEN_ZOO = {
    "dataset": 8,
    "pretrain": 4,
    "pretrain_over_nodes": 1,
    "import_checkpoint": 1,
    "random_init": 1,
    "convert_backbone": 14,
    "features": 22,  # both splits: of imagenet for seven models, of voc2007 for four
    **{f"{name}_record": 4 for name in BENCHMARKS},
    "imagenet_linear_record": 7,
    "imagenet_knn_record": 7,
    "model_zoo_page": 1,
}


def test_the_demo_has_these_jobs_and_their_commands_fit_the_steps(clone):
    call = snakemake(clone, "-n", "-p", "all", *DEMO)
    assert call.status == 0, call.said
    assert call.jobs() == GOLDEN_DEMO
    commands = re.findall(
        r"^Shell command: (?:CUDA_VISIBLE_DEVICES= )?python -m simclr (.*?) > \S+ 2>&1$", call.said, re.M
    )
    assert len(commands) == sum(GOLDEN_DEMO.values())
    for step, *arguments in map(shlex.split, commands):
        function = find(STEPS[step][0])
        options = vars(_parser(step, function).parse_args(arguments))
        if "config" in options:
            annotation = function.__annotations__["config"]
            read_block(options["config"], find(f"{function.__module__}:{annotation}"))


@pytest.mark.parametrize("profile", [(), ("--profile", "slurm")], ids=["local", "slurm"])
def test_the_zoo_has_these_jobs_from_the_default_config_without_any_data(clone, profile):
    call = snakemake(clone, *profile, "-n", "all")
    assert call.status == 0, call.said
    assert call.jobs() == GOLDEN_ZOO


def test_no_command_holds_a_path_that_nobody_filled_in(clone):
    call = snakemake(clone, "-n", "-p", "all", *DEMO)
    assert "--work results/demo/simclr/work/pretrain" in call.said
    assert "<results>" not in call.said


def test_a_benchmark_is_a_target_by_name_and_by_record(clone):
    named = snakemake(clone, "-n", "imagenet_knn", *DEMO)
    assert named.jobs() == {
        "demo": 1,
        "dataset": 1,
        "pretrain": 1,
        "random_init": 1,
        "features": 4,
        "imagenet_knn_record": 2,
    }
    one = snakemake(clone, "-n", "results/demo/random_init/imagenet_knn.json", *DEMO)
    assert one.jobs() == {"demo": 1, "dataset": 1, "random_init": 1, "features": 2, "imagenet_knn_record": 1}


def test_detection_takes_the_gpus_that_divide_the_images_of_an_iteration(clone):
    def change(content):
        content["models"]["simclr"].update(gpus=8)
        content["benchmarks"]["voc0712_detection"].update(batch_size=16, images_per_iteration=12)

    records = [f"results/demo/{model}/voc0712_detection.json" for model in ("simclr", "random_init")]
    call = snakemake(clone, "-n", "-p", *records, *edited(clone, change))
    jobs = re.findall(r"^rule voc0712_detection_record:.*?resources: (.*?)$", call.said, re.M | re.S)
    assert sorted(re.search(r"gpu=\d", job)[0] for job in jobs) == ["gpu=0", "gpu=6"]
    # Locally all GPUs are visible: the job says how many are its own.
    starts = re.findall(r"^Shell command: (.*) -m simclr voc0712_detection --model (\w+) ", call.said, re.M)
    assert {model: start for start, model in starts} == {
        "simclr": "SIMCLR_GPUS=6 python",
        "random_init": "CUDA_VISIBLE_DEVICES= python",
    }


CONDA = """#!/bin/sh
case "$*" in
*--version*) echo conda 25.1.0 ;;
*info*) echo '{"conda_prefix": "/nowhere", "platform": "linux-64", "root_prefix": "/nowhere"}' ;;
*) echo '{"get": {"channel_priority": "strict"}, "channel_priority": "strict"}' ;;
esac
"""


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
def test_detection_runs_in_the_environment_of_its_engine(clone, monkeypatch, engine):
    """Detectron2's, of gigabytes, is made only where it is asked for."""

    def change(content):
        content["benchmarks"]["voc0712_detection"]["engine"] = engine

    (clone / "bin").mkdir()
    (clone / "bin/conda").write_text(CONDA)
    (clone / "bin/conda").chmod(0o755)
    monkeypatch.setenv("PATH", f"{clone / 'bin'}:{os.environ['PATH']}")
    record = "results/demo/random_init/voc0712_detection.json"
    call = snakemake(clone, "-n", record, "--software-deployment-method", "conda", *edited(clone, change))
    named = set(re.findall(r"^Conda environment .*envs/(\w+)\.yaml will be created", call.said, re.M))
    assert named == {"simclr"} | ({"detectron2"} if engine == "detectron2" else set()), call.said


def test_a_dry_run_prints_the_plan_with_what_earlier_runs_took(clone):
    arguments = edited(clone, lambda content: content["models"]["simclr"].update(gpus=4, nodes=2))
    times = clone / "results/demo/simclr/times"
    times.mkdir(parents=True)
    for step, seconds in (("pretrain", 7200), ("imagenet_knn", 3600)):
        (times / f"{step}.tsv").write_text(f"s\tcpu_time\tmax_rss\n{seconds}\t{seconds}\t100\n")
    results.write(a_pretraining(seconds=10_800.0), times.parent / "pretrain.json")  # in two turns
    call = snakemake(clone, "-n", "imagenet_knn", *arguments)
    plan = re.search(r"^plan +jobs .*?^total.*?$", call.said, re.M | re.S)[0]
    rows = {line.split()[0]: line.split()[1:] for line in plan.splitlines()}
    assert rows["pretrain"] == ["1", "4", "3", "12", "earlier", "runs"]
    # Another model's, on other GPUs, tells nothing of the one on the CPU.
    assert " ".join(rows["imagenet_knn"]) == "2 0 to 1 1.2 1 earlier runs (1 of 2 jobs)"
    assert rows["random_init"][-4:] == ["the", "recipe:", "at", "most"]
    assert rows["total"][0] == str(sum(call.jobs().values()))


def test_the_plan_takes_a_job_s_own_time_before_that_of_its_like(clone):
    def change(content):
        for name in ("second", "third", "fourth"):
            content["models"][name] = {"random_init": {"architecture": "resnet18_w0.25"}, "gpus": 4}

    arguments = edited(clone, change)
    for model, seconds in (("second", 3600), ("third", 1800), ("fourth", 600)):
        times = clone / f"results/demo/{model}/times"
        times.mkdir(parents=True)
        (times / "imagenet_knn.tsv").write_text(f"s\n{seconds}\n")
    records = [f"results/demo/{model}/imagenet_knn.json" for model in ("second", "third", "fourth")]
    call = snakemake(clone, "-n", *records, *arguments)
    assert re.search(r"^imagenet_knn +3 +1 +1\.7 +1\.7 +earlier runs$", call.said, re.M), call.said


@pytest.mark.parametrize(
    ("gres", "gpus"), [("lscratch:100G", 0), ("lscratch:100", 0), ("gpu:2", 2), ("lscratch:9G,gpu:h100:4", 4)]
)
def test_of_generic_resources_only_gpus_are_gpus(clone, gres, gpus):
    call = snakemake(clone, "-n", "demo", *DEMO, "--set-resources", f"demo:gres={gres}")
    assert re.search(rf"^demo +1 +{gpus} ", call.said, re.M), call.said


def test_a_failed_job_leaves_a_page_that_says_why_and_a_summary(clone):
    def change(content):
        content["models"]["gone"] = {"gpus": 0, "import_checkpoint": {"path": "gone.pth"}}

    backbones = [f"results/demo/{model}/backbone.safetensors" for model in ("gone", "random_init")]
    call = snakemake(clone, *backbones, "--keep-going", *edited(clone, change))
    assert call.status == 1
    assert re.search(r"^1 jobs done in .*\n.*\n.*\nrandom_init random_init +0:", call.said, re.M), call.said
    assert "The page: results/demo/model_zoo.md" in call.said
    page = (clone / "results/demo/model_zoo.md").read_text()
    assert re.search(
        r"^- imagenet_knn: no record yet; the log of import_checkpoint ends: .*gone.pth.*\(gone\)", page, re.M
    ), page
    assert "- imagenet_knn: no record yet (simclr, random_init)" in page


def test_the_default_config_is_not_merged_into_the_given_one(clone):
    arguments = edited(clone, lambda content: content["models"].pop("random_init"))
    assert snakemake(clone, "-n", "imagenet_knn", *arguments).jobs()["imagenet_knn_record"] == 1
    call = snakemake(clone, "-n", "results/demo/random_init/imagenet_knn.json", *arguments)
    assert call.status == 1
    assert "MissingRuleException" in call.said
    moved = snakemake(
        clone, "-n", "elsewhere/simclr/imagenet_knn.json", *DEMO, "--config", "output=elsewhere"
    )
    assert moved.jobs()["imagenet_knn_record"] == 1


# ---------------------------------------------------------------- what runs again


def test_after_everything_is_done_nothing_is_to_be_done(finished):
    assert "Nothing to be done" in snakemake(finished, "-n", "all", *DEMO).said


def test_how_a_machine_runs_a_recipe_trains_nothing_again(finished):
    def change(content):
        content["models"]["simclr"]["execution"] = {"skip_steps": 2, "knn_every": 1}

    assert snakemake(finished, "-n", "all", *edited(finished, change)).jobs() == {"model_zoo_page": 1}


@pytest.mark.parametrize("name", ["imagenet_knn", "voc0712_detection"])
def test_editing_a_block_runs_that_benchmark_and_the_page_again(finished, name):
    arguments = edited(finished, lambda content: content["benchmarks"][name].update(version=99))
    assert snakemake(finished, "-n", "all", *arguments).jobs() == {f"{name}_record": 2, "model_zoo_page": 1}


def test_more_gpus_and_edited_rules_and_environments_train_nothing_again(finished):
    (finished / "workflow").unlink()
    (finished / "envs").unlink()
    shutil.copytree(ROOT / "workflow", finished / "workflow")
    shutil.copytree(ROOT / "envs", finished / "envs")
    for path in [*finished.glob("workflow/rules/*.smk"), *finished.glob("envs/*.yaml")]:
        text = path.read_text().replace("python -m simclr", "python  -m simclr")
        path.write_text(text.replace("dependencies:", "dependencies:\n  - make"))
    arguments = edited(finished, lambda content: content["models"]["simclr"].update(gpus=2))
    call = snakemake(finished, "-n", "all", *arguments)
    assert call.status == 0, call.said
    assert set(call.jobs()) <= {"model_zoo_page"}, call.said


def test_a_wrong_root_costs_no_training(finished):
    manifest = finished / "results/demo/datasets/imagenet.json"
    wrong = edited(finished, lambda c: c["datasets"]["imagenet"].update(root="results/demo/data/imagnet"))
    assert snakemake(finished, str(manifest.relative_to(finished)), *wrong).status == 1
    assert manifest.exists()
    jobs = snakemake(finished, "-n", "all", *DEMO).jobs()
    assert jobs["dataset"] == 1
    assert "pretrain" not in jobs
    assert snakemake(finished, "--touch", "--forceall", "all", *DEMO).status == 0


def test_a_record_stands_without_its_learning_curve(finished):
    curves = [finished / f"results/demo/simclr/imagenet_mhead.{suffix}" for suffix in ("csv", "png")]
    for path in curves:
        path.rename(f"{path}.away")
    assert "Nothing to be done" in snakemake(finished, "-n", "all", *DEMO).said
    for path in curves:
        Path(f"{path}.away").rename(path)


def test_several_gpus_are_one_launch_with_a_process_each(clone):
    arguments = edited(clone, lambda content: content["models"]["simclr"].update(gpus=2))
    call = snakemake(clone, "-n", "-p", "imagenet_mhead", *arguments)
    assert call.status == 0, call.said
    (pair,) = re.findall(r"^Shell command: (.*) -m simclr imagenet_mhead --model simclr ", call.said, re.M)
    assert pair.endswith("torchrun --standalone --nproc-per-node=2")
    (alone,) = re.findall(r"^Shell command: (.*) -m simclr imagenet_mhead --model random", call.said, re.M)
    assert alone == "CUDA_VISIBLE_DEVICES= python"


def test_the_svms_ask_for_no_gpu_and_see_none(clone):
    arguments = edited(clone, lambda content: content["models"]["simclr"].update(gpus=1))
    said = snakemake(clone, "-n", "-p", "voc07_lowshot", *arguments).said
    for name in ("voc07_svm", "voc07_lowshot"):
        found = re.findall(rf"^Shell command: (.*) -m simclr {name} ", said, re.M)
        assert found == ["CUDA_VISIBLE_DEVICES= python"] * 2


def test_several_nodes_are_one_srun_with_a_task_per_gpu(clone):
    def long(content, **machine):  # beyond the ten minutes that the profile gives where a rule says nothing
        content["models"]["simclr"].update(machine)
        content["models"]["simclr"]["pretrain"]["epochs"] = 100_000

    arguments = edited(clone, lambda content: long(content, gpus=4, nodes=2))
    call = snakemake(clone, "--profile", "slurm", "-n", "-p", "imagenet_mhead", *arguments)
    assert call.status == 0, call.said
    (line,) = re.findall(r"^Shell command: (.*) -m simclr pretrain ", call.said, re.M)
    assert line.startswith("srun --nodes=2 --ntasks-per-node=2 --cpus-per-task=8")
    assert line.endswith(" --kill-on-bad-exit=1 python")
    job = re.search(r"^rule pretrain_over_nodes:.*?resources: (.*?)$", call.said, re.M | re.S)[1]
    asked = "gres=gpu:2, nodes=2, tasks_per_node=2, tasks_per_gpu=0, cpus_per_task=8, mpi=srun"
    assert all(each in job for each in asked.split(", ")), job
    alone = edited(clone, lambda content: long(content, gpus=4))
    call_alone = snakemake(clone, "--profile", "slurm", "-n", "imagenet_mhead", *alone)
    minutes = [
        re.search(r"runtime=(\d+)", each)[1] for each in (job, call_alone.said.partition("rule pretrain:")[2])
    ]
    assert minutes[0] == minutes[1]
    # What runs on one node takes the GPUs of one.
    (line,) = re.findall(r"^Shell command: (.*) -m simclr imagenet_mhead --model simclr ", call.said, re.M)
    assert line.endswith("torchrun --standalone --nproc-per-node=2")


@pytest.mark.parametrize(
    ("nodes", "asked"), [(1, r"threads: 48\n"), (2, r"threads: 12\n.*cpus_per_task=12.*--cpus-per-task=12 ")]
)
def test_the_cores_of_each_gpu_are_those_of_the_profile(clone, nodes, asked):
    arguments = edited(clone, lambda content: content["models"]["simclr"].update(gpus=4, nodes=nodes))
    profile = ("--profile", "slurm", "--cores", "99", "--default-resources", "cpus_per_gpu=12")
    call = snakemake(clone, *profile, "-n", "-p", "imagenet_mhead", *arguments)
    assert re.search(rf"^rule pretrain.*?{asked}", call.said, re.M | re.S), call.said


@pytest.fixture
def trainings(clone, tmp_path, monkeypatch) -> Callable[..., Call]:
    """Return a function that runs three trainings on a GPU each, which do not train but sleep and fail."""

    def change(content):
        models = content["models"]
        models["simclr"].update(gpus=1)
        models |= {"second": models["simclr"], "third": models["simclr"]}

    for manifest in ("data/demo.json", "datasets/imagenet.json"):
        (clone / "results/demo" / manifest).parent.mkdir(parents=True)
        (clone / "results/demo" / manifest).touch()
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho start >> turns; sleep 0.5; echo end >> turns; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    targets = [f"results/demo/{model}/backbone.safetensors" for model in ("simclr", "second", "third")]
    return lambda *options: snakemake(clone, *options, "--cores", "24", *targets, *edited(clone, change))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ((), ["start", "end"]),
        (("--resources", "mem_mb=900000"), ["start", "end"]),
        (("--resources", "gpu_jobs=2"), ["start", "start"]),
    ],
)
def test_on_this_machine_one_job_uses_gpus_at_a_time(trainings, clone, options, first):
    trainings(*options)
    turns = (clone / "turns").read_text().split()
    assert (turns[:2], len(turns)) == (first, 6)


def test_on_slurm_jobs_with_gpus_wait_for_no_other(trainings, empty_slurm):
    assert "Execute 3 jobs..." in trainings(*empty_slurm).said


def test_every_job_with_gpus_takes_its_turn(clone):
    resources = re.findall(r"^    resources: .*$", snakemake(clone, "-n", "all").said, re.M)
    with_gpus = [line for line in resources if re.search(r"\bgpu=[1-9]", line)]
    assert len(with_gpus) > 50
    assert all("gpu_jobs=1" in line for line in with_gpus)
    assert not any(
        "gpu_jobs=1" in line for line in resources if line not in with_gpus and "gres=" not in line
    )


def partitions(folder: Path, **limits: dict[str, int | str]) -> str:
    """Write a file of partitions, and return its path."""
    file = folder / "partitions.yaml"
    file.write_text(yaml.safe_dump({"partitions": limits}))
    return str(file)


def test_no_job_asks_for_more_than_the_site_gives(clone, monkeypatch):
    monkeypatch.setenv(
        "SNAKEMAKE_SLURM_PARTITIONS",
        partitions(clone, cpu={"max_gpu": 0}, gpu={"max_gpu": 8, "max_runtime": "1d", "max_mem_mb": 90_000}),
    )
    call = snakemake(clone, "-n", "all")
    assert call.status == 0, call.said
    asked = re.findall(r"^    resources: .*$", call.said, re.M)
    of_gpus = [line for line in asked if re.search(r"gpu=[1-9]", line)]
    assert max(int(re.search(r"runtime=(\d+)", line)[1]) for line in of_gpus) == 24 * 60
    assert max(int(re.search(r"mem_mb=(\d+)", line)[1]) for line in of_gpus) == 90_000
    plan = re.search(r"^plan .*?^total.*?$", call.said, re.M | re.S)[0]
    hours = float(re.search(r"^pretrain +5 +8 to 16 +([\d,]+)", plan, re.M)[1])
    assert hours > 5 * 24  # in several turns


def test_a_job_asks_for_what_one_partition_with_its_gpus_gives(clone, monkeypatch):
    """Partitions of more time, or of more memory, do not count where they have fewer GPUs."""
    site = {
        "short": {"max_gpu": 8, "max_runtime": "1h", "max_mem_mb": 500_000},
        "gpu": {"max_gpu": 8, "max_runtime": "1d", "max_mem_mb": 90_000},
        "small": {"max_gpu": 8, "max_runtime": "1d", "max_mem_mb": 50_000},
        "long": {"max_gpu": 4, "max_runtime": "7d", "max_mem_mb": 900_000},
        "cpu": {"max_runtime": "2h"},
    }
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", partitions(clone, **site))

    def asked(*options, **machine):
        def long(content):
            content["models"]["simclr"].update(machine)
            content["models"]["simclr"]["pretrain"]["epochs"] = 100_000_000

        target = "results/demo/simclr/backbone.safetensors"
        said = snakemake(clone, "-n", target, *options, *edited(clone, long)).said
        found = re.search(r"^rule pretrain.*?resources: (.*?)$", said, re.M | re.S)
        return said if found is None else dict(re.findall(r"(mem_mb|runtime)=(\d+)", found[1]))

    assert asked(gpus=8) == {"mem_mb": "90000", "runtime": str(24 * 60)}
    assert asked(gpus=4) == {"mem_mb": "67000", "runtime": str(7 * 24 * 60)}
    assert asked(gpus=8, nodes=2) == {"mem_mb": "67000", "runtime": str(7 * 24 * 60)}
    assert asked(gpus=0)["runtime"] == "120"
    assert asked(gpus=16)["runtime"].isdecimal()  # on this machine
    refusal = (
        "no partition takes 1 nodes with 16 GPUs and 8 cores for each: the largest max_gpu is 8; give the"
    )
    assert refusal in asked("--profile", "slurm", gpus=16)


def test_nodes_and_cores_for_each_gpu_decide_about_the_partition_too(clone, monkeypatch):
    site = {
        "one_node": {"max_gpu": 8, "max_nodes": 1, "max_runtime": "7d"},
        "few_cores": {"max_gpu": 8, "max_cpus_per_gpu": 4, "max_runtime": "6d"},
        "gpu": {"max_gpu": 8, "max_runtime": "1d"},
        "cpu": {"max_gpu": 0, "max_runtime": 12},
    }
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", partitions(clone, **site))
    minutes = {}
    for nodes in (1, 2):
        change = {"gpus": 16, "nodes": nodes} if nodes > 1 else {"gpus": 8}
        arguments = edited(clone, lambda c, change=change: lengthened(c, change))
        said = snakemake(clone, "-n", "all", *arguments).said
        for rule in ("pretrain", "pretrain_over_nodes", "imagenet_knn_record"):
            of_rule = (
                rf"^rule {rule}:\n(?:    .*\n)*?    wildcards: model=simclr\n(?:    .*\n)*?    resources: .*"
            )
            found = re.search(rf"{of_rule}runtime=(\d+)", said, re.M)
            minutes[rule, nodes] = found and int(found[1])
    day = 24 * 60
    assert (minutes["pretrain", 1], minutes["pretrain_over_nodes", 2]) == (7 * day, day)
    assert minutes["imagenet_knn_record", 1] > 12  # it takes a GPU, so the CPUs' limit is not its own


def lengthened(content: dict, machine: dict) -> None:
    content["models"]["simclr"].update(machine)
    content["models"]["simclr"]["pretrain"]["epochs"] = 100_000_000
    content["datasets"]["imagenet"]["images"]["val"] = 6_000


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_gpus": 8}, "unexpected keyword argument 'max_gpus'"),
        ({"max_gpu": 8, "max_mem_mb": "900G"}, "max_mem_mb: expected a number of MB, found 900G"),
        ({"max_gpu": 8, "max_runtime": "UNLIMITED"}, "UNLIMITED"),
    ],
)
def test_a_mistake_in_the_file_of_partitions_is_said_with_its_name(clone, monkeypatch, limits, said):
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", file := partitions(clone, gpu=limits))
    call = snakemake(clone, "-n", "imagenet_knn", *DEMO)
    assert call.status == 1
    assert re.search(rf"{re.escape(file)}: .*{re.escape(said)}", call.said)


@pytest.fixture
def empty_slurm(tmp_path, monkeypatch) -> tuple[str, ...]:
    """The arguments of a run on a Slurm that has no job, and takes none."""
    for name, status in {"squeue": 0, "sbatch": 1}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return "--profile", "slurm", "--retries", "0", "--slurm-init-seconds-before-status-checks", "1"


def test_the_limits_are_those_of_the_partitions_from_which_the_executor_chooses(
    clone, monkeypatch, empty_slurm
):
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", partitions(clone, other={"max_runtime": 3}))
    (clone / "named.yaml").write_text("partitions: {named: {max_runtime: 7}}")
    named = ("--slurm-partition-config", str(clone / "named.yaml"))
    call = snakemake(clone, *empty_slurm, *named, "demo", *DEMO)
    assert re.search(r"^rule demo:.*?^    resources: .*runtime=7$", call.said, re.M | re.S), call.said


def test_jobs_of_a_group_are_named_where_they_fail_and_not_started_twice(clone, empty_slurm, tmp_path):
    arguments = ("datasets", *DEMO, "--groups", "demo=made", "dataset=made")
    said = snakemake(clone, *empty_slurm, *arguments).said
    assert re.search(r"^demo failed at attempt 1: .*^dataset imagenet failed at", said, re.M | re.S), said
    row = f"17|RUNNING|rule_made_dataset_demo|{clone}"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{row}'\n")
    said = snakemake(clone, *empty_slurm, *arguments).said
    assert "left jobs in Slurm: 17 (made_dataset_demo , running)" in said


def test_a_checkpoint_is_downloaded_where_snakemake_runs(clone, empty_slurm):
    content = {"gpus": 0, "import_checkpoint": {"path": "gone.pth"}}
    arguments = edited(clone, lambda config: config["models"].update(gone=content))
    call = snakemake(clone, *empty_slurm, "results/demo/gone/backbone.safetensors", *arguments)
    assert "localrule import_checkpoint:" in call.said
    assert "import_checkpoint gone failed at attempt 1: simclr: gone.pth: " in call.said


def test_more_nodes_train_nothing_again(finished):
    arguments = edited(finished, lambda content: content["models"]["simclr"].update(gpus=4, nodes=2))
    assert set(snakemake(finished, "-n", "all", *arguments).jobs()) <= {"model_zoo_page"}


def test_the_report_has_the_sections_of_the_page_and_needs_no_network(finished):
    call = snakemake(finished, "--report", "report.html", "all", *DEMO)
    assert call.status == 0, call.said
    report = (finished / "report.html").read_text()
    sections = json.loads(re.search(r"var categories = (\{.*?\});?\n", report)[1])
    headings = ["The page", "Pretraining", *(heading for heading, _ in model_zoo.sections())]
    assert sorted(sections) == [f"{i:02} {heading}" for i, heading in enumerate(headings)]
    shown = [path for each in sections.values() for paths in each.values() for path in paths]
    records = {f"results/demo/{m}/{b}.json" for m in ("simclr", "random_init") for b in BENCHMARKS}
    assert records | {"results/demo/model_zoo.html", "results/demo/simclr/pretrain.png"} <= set(shown)
    assert "a weighted vote of the k most similar training images" in report  # the caption of imagenet_knn
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']https?:""", report)


@pytest.mark.parametrize(("gpus", "batch", "launched"), [(6, 9, 3), (8, 8, 8), (5, 7, 1)])
def test_segmentation_takes_the_gpus_that_divide_its_batch(clone, gpus, batch, launched):
    def change(content):
        content["models"]["simclr"].update(gpus=gpus)
        content["models"]["simclr"]["pretrain"].update(batch_size=10 * gpus)
        content["benchmarks"]["cityscapes_segmentation"].update(batch_size=batch)

    call = snakemake(clone, "-n", "-p", "cityscapes_segmentation", *edited(clone, change))
    assert call.status == 0, call.said
    (start,) = re.findall(
        r"^Shell command: (.*)-m simclr cityscapes_segmentation --model simclr ", call.said, re.M
    )
    several = f"torchrun --standalone --nproc-per-node={launched} "
    assert start.endswith(several) if launched > 1 else start == "python "
    (alone,) = re.findall(r"^Shell command: (.*) -m simclr cityscapes\w* --model random", call.said, re.M)
    assert alone == "CUDA_VISIBLE_DEVICES= python"
    assert "--picture results/demo/simclr/cityscapes_segmentation.png" in call.said


def test_model_zoo_runs_nothing_but_the_page(finished):
    (finished / "results/demo/simclr/imagenet_knn.json").unlink()
    assert snakemake(finished, "-n", "model_zoo", *DEMO).jobs() == {"model_zoo": 1}


def test_model_zoo_writes_the_page_from_no_record_at_all(clone):
    done = snakemake(clone, "model_zoo", *DEMO)
    assert done.status == 0, done.said
    assert "The page: results/demo/model_zoo.md" in done.said
    assert "no record yet (simclr, random_init)" in (clone / "results/demo/model_zoo.md").read_text()


# ---------------------------------------------------------------- bad input


def test_a_key_that_stands_twice_ends_before_any_job(clone):
    file = clone / "config/edited.yaml"
    file.write_text((clone / "config/demo.yaml").read_text() + "output: results/other\n")
    call = snakemake(clone, "-n", "all", "--configfile", "config/edited.yaml")
    assert call.status == 1
    assert "config/edited.yaml: not valid YAML: the key output stands twice in one block" in call.said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["benchmarks"].update(imagenet_kn={}), "unknown key; did you mean imagenet_knn?"),
        (
            lambda c: c["models"]["simclr"].update(gpus=3, nodes=2),
            "models.simclr: gpus: expected a multiple of the 2 nodes, found 3",
        ),
        (
            lambda c: c["models"]["simclr"].update(gpus=7),
            "models.simclr: batch_size: expected a multiple of the 7 processes, found 256; change",
        ),
        (
            lambda c: c["models"]["simclr"].update(gpus="two"),
            "models.simclr.gpus: input should be",
        ),
        (lambda c: c["datasets"]["inat18"].pop("root"), "inat18_mhead needs datasets.inat18.root"),
    ],
)
def test_a_bad_config_ends_before_any_job_with_one_sentence(clone, change, said):
    call = snakemake(clone, "all", *edited(clone, change))
    assert call.status == 1
    assert "config/edited.yaml: " in call.said
    assert said in call.said
    assert "Traceback" not in call.said
    assert "Job stats" not in call.said


def test_a_benchmark_that_no_model_runs_says_so(clone):
    call = snakemake(
        clone, "-n", "imagenet_knn", *edited(clone, lambda c: c["benchmarks"].pop("imagenet_knn"))
    )
    assert call.status == 1
    assert "no model runs imagenet_knn; add it under `benchmarks:`" in call.said


def test_a_record_of_a_benchmark_without_its_block_says_so(clone):
    arguments = edited(clone, lambda config: config["benchmarks"].pop("voc07_lowshot"))
    call = snakemake(clone, "-n", "results/demo/simclr/voc07_lowshot.json", *arguments)
    assert call.status == 1
    assert "voc07_lowshot is not under `benchmarks:`; add the line" in call.said


def test_a_failing_step_shows_its_log_and_the_path_of_it(clone):
    def foreign_folder(content):
        content["demo_data"] = "mine"

    (clone / "mine").mkdir()
    (clone / "mine/thesis.txt").touch()
    call = snakemake(clone, "mine/demo.json", *edited(clone, foreign_folder))
    assert call.status == 1
    assert "results/demo/datasets/demo.log" in call.said
    assert "choose another folder for the miniature datasets" in call.said
    assert (clone / "mine/thesis.txt").exists()


def test_two_runs_at_once_in_one_folder_are_refused(clone):
    first = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "demo", *DEMO],
        cwd=clone,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        locks = clone / ".snakemake/locks"
        deadline = time.monotonic() + 60
        while not (locks.is_dir() and any(locks.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.05)
        second = snakemake(clone, "demo", *DEMO)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert second.status == 1
    assert "Directory cannot be locked" in second.said


def test_every_benchmark_can_be_asked_for_by_name():
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    for name in BENCHMARKS:
        assert f'records("{name}")' in rules, name
        assert load(name).Config.dataset in rules


# ---------------------------------------------------------------- the profile


def test_the_readme_explains_every_key_of_the_slurm_profile():
    profile = yaml.safe_load((ROOT / "workflow/profiles/slurm/config.yaml").read_text())
    table = re.search(
        r"^\| key of `workflow/profiles/slurm/.*?\n\n", (ROOT / "README.md").read_text(), re.M | re.S
    )[0]
    keys = [*profile.pop("default-resources"), *profile]
    assert [key for key in keys if key != "executor" and f"`{key}`" not in table.replace(": ", "`, `")] == []


def test_a_slurm_that_does_not_answer_is_asked_no_more_often():
    profile = yaml.safe_load((ROOT / "workflow/profiles/slurm/config.yaml").read_text())
    assert profile["max-status-checks-per-second"] * profile["seconds-between-status-checks"] <= 1
