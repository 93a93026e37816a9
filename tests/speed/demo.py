"""How long each step of the demo took, and how much memory, from the times that its rules leave.

    uv run snakemake --configfile config/demo.yaml && uv run python tests/speed/demo.py

Prints a Markdown table: wall seconds, CPU seconds and peak memory of each step, of all models together the
greatest. Exits with 1 where there is no finished demo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent.parent.parent / "results/demo"


def main() -> int:
    files = sorted([*RESULTS.glob("*/times/*.tsv"), *RESULTS.glob("datasets/*.tsv")])
    if not (RESULTS / "model_zoo.md").exists():
        print(f"{RESULTS}: no finished demo; make it with `snakemake --configfile config/demo.yaml`")
        return 1
    times = pd.concat([pd.read_csv(file, sep="\t").assign(step=file.stem) for file in files])
    print("| step | jobs | seconds | CPU seconds | GB |\n| --- | ---: | ---: | ---: | ---: |")
    for step, rows in times.groupby("step"):
        most = rows[["s", "cpu_time", "max_rss"]].max()
        print(f"| {step} | {len(rows)} | {most.s:.0f} | {most.cpu_time:.0f} | {most.max_rss / 1000:.1f} |")
    print(f"| all | {len(times)} | | {times.cpu_time.sum():.0f} | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
