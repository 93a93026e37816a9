"""A Slurm cluster to talk to, and Snakemake that runs on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Cluster:
    """Four nodes of Slurm; `environment` is that of somebody who has logged in there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.small_disk = folder / "small_disk"  # of 400 kB
        path = [str(HERE / "quick"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(path),
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "SIMCLR_ALLOW_CPU": "1",  # the GPUs are GPUs to Slurm alone
        }

    def script(self, name: str, *arguments: str) -> None:
        """Run start.sh, stop.sh or crash.sh."""
        command = [HERE / f"{name}.sh", self.folder, *arguments]
        call = subprocess.run(command, capture_output=True, text=True)
        assert call.returncode == 0, call.stdout + call.stderr

    def __call__(self, *command: str) -> str:
        """Run one of Slurm's commands; return what it printed."""
        call = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True)
        return call.stdout.strip()

    def jobs(self, *, states: str = "all") -> dict[str, str]:
        """Return number → state of the jobs that Slurm knows."""
        rows = self("squeue", "--noheader", f"--states={states}", "--format=%i %T").splitlines()
        return dict(row.split() for row in rows)


def until(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    """Wait until `condition` gives something true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}"
        time.sleep(0.2)
    return found


class Run:
    """`snakemake --profile slurm …` that is running in `folder`."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] = {},
        **test_only: float | Path,  # step_seconds, save_seconds, hold: see quick/sitecustomize.py
    ):
        self.log = folder / "said.txt"
        command = [sys.executable, "-m", "snakemake"]
        slowed = {f"SIMCLR_TEST_{name.upper()}": str(value) for name, value in test_only.items()}
        with self.log.open("w") as said:
            self.process = subprocess.Popen(
                [*command, "--profile", "slurm", "--max-status-checks-per-second", "10", *arguments],
                cwd=folder,
                env={**cluster.environment, **environment, **slowed},
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def ends(self, seconds: float = 600) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(seconds)


@contextmanager
def running(*arguments: Any, **options: Any) -> Iterator[Run]:
    """A `Run`, which is killed at the end where it has not ended."""
    run = Run(*arguments, **options)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()
