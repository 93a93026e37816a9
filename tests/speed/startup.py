"""How long the two things that people wait for take: `python -m simclr --help`, and `snakemake -n all`.

    uv run python tests/speed/startup.py

Each call is a new process; the fastest of five counts. Prints its wall seconds, its CPU seconds (what an idle
machine takes) and the bound on the wall seconds. Exits with 1 when a bound is broken.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BOUNDS = {
    ("-m", "simclr", "--help"): 1.0,
    ("-m", "snakemake", "-n", "all"): 10.0,
}


def seconds(command: tuple[str, ...]) -> tuple[float, float]:
    """Return the wall and the CPU seconds of one call of this Python with these arguments."""
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def main() -> int:
    broken = False
    for command, bound in BOUNDS.items():
        wall, cpu = min(seconds(command) for _ in range(5))
        print(f"python {' '.join(command)}: {wall:.2f} s, CPU {cpu:.2f} s (bound {bound:g} s)")
        broken |= wall > bound
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
