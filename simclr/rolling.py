"""Rolling checkpoints: the state that a kill must not lose, and the signals that ask a training to stop.

The newest two are kept. Each is written whole or not at all, and belongs to exactly one run.
"""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from simclr import BadInput
from simclr.results import replacing

KEPT = 2  # the newest, and one to fall back to
STOPPED = 75  # exit status after SIGTERM or SIGUSR1: saved, start again to go on (EX_TEMPFAIL of sysexits.h)


def save(folder: Path, step: int, run: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the state of `run` after `step` steps, whole or not at all, and drop all but the newest two."""
    with replacing(folder / f"checkpoint-{step:09d}.pt") as part:
        torch.save({**state, "run": run, "step": step}, part)
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-KEPT]:
        old.unlink()


def newest(folder: Path, run: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return the newest state that can be read, with its `step`, or None where there is none yet.

    Falls back to the older one with a warning. Raises `BadInput` when none can be read, and for the state of
    another run, naming what differs.
    """
    checkpoints = sorted(folder.glob("checkpoint-*.pt"), reverse=True)
    for path in checkpoints:
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error) or "it is empty").splitlines()[0]
            print(f"{path} cannot be read ({reason}); trying an older one", file=sys.stderr)
            continue
        if state["run"] != run:
            raise BadInput(
                f"{path}: expected a checkpoint of this run, found one of another: "
                f"{'; '.join(differences(state['run'], run))}; delete it, or give another --work"
            )
        return state
    if checkpoints:
        raise BadInput(f"{folder}: no rolling checkpoint can be read; delete it to start from the beginning")
    return None


def differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield "key is A there, B here" for every key in which two descriptions of a run differ."""
    for key in {**expected, **found}:
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from differences(there, here, f"{prefix}{key}.")
        elif there != here:
            yield f"{prefix}{key} is {there} there, {here} here"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGUSR1 in the list that is yielded, instead of dying of them."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore in a loader's worker the signals that a cluster sends to all processes of a job."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
