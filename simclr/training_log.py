"""What a training shows: progress, TensorBoard's log, a CSV file, and one picture of it all."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from simclr import devices, distributed
from simclr.files import replacing

ROWS = 1000  # of pretrain.csv, at most (and one more)
SHOW_SECONDS = 10  # between two lines where there is no terminal
Row = dict[str, float | None]


class Log:
    """Rows over some steps each: on the terminal, in TensorBoard's log, and at the end in pretrain.csv.

    `rows` are finished; `open_row` holds the steps since. Both go into the rolling checkpoint.
    """

    def __init__(self, folder: Path, rows: list[Row], open_row: list[Row], steps: int):
        self.rows, self.open_row, self.steps = rows, open_row, steps
        self.steps_per_row = math.ceil(steps / ROWS)
        self.shown = -math.inf
        self.board = self.bar = None
        if distributed.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # a second, which other trainings need not wait

            first = int(rows[-1]["step"]) if rows else 0
            self.board = SummaryWriter(folder / "tensorboard", purge_step=first + 1)
            done, hidden = first + len(open_row), not sys.stderr.isatty()
            self.bar = tqdm(total=steps, initial=done, unit="step", disable=hidden)

    def add(self, step: int, epoch: int, lr: float, counts: dict[str, int], **values: float | None) -> None:
        """Take note of step `step`, from 0.

        `values` are `images`, `seconds`, `wait` (seconds of them for data), `knn`, and what is logged as the
        mean over the steps of a row; None was not measured. `counts` are of all steps so far.
        """
        self.open_row.append(values)
        row = self._row(step, epoch, lr, counts)
        if distributed.rank() == 0:
            self._show(row)
        if (step + 1) % self.steps_per_row == 0 or step + 1 == self.steps:
            self.rows.append(row)
            self.open_row.clear()
            if distributed.rank() == 0:
                self._write(row)

    def _row(self, step: int, epoch: int, lr: float, counts: dict[str, int]) -> Row:
        """Return the row of the steps since the last one."""
        values = self.open_row[0]
        columns = {key: [row[key] for row in self.open_row if row[key] is not None] for key in values}
        images, seconds, wait = (sum(columns.pop(key)) for key in ("images", "seconds", "wait"))
        knn = columns.pop("knn")
        return {
            "step": step + 1,
            "epoch": epoch + 1,
            "lr": lr,
            **{key: sum(known) / len(known) if known else None for key, known in columns.items()},
            "knn": knn[-1] if knn else None,
            "images_per_second": images / seconds,
            "data_wait": wait / seconds,
            "memory_gb": devices.peak_memory_gb(),
            **counts,
        }

    def _write(self, row: Row) -> None:
        for key in row.keys() - {"step", "epoch"}:
            if row[key] is not None:
                self.board.add_scalar(key, row[key], row["step"])

    def _show(self, row: Row) -> None:
        """Show how far the training is: a bar on a terminal, else a line now and then."""
        if not self.bar.disable:
            self.bar.set_postfix_str(described(row), refresh=False)
            self.bar.update(row["step"] - self.bar.n)
        elif time.monotonic() - self.shown > SHOW_SECONDS or row["step"] == self.steps:
            self.shown = time.monotonic()
            images_per_step = sum(step["images"] for step in self.open_row) / len(self.open_row)
            seconds = (self.steps - row["step"]) * images_per_step / row["images_per_second"]
            left = timedelta(seconds=round(seconds))
            print(f"step {row['step']} of {self.steps} {described(row)}, {left} left", flush=True)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is still in memory."""
        if distributed.rank() == 0:
            self.board.close()
            self.bar.close()


def described(row: Row) -> str:
    """Return a row of the log in one line."""
    text = f"epoch {row['epoch']} lr {row['lr']:.4g}"
    if row["loss"] is not None:
        text += f" loss {row['loss']:.4f}"
    if row["knn"] is not None:
        text += f" knn {row['knn']:.1f} %"
    text += f" {row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} of it waiting for data"
    text += f", {row['memory_gb']:.1f} GB"
    for key in ("skipped_steps", "skipped_images"):
        if row[key]:
            text += f", {row[key]} {key.replace('_', ' ')}"
    return text


def write_csv(rows: list[Row], path: Path) -> None:
    """Write the rows of the log as CSV, whole or not at all; what was not measured is empty."""
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


class Panel(NamedTuple):
    """One part of the picture: keys of the rows that it draws, what its axis says, relative height."""

    keys: Sequence[str]
    label: str
    height: float


# Of a pretraining, from top to bottom.
PANELS = (
    Panel(("loss",), "NT-Xent", 3),
    Panel(("lr",), "learning rate", 1),
    Panel(("knn",), "kNN top-1, %", 2),
    Panel(("images_per_second",), "images/s", 1),
)
FEW = 100  # points of a line that are marked; of more, the line alone shows


def plot(rows: list[Row], path: Path, panels: Sequence[Panel] = PANELS, over: str = "step") -> None:
    """Draw `panels` over the steps, or over another key of the rows, as PNG, on one page.

    Equal rows give equal bytes; a panel of which no row has a value is left out. The first panel shows the
    range of its values, every other one begins at 0.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in panels if any(row[key] is not None for row in rows for key in panel.keys)]
    heights = [panel.height for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        sharex=True,
        squeeze=False,
        figsize=(7, 1 + sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for key in panel.keys:
            known: list[tuple[Any, Any]] = [(row[over], row[key]) for row in rows if row[key] is not None]
            marker = "o" if len(known) <= FEW else None
            axis.plot(*zip(*known, strict=True), linewidth=1, marker=marker, markersize=3, label=key)
        axis.set_ylabel(panel.label)
        axis.grid(alpha=0.3)
        if axis is not axes[0, 0]:
            axis.set_ylim(bottom=0)
        if len(panel.keys) > 1:
            axis.legend()
    axes[-1, 0].set_xlabel(over)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)
