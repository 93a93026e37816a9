"""A zoo of many models: how long Snakemake takes to say what is to be done, and in what memory.

    PYTHONPATH=. python tests/speed/dag.py --models 50

prints one Markdown table: dry runs of `all` with every benchmark, in a folder that links to this repository.
Seconds are of CPU, as Snakemake works in one thread; memory is that of the process that would then submit the
jobs.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, nargs="+", default=[7, 50, 200])
    args = parser.parse_args()
    print(
        "| models | jobs | files of the page | seconds | memory, MB |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    for models in args.models:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {models} | {' | '.join(dry_run(Path(folder), models))} |", flush=True)


def dry_run(folder: Path, models: int) -> tuple[str, str, str, str]:
    """Return jobs, declared outputs, CPU seconds and megabytes of a dry run of `all`."""
    for name in ("workflow", "simclr", "envs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "results").mkdir()
    shutil.copy(ROOT / "results/published.yaml", folder / "results")
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["models"] = {f"model{i}": {"gpus": 8, "pretrain": {"seed": i}} for i in range(models)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["snakemake", "--profile", "slurm", "-n", "all", "--configfile", "config.yaml"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    jobs = re.search(r"^total +(\d+)", said, re.M)[1]
    outputs = sum(line.count(", ") + 1 for line in re.findall(r"^    output: (.*)$", said, re.M))
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return jobs, f"{outputs:,}", f"{seconds:.1f}", f"{after.ru_maxrss / 1000:.0f}"


if __name__ == "__main__":
    main()
