"""What the linear evaluations and semi-supervised fine-tuning share: training loop, resume, accuracy.

A training is a pure function of its config, its backbone and its images (`_images`), so one that was killed
and resumed ends in the weights of one that was not (bit for bit on a CPU).
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from simclr import BadInput, devices, distributed, files, rolling
from simclr.benchmarks._images import (
    Images,
    Transform,
    load,
    plan,
    rank_share,
    steps_per_epoch,
    test_transform,
    train_and_val,
)
from simclr.benchmarks._training import FrozenTraining, Training
from simclr.loading import pieces
from simclr.metrics import label_rank
from simclr.model import ResNet
from simclr.training_log import Panel, Row, plot, write_csv

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

Frozen = Callable[[Tensor], dict[str, Tensor]]

SAVE_SECONDS = 120  # between two rolling checkpoints, at least
SAVE_SHARE = 0.05  # of the time, at most, goes into saving: the heads of 8,142 classes are 3 GB


class Job(NamedTuple):
    """A training on a machine."""

    config: Training
    run: dict[str, Any]  # all that the result depends on
    folder: Path  # where the rolling checkpoints lie
    device: torch.device
    signals: list[int]  # received, which ask it to stop

    @property
    def bfloat16(self) -> bool:
        """Whether the backbone computes in bfloat16: if the config says so and the GPU has it."""
        return devices.in_bfloat16(self.config.precision, self.device)

    @property
    def machine(self) -> dict[str, Any]:
        """What the record says of how it was trained."""
        precision = "bfloat16" if self.bfloat16 else "float32"
        return {"processes": distributed.world_size(), "precision": precision}


@contextmanager
def at_work(work: Path, config: Training, backbone: Backbone, dataset: Dataset) -> Iterator[Job]:
    """Join the other processes and hold the folder under `work` of exactly this config, backbone and dataset.

    Another config, backbone or dataset gets another folder, so nothing is ever resumed from the wrong state.
    SIGTERM, SIGUSR1 and a time limit of Slurm that is near only ask to stop meanwhile. Raises `BadInput`
    while another run is in the folder.
    """
    run = {
        "benchmark": type(config).__module__,
        "config": config.model_dump(mode="json"),
        "checkpoint": backbone.checkpoint_sha256,
        "dataset": dataset.dataset.manifest_sha256,
    }
    with (
        distributed.process_group() as device,
        files.workplace(work, run) as folder,
        rolling.stop_signals() as signals,
    ):
        devices.float32_as_published()
        torch.backends.cudnn.benchmark = True
        yield Job(config, run, folder, device, signals)


# ---------------------------------------------------------------- the frozen backbone


def frozen_backbone(backbone: Backbone, device: torch.device, bfloat16: bool) -> ResNet:
    """Return the backbone for forward passes alone: BatchNorm folded in, in channels_last order."""
    network = folded(backbone.model()).requires_grad_(False)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    return network.to(device, dtype, memory_format=torch.channels_last)


def folded(network: ResNet) -> ResNet:
    """Return a copy of `network`, in evaluation mode, with every BatchNorm folded into its convolution.

    With the running statistics, BatchNorm is a factor and a summand per channel. The function stays the same,
    up to rounding.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return network


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Prove that the block left every parameter and buffer of `module` bit-identical, or raise."""
    before = fingerprint(module)
    yield
    if fingerprint(module) != before:
        raise RuntimeError("the frozen backbone changed during training, so the result would be wrong")


def fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of every parameter and buffer of `module`, names included."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- classifiers


class Heads(nn.ModuleDict):
    """Independent classifiers, each of the input of its own name."""

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map each input to its head's logits `(N, classes)`."""
        return {name: head(inputs[name]) for name, head in self.items()}


def classifier(inputs: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer as MMSelfSup's ClsHead begins: weights from N(0, 0.01²), bias 0."""
    linear = nn.utils.skip_init(nn.Linear, inputs, classes)
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear


def synchronised(model: nn.Module) -> nn.Module:
    """Return `model` with BatchNorm over the batches of all processes."""
    return distributed.sync_batchnorm(model) if distributed.world_size() > 1 else model


# ---------------------------------------------------------------- learning rates


def steps(milestones: Sequence[int], factor: float) -> Callable[[int], float]:
    """Return epoch → share of the first learning rate: times `factor` from each milestone on."""
    return lambda epoch: factor ** sum(epoch >= milestone for milestone in milestones)


def cosine(epochs: int) -> Callable[[int], float]:
    """Return epoch → share of the first learning rate: half a cosine over `epochs`, constant in an epoch."""
    return lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs))


# ---------------------------------------------------------------- training


class Diverged(BadInput):
    """The loss is no longer a finite number."""


