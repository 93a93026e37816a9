"""Pretraining with SimCLR: images, two views of each, NT-Xent, and at the end a backbone.

A run is a pure function of its recipe and its images: order, crops and colours follow from the seed, the
epoch and the image. So a rolling checkpoint holds no random state, and a run that was killed and resumed ends
in the weights of one that was not (bit for bit on a CPU).
"""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from simclr import BadInput, datasets, distributed
from simclr.checkpoint import save_backbone
from simclr.config import Recipe
from simclr.datasets import Dataset
from simclr.loss import nt_xent
from simclr.model import projector, resnet
from simclr.optim import LARS, SCHEDULES, parameter_groups
from simclr.results import replacing, workplace
from simclr.transforms import two_views

SAVE_SECONDS = 120  # between two rolling checkpoints
KEPT = 2  # rolling checkpoints: the newest, and one to fall back to
ROWS = 1000  # of pretrain.csv, at most (and one more)
CPU_THREADS = torch.get_num_threads()  # of this job, before they are divided
DECODED_BYTES = 256 * 2**20  # a dataset that is smaller in memory is decoded once
STOPPED = 75  # exit status after SIGTERM or SIGUSR1: saved, start again to go on (EX_TEMPFAIL of sysexits.h)


def pretrain(config: Recipe, dataset: Dataset, output: Path, work: Path) -> None:
    """Pretrain a backbone and write it to `output`, with pretrain.csv and pretrain.png beside it.

    `work` is a folder for rolling checkpoints and TensorBoard's log, in a folder of their own for each recipe
    and images: after a kill, the same command goes on from there; another recipe starts afresh. SIGTERM and
    SIGUSR1 end the step, save, and exit with status 75.

    Under `torchrun` the batch is divided over the processes. With the environment variable
    TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 it passes SIGUSR1 on, instead of dying of it; the
    status of `torchrun` itself is then 1.

    Raises `BadInput` for a batch that does not fit the images or the processes, while another process works
    on the same run, and for a loss that is not finite.
    """
    with (
        distributed.process_group() as device,
        workplace(work, run_of(config, dataset)) as folder,
        stop_signals() as signals,
    ):
        paths = datasets.samples(dataset, "train").paths
        steps_per_epoch = count_steps(config, len(paths))
        steps = config.epochs * steps_per_epoch

        torch.manual_seed(config.seed)
        network = build(config).to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(config, network)
        state = resume(folder, network, optimizer, device)
        model = parallel(config, network, device).train()
        schedule, peak_lr = SCHEDULES[config.cosine], config.lr * config.batch_size / 256
        saved = time.monotonic()

        with Log(folder, state["rows"], state["open_row"], steps) as log:
            for step, views in enumerate(load(config, paths, state["step"], device), start=state["step"]):
                lr = schedule(step, steps_per_epoch, config.epochs, peak_lr, config.warmup_epochs)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                # Both views pass through the network as one batch, so BatchNorm sees them together.
                images = views.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16(device)):
                    z = model(images.contiguous(memory_format=torch.channels_last))
                loss = nt_xent(*z.chunk(2), config.temperature)
                check_finite(loss, step, lr, folder)
                optimizer.zero_grad()
                (loss / config.gradient_divisor).backward()
                optimizer.step()

                log.add(step, step // steps_per_epoch, lr, loss.item(), len(views) * distributed.world_size())
                stopping = distributed.any_rank(bool(signals), device) and step + 1 < steps
                if stopping or step + 1 == steps or time.monotonic() - saved > SAVE_SECONDS:
                    save(folder, step + 1, network, optimizer, log)
                    saved = time.monotonic()
                if stopping:
                    print(
                        f"stopped after step {step + 1} of {steps}; the same command goes on", file=sys.stderr
                    )
                    sys.exit(STOPPED)

        if distributed.rank() == 0:
            write_csv(log.rows, output.with_name("pretrain.csv"))
            plot(log.rows, output.with_name("pretrain.png"))
            images_seen = config.epochs * min(steps_per_epoch * config.batch_size, len(paths))
            save_backbone(
                output, network.backbone.state_dict(), metadata(config, dataset, images_seen, steps, device)
            )


# ---------------------------------------------------------------- network


def build(config: Recipe) -> nn.Sequential:
    """Return backbone and projector, randomly initialised."""
    backbone = resnet(config.architecture, config.zero_init_residual)
    head = projector(backbone.channels["avgpool"], *config.projector)
    return nn.Sequential(OrderedDict(backbone=backbone, projector=head))


def build_optimizer(config: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimiser; with any of them, biases and BatchNorm are not decayed."""
    groups = parameter_groups(network, config.weight_decay, config.lars_exclude)
    if config.optimizer == "lars":
        return LARS(groups, config.lr, config.momentum, trust_coefficient=config.trust_coefficient)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum)
    return torch.optim.AdamW(groups, config.lr, (config.momentum, 0.999))


def parallel(config: Recipe, network: nn.Module, device: torch.device) -> nn.Module:
    """Return `network` as one of `world_size()` replicas, whose gradients are averaged."""
    if distributed.world_size() == 1:
        return network
    if config.sync_bn:
        network = distributed.sync_batchnorm(network)
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, devices, broadcast_buffers=False)


def bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 arithmetic. (The published runs used float32.)"""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_finite(loss: Tensor, step: int, lr: float, folder: Path) -> None:
    """Raise `BadInput` when the loss is not a finite number; the same on every rank, as the loss is."""
    if not torch.isfinite(loss):
        raise BadInput(
            f"step {step}: the loss is {loss.item()} at a learning rate of {lr:.3g}; lower `lr` or raise "
            f"`warmup_epochs` or `temperature`, delete {folder}, and start again"
        )


# ---------------------------------------------------------------- data


def count_steps(config: Recipe, images: int) -> int:
    """Return the steps per epoch; raises `BadInput` when the batch fits neither images nor processes."""
    world = distributed.world_size()
    if images < config.batch_size:
        raise BadInput(
            f"batch_size: expected at most the {images} images of {config.dataset}'s train split, found "
            f"{config.batch_size}; lower batch_size"
        )
    if config.batch_size % world:
        raise BadInput(
            f"batch_size: expected a multiple of the {world} processes, found {config.batch_size}; change "
            "batch_size or the number of GPUs"
        )
    return images // config.batch_size if config.drop_last else math.ceil(images / config.batch_size)


def order(images: int, batch_size: int, seed: int, epoch: int, rank: int, world: int) -> list[np.ndarray]:
    """Return the images of each step of `epoch` for `rank`; the last step may be smaller.

    A step takes the same images whatever the number of processes, each of which has an equal share. For that
    the last step is filled up with the first images of the epoch, at most `world` − 1 of them.
    """
    shuffled = np.random.default_rng([seed, epoch]).permutation(images)
    shuffled = np.concatenate([shuffled, shuffled[: -images % world]])
    return [shuffled[i : i + batch_size][rank::world] for i in range(0, len(shuffled), batch_size)]


def keys(config: Recipe, images: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
    """Yield this process's (epoch, image) pairs of every step from `first_step` to the end of the run."""
    steps_per_epoch = count_steps(config, images)
    for epoch in range(first_step // steps_per_epoch, config.epochs):
        batches = order(
            images, config.batch_size, config.seed, epoch, distributed.rank(), distributed.world_size()
        )[:steps_per_epoch]
        done = max(first_step - epoch * steps_per_epoch, 0)
        for batch in batches[done:]:
            yield [(epoch, int(i)) for i in batch]


class Views:
    """Two views of an image as the item (epoch, image) of a map-style dataset; decoded beforehand if few."""

    def __init__(self, config: Recipe, paths: Sequence[Path]):
        self.seed, self.paths, self.draw = config.seed, paths, two_views(config.augmentation)
        self.decoded = decode_all(paths)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        epoch, i = key
        image = self.decoded[i] if self.decoded else datasets.decode(self.paths[i])
        return self.draw(image, np.random.default_rng([self.seed, epoch, i]))


def decode_all(paths: Sequence[Path], limit: int = DECODED_BYTES) -> list[Image.Image]:
    """Return all images decoded, or none when they need more than `limit` bytes."""
    images: list[Image.Image] = []
    size = 0
    for path in paths:
        images.append(datasets.decode(path))
        size += 3 * images[-1].width * images[-1].height
        if size > limit:
            return []
    return images


def load(config: Recipe, paths: Sequence[Path], first_step: int, device: torch.device) -> DataLoader:
    """Return a loader of `(n, 2, 3, H, W)` views of this process's images, one item per step to the end."""
    return DataLoader(
        Views(config, paths),
        batch_sampler=keys(config, len(paths), first_step),
        num_workers=divide_cores(device),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_trainer,
    )


def divide_cores(device: torch.device) -> int:
    """Return how many processes make views; on the CPU, which also trains, half of the job's cores."""
    if device.type == "cuda":
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(max(cores - 1, 1), 16)
    workers = max(CPU_THREADS // 2, 1)
    torch.set_num_threads(max(CPU_THREADS - workers, 1))
    return workers


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore in a loader's worker the signals that a cluster sends to all processes of a job."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------- stopping and going on


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


def run_of(config: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Return what makes two runs the same: the recipe, its version included, and the images."""
    return {"recipe": config.model_dump(mode="json"), "dataset_manifest": dataset.dataset.manifest_sha256}


def save(folder: Path, step: int, network: nn.Module, optimizer: torch.optim.Optimizer, log: Log) -> None:
    """Write the state after `step` steps as a rolling checkpoint, whole or not at all, and drop old ones."""
    if distributed.rank() > 0:
        return
    state = {
        "step": step,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rows": log.rows,
        "open_row": log.open_row,
    }
    with replacing(folder / f"checkpoint-{step:09d}.pt") as part:
        torch.save(state, part)
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-KEPT]:
        old.unlink()


def resume(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Load the newest rolling checkpoint that can be read, if there is one; return its step and history."""
    checkpoints = sorted(folder.glob("checkpoint-*.pt"), reverse=True)
    for path in checkpoints:
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error) or "it is empty").splitlines()[0]
            print(f"{path} cannot be read ({reason}); trying an older one", file=sys.stderr)
            continue
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        return state
    if checkpoints:
        raise BadInput(f"{folder}: no rolling checkpoint can be read; delete it to start from the beginning")
    return {"step": 0, "rows": [], "open_row": []}


# ---------------------------------------------------------------- log


class Log:
    """Progress on the terminal, TensorBoard's log, and the rows of pretrain.csv, each over some steps."""

    def __init__(self, folder: Path, rows: list[dict[str, float]], open_row: list[list[float]], steps: int):
        self.rows, self.open_row, self.steps = rows, open_row, steps
        self.steps_per_row = math.ceil(steps / ROWS)
        self.last = time.monotonic()
        self.board = self.bar = None
        if distributed.rank() == 0:
            first = rows[-1]["step"] + 1 if rows else 0
            self.board = SummaryWriter(folder / "tensorboard", purge_step=int(first))
            self.bar = tqdm(total=steps, initial=int(first), unit="step", disable=not sys.stderr.isatty())

    def add(self, step: int, epoch: int, lr: float, loss: float, images: int) -> None:
        """Take note of a finished step of `images` images."""
        now = time.monotonic()
        self.open_row.append([loss, images, now - self.last])
        self.last = now
        if (step + 1) % self.steps_per_row and step + 1 < self.steps:
            return
        loss, images, seconds = (sum(values) for values in zip(*self.open_row, strict=True))
        row = {
            "step": step + 1,
            "epoch": epoch + 1,
            "lr": lr,
            "loss": loss / len(self.open_row),
            "images_per_second": images / seconds,
        }
        self.rows.append(row)
        self.open_row.clear()
        if distributed.rank() == 0:
            self._show(row, seconds / self.steps_per_row)

    def _show(self, row: dict[str, float], seconds_per_step: float) -> None:
        for key in ("lr", "loss", "images_per_second"):
            self.board.add_scalar(key, row[key], row["step"])
        text = "epoch {epoch} lr {lr:.4g} loss {loss:.4f} {images_per_second:.0f} images/s".format(**row)
        if self.bar.disable:
            left = timedelta(seconds=round((self.steps - row["step"]) * seconds_per_step))
            print(f"step {row['step']} of {self.steps} {text}, {left} left", flush=True)
        else:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(row["step"] - self.bar.n)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is still in memory."""
        if distributed.rank() == 0:
            self.board.close()
            self.bar.close()


def write_csv(rows: list[dict[str, float]], path: Path) -> None:
    """Write the rows of the log as CSV, whole or not at all."""
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Draw loss and learning rate over the epochs as PNG; equal rows give equal bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(2, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained")
    for axis, key, label in zip(axes, ("loss", "lr"), ("NT-Xent", "learning rate"), strict=True):
        axis.plot(steps, [row[key] for row in rows], linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_xlabel("step")
    axes[1].set_ylim(bottom=0)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)


def metadata(
    config: Recipe, dataset: Dataset, images_seen: int, steps: int, device: torch.device
) -> dict[str, str]:
    """Return what the backbone file says of itself; a function of the run, so equal runs give equal files."""
    return {
        "architecture": config.architecture,
        "source": "pretrain",
        "recipe": json.dumps(config.model_dump(mode="json"), sort_keys=True),
        "epochs": str(config.epochs),
        "steps": str(steps),
        "images_seen": str(images_seen),
        "precision": "bfloat16 autocast" if bfloat16(device) else "float32",
        "dataset": dataset.dataset.name,
        "dataset_manifest_sha256": dataset.dataset.manifest_sha256,
        "processes": str(distributed.world_size()),
        "torch": torch.__version__,
    }
