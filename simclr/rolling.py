"""Rolling checkpoints: the state that a kill must not lose, and what asks a training to stop.

The newest two are kept. Each is written whole or not at all, and belongs to exactly one run.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from simclr import BadInput, distributed, slurm
from simclr.files import replacing

PATTERN = "checkpoint-*.pt"
KEPT = 2  # the newest, and one to fall back to
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGINT)  # a training to stop
STOPPED = 75  # exit status after being asked to stop: saved, start again to go on (EX_TEMPFAIL of sysexits.h)


def save(folder: Path, step: int, run: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the state of `run` after `step` steps, whole or not at all, and drop all but the newest two.

    Those beyond `step` go too: the run went on from before them, because they are broken.
    """
    path = folder / f"checkpoint-{step:09d}.pt"
    with replacing(path) as part:
        torch.save({**state, "run": run, "step": step}, part)
    drop_others(path, PATTERN)


def drop_others(newest: Path, pattern: str) -> None:
    """Of the checkpoints in its folder, named by `pattern`, keep `newest` and the one before it alone."""
    checkpoints = sorted(newest.parent.glob(pattern))
    until = checkpoints.index(newest) + 1
    for each in [*checkpoints[: max(until - KEPT, 0)], *checkpoints[until:]]:
        each.unlink()


def drop_all(folder: Path) -> None:
    """Drop the checkpoints of a training whose result is there."""
    for path in folder.glob(PATTERN):
        path.unlink()


def newest(folder: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Return the newest state that is whole, on the CPU, with its `step`; None where there is none yet.

    For a broken one it takes the one before, with a warning. Raises `BadInput` when none is whole, for the
    state of another run, naming what differs, and when the ranks do not find the same.
    """
    state = _newest(folder, run)
    steps = distributed.of_all_ranks(state["step"] if state else 0)
    if len(set(steps)) > 1:
        raise BadInput(
            f"{folder}: expected one state for all {len(steps)} processes, found those after steps "
            f"{', '.join(map(str, steps))}; --work must be one folder that all nodes share"
        )
    return state


def _newest(folder: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    checkpoints = sorted(folder.glob(PATTERN), reverse=True)
    for path in checkpoints:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise BadInput(
                f"{path}: cannot be read ({error.strerror}); give the same command again"
            ) from error
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            if distributed.rank() == 0:
                reason = (str(error) or "it is empty").splitlines()[0]
                print(f"{path} is broken ({reason}); going on from the one before", file=sys.stderr)
            continue
        check_run(path, state, run)
        return state
    if checkpoints:
        raise BadInput(f"{folder}: no rolling checkpoint is whole; delete it to start from the beginning")
    return None


def check_run(path: Path, state: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise `BadInput` unless the `state` that the file at `path` holds is that of `run`."""
    found = state.get("run", {})
    if found != run:
        raise BadInput(
            f"{path}: expected a file of this run, found one of another: "
            f"{'; '.join(differences(found, run))}; delete it, or give another --work"
        )


def differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield "key is A there, B here" for every key in which two descriptions of a run differ."""
    for key in {**expected, **found}:
        there, here = found.get(key), expected.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from differences(there, here, f"{prefix}{key}.")
        elif there != here:
            yield f"{prefix}{key} is {there} there, {here} here"


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, Any], Any]) -> Iterator[dict[int, Any]]:
    """Have `handler` called at these signals; yield number → the handler before, which is back afterwards."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, each in before.items():
            signal.signal(number, each)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGUSR1 and a first SIGINT in the list that is yielded, instead of dying of them.

    In a job of Slurm the first process gets a SIGALRM when the job's time is nearly over.
    """
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        if number == signal.SIGALRM and set_alarm():
            return  # the limit was raised meanwhile
        if number == signal.SIGINT:
            signal.signal(number, before[number])  # the second one ends it at once
        received.append(number)
        os.write(2, f"{signal.Signals(number).name}: stopping after this step\n".encode())

    with handling(ASKING, receive) as before:
        if distributed.rank() == 0:
            set_alarm()
        try:
            yield received
        finally:
            signal.alarm(0)
    # For whom it was set before; it may have come after the last step.
    if callable(before[signal.SIGALRM]) and not set_alarm() and signal.SIGALRM in received:
        signal.raise_signal(signal.SIGALRM)


def set_alarm() -> bool:
    """Let a SIGALRM come when this job should stop, to end before its time limit; return whether one will."""
    left = slurm.seconds_left()
    if left is None or left <= 0:
        return False
    signal.alarm(math.ceil(left))
    return True


@contextmanager
def queued_again_in_time() -> Iterator[None]:
    """Have this job of Slurm queued again, and exit with `STOPPED`, when its time is nearly over.

    For what has nothing to save, around a training that saves by `stop_signals`.
    """
    if not set_alarm():
        yield
        return

    def leave(*_: Any) -> NoReturn:
        slurm.requeue()
        sys.exit(STOPPED)

    with handling([signal.SIGALRM], leave):
        try:
            yield
        finally:
            signal.alarm(0)


def stop(where: str, signals: list[int]) -> NoReturn:
    """Exit with `STOPPED`, all processes together, once the state is saved.

    A training that has to stop for its job's time limit has the job queued again, which goes on.
    """
    if distributed.rank() == 0:
        print(f"stopped {where}; the same command goes on", file=sys.stderr, flush=True)
        if signal.SIGALRM in signals:
            slurm.requeue()
    distributed.barrier()  # the first to exit takes the others with it, which may still be saving
    sys.exit(STOPPED)