def fit(
    job: Job,
    model: Heads,
    optimizer: torch.optim.Optimizer,
    images: Images,
    schedule: Callable[[int], float],
    frozen: Frozen,
    micro_batch: int,
    autocast: bool = False,
) -> list[Row]:
    """Train `model` for all epochs, from the newest rolling checkpoint on; return its learning curve.

    `frozen` turns images into the inputs of `model`, without gradient, `micro_batch` images at a time; the
    step is then taken on the whole batch at once, so that `micro_batch` does not change what is computed.
    The loss is the sum of the heads' mean cross-entropies; the curve has their means over each epoch.
    Raises `Diverged` with step and learning rate. SIGTERM and SIGUSR1 end the step, save, and exit with 75.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    state = resume(job, model, optimizer)
    per_epoch = steps_per_epoch(len(images), job.config)
    last = per_epoch * job.config.epochs
    items = plan(len(images), job.config, micro_batch, state["step"])
    model.train()
    saved, pause = time.monotonic(), SAVE_SECONDS
    with progress(job, images, state) as bar, load(images, items, job.device) as stream:
        for step in range(state["step"] + 1, last + 1):
            epoch, batch = divmod(step - 1, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(epoch)
            size = min(job.config.batch_size, len(images) - batch * job.config.batch_size)
            parts = islice(stream, math.ceil(len(rank_share(range(size))) / micro_batch))
            with torch.autocast(job.device.type, torch.bfloat16, enabled=autocast):
                losses = head_losses(model, *whole_batch(parts, frozen)) / size
            optimizer.zero_grad()
            losses.sum().backward()
            share_gradients(model)
            found, stopping = agree(job, losses)
            check_finite(found, step - 1, optimizer)
            optimizer.step()

            state["sums"] = [total + size * loss for total, loss in zip(state["sums"], found, strict=True)]
            if step % per_epoch == 0:
                end_epoch(state, model, epoch, optimizer, len(images))
                bar.set_postfix_str(described(state["curve"][-1]), refresh=False)
            bar.update(size)
            if step == last or stopping or time.monotonic() - saved > pause:
                started = time.monotonic()
                save(job, step, model, optimizer, state)
                saved = time.monotonic()
                pause = max(SAVE_SECONDS, (saved - started) / SAVE_SHARE)
            if stopping and step < last:
                rolling.stop(f"after step {step} of {last}", job.signals)
    return state["curve"]


@torch.no_grad()
def whole_batch(parts: Iterable[tuple[Tensor, Tensor]], frozen: Frozen) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs of the heads and the labels of a batch whose images and labels come in `parts`."""
    inputs, labels = zip(*((frozen(images), labels) for images, labels in parts), strict=True)
    return {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}, torch.cat(labels)


