"""How long the two things that people wait for take: `python -m simclr --help`, and `snakemake -n all`.

    uv run python tests/speed/startup.py

Prints the wall seconds of each call, of the fastest of five (cold: bytecode and page cache may be warm, the process
is new), and its bound. Exits with 1 when a bound is broken.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BOUNDS = {
    ("-m", "simclr", "--help"): 1.0,
    ("-m", "snakemake", "-n", "all"): 10.0,
}


def seconds(command: tuple[str, ...]) -> float:
    """Return the wall seconds of one call of this Python with these arguments."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> int:
    broken = False
    for command, bound in BOUNDS.items():
        fastest = min(seconds(command) for _ in range(5))
        print(f"python {' '.join(command)}: {fastest:.2f} s (bound {bound:g} s)")
        broken |= fastest > bound
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
