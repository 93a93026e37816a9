"""Files: written whole or not at all, in folders in which one run works at a time; and their hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simclr import BadInput


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it over `path`, else remove it.

    Raises `BadInput` when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the name, too, outlives a crash of the machine
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:
        if is_full(path.parent, error):
            raise BadInput(
                f"{path}: No space left on device; free some, or let `output` be on a larger disk, then give "
                "the same command again"
            ) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def is_full(folder: Path, error: Exception) -> bool:
    """Return whether `error` was raised because the disk or the quota of `folder` is used up.

    Those of numpy and torch do not say so; then next to nothing is left.
    """
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or shutil.disk_usage(folder).free < 2**16


def clear(folder: Path) -> None:
    """Remove what processes left in `folder` that were killed within `replacing`."""
    for part in folder.glob(".*.part"):
        part.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run at a time; raises `BadInput` while another has it.

    Of the processes that `torchrun` started, the first holds it for all.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            # A POSIX lock, unlike flock's, is not inherited by a loader's worker that outlives the process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BadInput(f"{folder}: another run works in this folder; wait for it or stop it") from error
        except OSError as error:
            raise BadInput(
                f"{folder}: its file system gives no locks ({error.strerror}), without which two runs could "
                "write over each other; put the output on one that does"
            ) from error
        yield


@contextmanager
def workplace(work: Path, run: dict[str, Any]) -> Iterator[Path]:
    """Yield the folder under `work` of exactly this `run`, all that its result depends on, and hold it.

    The folder is named by a hash of `run`, which its run.json spells out: nothing is ever resumed from the
    state of another run. Raises `BadInput` while another process works on the same.
    """
    text = json.dumps(run, sort_keys=True, indent=1) + "\n"
    folder = Path(work) / hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if int(os.environ.get("RANK", 0)) == 0:
            clear(folder)
            with replacing(folder / "run.json") as part:
                part.write_text(text)
        yield folder


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