def head_losses(model: Heads, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return each head's cross-entropy, summed over this process's share of the batch, `(heads,)`."""
    return torch.stack([F.cross_entropy(x, labels, reduction="sum") for x in model(inputs).values()])


def share_gradients(model: nn.Module) -> None:
    """Replace every gradient by its sum over the processes, each of which divided by the whole batch."""
    if distributed.world_size() > 1:
        for parameter in model.parameters():
            parameter.grad = distributed.total(parameter.grad)


def agree(job: Job, losses: Tensor) -> tuple[list[float], bool]:
    """Return the losses `(heads,)` summed over the processes, and whether any of these was asked to stop."""
    asked = losses.new_tensor([float(bool(job.signals))])
    *found, asked = distributed.total(torch.cat([losses, asked])).tolist()  # the device is waited for once
    return found, asked > 0


def check_finite(losses: list[float], step: int, optimizer: torch.optim.Optimizer) -> None:
    """Raise `Diverged` when a loss is infinite or NaN."""
    if not all(map(math.isfinite, losses)):
        rates = ", ".join(f"{group['lr']:g}" for group in optimizer.param_groups)
        raise Diverged(
            f"training diverged: the loss is {sum(losses)} at step {step} with a learning rate of {rates}; "
            "choose a smaller lr, and check the backbone"
        )


# ---------------------------------------------------------------- what is shown


def progress(job: Job, images: Images, state: dict[str, Any]) -> tqdm:
    """Return a bar over the images of all epochs, with rate and time left; in a log, two a minute."""
    per_epoch = steps_per_epoch(len(images), job.config)
    epoch, step = divmod(state["step"], per_epoch)
    return tqdm(
        initial=epoch * len(images) + step * job.config.batch_size,
        total=job.config.epochs * len(images),
        unit="images",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=distributed.rank() > 0,
    )


def end_epoch(
    state: dict[str, Any], model: Heads, epoch: int, optimizer: torch.optim.Optimizer, images: int
) -> None:
    """Add an epoch to the learning curve: its learning rate, and each head's mean loss."""
    means = {name: total / images for name, total in zip(model, state["sums"], strict=True)}
    state["curve"].append({"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], **means})
    state["sums"] = [0.0] * len(model)


def described(row: Row) -> str:
    """Return a row of the learning curve in one line."""
    return f"epoch {row['epoch']} " + " ".join(f"{key} {row[key]:.3f}" for key in row if key != "epoch")


def write_curve(curve: list[Row], path: Path | None) -> None:
    """Write the learning curve as CSV to `path`, and as PNG beside it; nothing without a path."""
    if path is None or distributed.rank() > 0:
        return
    rates = [key for key in curve[0] if key.startswith("lr")]
    losses = [key for key in curve[0] if key not in ("epoch", *rates)]
    write_csv(curve, path)
    panels = Panel(losses, "training loss", 3), Panel(rates, "learning rate", 1)
    plot(curve, path.with_suffix(".png"), panels, over="epoch")


# ---------------------------------------------------------------- stopping and going on


def save(
    job: Job, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write the rolling checkpoint after `step` steps, whole or not at all, and the learning curve so far."""
    if distributed.rank() == 0:
        held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        rolling.save(job.folder, step, job.run, state | held)
        if state["curve"]:
            write_csv(state["curve"], job.folder / "curve.csv")


def resume(job: Job, model: Heads, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the newest rolling checkpoint, if there is one; return step, curve, and the open epoch's sums."""
    state = rolling.newest(job.folder, job.run)
    if state is None:
        return {"step": 0, "curve": [], "sums": [0.0] * len(model)}
    model.load_state_dict(state.pop("model"), strict=True)
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


# ---------------------------------------------------------------- testing


@torch.no_grad()
def accuracy(job: Job, model: Heads, images: Images, frozen: Frozen, batch_size: int) -> dict[str, float]:
    """Return `{name}` and `{name}_top5` in percent for each head of `model`, in evaluation mode.

    A training that is asked to stop has been saved by now, so this exits at once.
    """
    model.eval()
    share = rank_share([(0, index) for index in range(len(images))])
    of_all_ranks = len(images) // distributed.world_size() // batch_size  # batches; some have one more
    hits, finite = torch.zeros(len(model), 2, dtype=torch.int64), True
    with load(images, pieces(share, batch_size), job.device) as stream:
        for number, (batch, labels) in enumerate(stream):
            if number < of_all_ranks and distributed.any_rank(bool(job.signals), job.device):
                rolling.stop("while testing", job.signals)
            for row, logits in zip(hits, model(frozen(batch)).values(), strict=True):
                finite = finite and bool(torch.isfinite(logits).all())
                if finite:
                    ranks = torch.from_numpy(label_rank(logits.cpu().numpy(), labels.cpu().numpy()))
                    row += torch.stack([(ranks < 1).sum(), (ranks < 5).sum()])
    # All ranks together, for none may wait for one that has given up.
    if distributed.any_rank(not finite, job.device):
        raise Diverged("training diverged: the classifier gives infinity or NaN; choose a smaller lr")
    percent = 100 * distributed.total(hits.to(job.device)).double() / len(images)
    return {
        key: value
        for name, row in zip(model, percent.tolist(), strict=True)
        for key, value in zip((name, f"{name}_top5"), row, strict=True)
    }


# ---------------------------------------------------------------- frozen protocols


def linear_evaluation(
    backbone: Backbone,
    dataset: Dataset,
    config: FrozenTraining,
    work: Path,
    curve: Path | None,
    *,
    transform: Transform,
    heads: Callable[[Mapping[str, int], int, torch.Generator], Heads],
    inputs: Callable[[nn.Module, Tensor], dict[str, Tensor]],
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    schedule: Callable[[int], float],
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train `heads` on the frozen backbone's `inputs`; return val top-1 and top-5 in percent, and details.

    `heads(channels, classes, generator)` makes the classifiers, `inputs(network, images)` what they see, all
    of them from one forward pass. Accuracy is that of the last epoch, never of the best. `curve` is the CSV
    file of the learning curve. Raises `RuntimeError` if the backbone is not bit-identical afterwards.
    """
    train, val = train_and_val(dataset, config)
    with at_work(work, config, backbone, dataset) as job:
        network = frozen_backbone(backbone, job.device, job.bfloat16)
        first_weights = torch.Generator().manual_seed(config.seed)
        model = synchronised(heads(network.channels, dataset.classes, first_weights).to(job.device))
        dtype = network.conv1.weight.dtype

        def frozen(images: Tensor) -> dict[str, Tensor]:
            features = inputs(network, images.to(dtype))
            return {name: x.float().contiguous() for name, x in features.items()}

        data, test = Images(train, transform, config.seed), Images(val, test_transform(config), config.seed)
        with unchanged(network):
            arguments = (frozen, config.micro_batch)
            learnt = fit(job, model, optimizer(model.parameters()), data, schedule, *arguments)
            metrics = accuracy(job, model, test, *arguments)
        if files.sha256(backbone.path) != backbone.checkpoint_sha256:
            raise BadInput(
                f"{backbone.path}: replaced during the training; start again to evaluate what is there now"
            )
        write_curve(learnt, curve)
        details = {"train_images": len(data), "val_images": len(test), "epoch": config.epochs, **job.machine}
        return metrics, details
