"""Pretraining with SimCLR: images, two views of each, NT-Xent, and at the end a backbone.

A run is a pure function of its recipe and its images: order, crops and colours follow from the seed, the
epoch and the image, and nothing else is drawn. So a rolling checkpoint needs no random state, and a run that
was killed and resumed ends in the weights of one that was not (bit for bit on a CPU).
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr import (
    BadInput,
    datasets,
    devices,
    distributed,
    files,
    loading,
    online_knn,
    results,
    rolling,
    stream,
)
from simclr.augment import augment
from simclr.checkpoint import save_backbone
from simclr.config import Execution, Recipe, misfit
from simclr.datasets import Dataset
from simclr.loss import nt_xent
from simclr.model import projector, resnet
from simclr.optim import LARS, SCHEDULES, parameter_groups
from simclr.stream import Batch
from simclr.training_log import Log, plot, write_csv

SAVE_SECONDS = 120  # between two rolling checkpoints
UNIFORMITY_ROWS = 512  # projections of which uniformity is taken; all pairs of a large batch would cost time

EXECUTION = Execution()  # the whole share of the batch at one time


def pretrain(
    config: Recipe, dataset: Dataset, output: Path, work: Path, execution: Execution = EXECUTION
) -> None:
    """Pretrain a backbone and write it to `output`, with pretrain.json, .csv and .png beside it.

    `work` is a folder for rolling checkpoints and TensorBoard's log, in a folder of their own for each recipe
    and images: after a kill, the same command goes on from there, on any number of processes, having lost at
    most two minutes and a step; another recipe starts afresh. SIGTERM, SIGUSR1 and a time limit of Slurm that
    is near end the step, save, and exit with status 75; at its time limit the job is also queued again.

    Under `torchrun`, or `srun` with one task per GPU, the batch is divided over the processes. With the
    environment variable PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 `torchrun` passes SIGUSR1 on, instead of
    dying of it; its own status is then 1.

    Raises `BadInput` for a batch that does not fit images, processes or micro-batches, while another process
    works on the same run, for images that cannot be decoded, and for a loss or gradient that is not finite
    (`execution.skip_images` and `execution.skip_steps` of them are borne).
    """
    if dataset.name != config.dataset:
        raise BadInput(f"--dataset: expected the manifest of {config.dataset}, found that of {dataset.name}")
    with (
        distributed.process_group() as device,
        files.workplace(work, run_of(config, dataset)) as folder,
        rolling.stop_signals() as signals,
    ):
        devices.float32_as_published()
        torch.backends.cudnn.benchmark = True
        job = Job(config, execution, dataset, device, folder)
        paths = datasets.samples(dataset, "train").paths
        steps_per_epoch = count_steps(job, len(paths))
        steps = config.epochs * steps_per_epoch
        peak_lr, schedule = config.lr * config.batch_size / 256, SCHEDULES[config.cosine]

        torch.manual_seed(config.seed)
        network = build(config).to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(config, network)
        state = resume(job, network, optimizer)
        announce(job, state["step"], steps, len(paths))
        model = parallel(job, network).train()
        workers = loading.divide_cores(device)

        saved = clock = time.monotonic()
        with (
            Log(folder, state["rows"], state["open_row"], steps) as log,
            stream.batches(
                config, execution, paths, steps_per_epoch, state["step"], device, workers
            ) as batches,
        ):
            for step, (batch, undecodable) in enumerate(batches, start=state["step"]):
                fetched = time.monotonic()
                epoch, last_of_epoch = step // steps_per_epoch, (step + 1) % steps_per_epoch == 0
                lr = schedule(step, steps_per_epoch, config.epochs, peak_lr, config.warmup_epochs)
                images = len(batch[0]) * distributed.world_size()
                measured = take_step(job, state, model, optimizer, batch, step, lr)
                if measured["loss"] is not None:
                    state["images_seen"] += images
                stopping = agree(job, state, paths, bool(signals), undecodable)
                seconds = time.monotonic() - clock

                knn = None
                if last_of_epoch and knn_is_due(job, epoch):
                    knn = online_knn.accuracy(network.backbone, job.dataset, job.size, workers)
                counts = {"skipped_steps": state["skipped_steps"]}
                counts["skipped_images"] = len(state["undecodable"])
                timed = {"images": images, "seconds": seconds, "wait": fetched - clock}
                log.add(step, epoch, lr, counts, **measured, **timed, knn=knn)

                if step + 1 == steps or stopping or time.monotonic() - saved > SAVE_SECONDS:
                    count_time(job, state, time.monotonic() - saved)
                    saved = time.monotonic()
                    save(job, step + 1, network, optimizer, state)
                if stopping and step + 1 < steps:
                    rolling.stop(f"after step {step + 1} of {steps}", signals)
                clock = time.monotonic()

        if distributed.rank() == 0:
            state["undecodable"] = [str(paths[i]) for i in state["undecodable"]]
            write_csv(log.rows, output.with_name("pretrain.csv"))
            plot(log.rows, output.with_name("pretrain.png"))
            save_backbone(output, network.backbone.state_dict(), metadata(job, state, steps))
            results.write(record(job, state, steps, output), output.with_name("pretrain.json"))


class Job(NamedTuple):
    """A recipe on a machine."""

    config: Recipe
    execution: Execution
    dataset: Dataset
    device: torch.device
    folder: Path

    @property
    def size(self) -> int:
        """Edge of a view in pixels."""
        return self.config.augmentation.image_size

    @property
    def bfloat16(self) -> bool:
        """Whether the network computes in bfloat16: if the recipe says so and the GPU has it."""
        return devices.in_bfloat16(self.config.precision, self.device)

    @property
    def batch_norm_images(self) -> int:
        """Images whose statistics BatchNorm takes, in every step but the last of an epoch."""
        alone = self.config.batch_norm == "process"
        return self.micro_batch * (1 if alone else distributed.world_size())

    @property
    def micro_batch(self) -> int:
        """Images of this process that pass through the network at one time."""
        share = self.config.batch_size // distributed.world_size()
        return min(self.execution.micro_batch or share, share)

    @property
    def machine(self) -> dict[str, Any]:
        """What may change when a run goes on."""
        gpu = self.device.type == "cuda"
        return {
            "processes": distributed.world_size(),
            "micro_batch": self.micro_batch,
            "batch_norm_images": self.batch_norm_images,
            "device": torch.cuda.get_device_name(self.device) if gpu else "CPU",
            "precision": "bfloat16 autocast" if self.bfloat16 else "float32",
            "compile": self.execution.compile,
        }


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


def parallel(job: Job, network: nn.Module) -> nn.Module:
    """Return `network` as one of `world_size()` replicas, whose gradients are averaged."""
    if distributed.world_size() > 1 and job.config.batch_norm != "process":
        network = distributed.sync_batchnorm(network)
    if job.execution.compile:
        network.compile()
    if distributed.world_size() == 1:
        return network
    devices = [job.device] if job.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; 2.8 knows no other name.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(network, devices, broadcast_buffers=False)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return a copy of each tensor."""
    return [tensor.clone() for tensor in tensors]


def restore(network: nn.Module, buffers: list[Tensor]) -> None:
    """Set the buffers of `network`, the running statistics of BatchNorm, back to `buffers`."""
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)


# ---------------------------------------------------------------- one step


def take_step(
    job: Job,
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    lr: float,
) -> dict[str, float | None]:
    """Take one step and return what was measured; one that is not finite is undone, and all of it is None."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    buffers = copies(model.buffers()) if job.execution.skip_steps else []
    optimizer.zero_grad()
    measured = measure(*gradients(job, model, batch), model)
    if math.isfinite(measured["loss"] + measured["gradient_norm"]):
        optimizer.step()
        return measured
    skip_step(job, state, step, lr, measured)
    restore(model, buffers)
    return dict.fromkeys(measured)


def gradients(job: Job, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Leave the gradient of the batch's NT-Xent in every parameter; return loss and `(2, n, D)` projections.

    A batch that is larger than the run's micro-batch passes in pieces, twice (gradient caching, Gao et al.
    2021, arXiv 2101.06983): first without gradient, for the loss of all projections and its gradient with
    respect to each; then again piece by piece, to carry that on into the parameters. Loss and gradient are
    those of the whole batch; only BatchNorm sees the pieces, and its running statistics see each once.
    """
    temperature, divisor = job.config.temperature, job.config.gradient_divisor
    share = len(batch[0])
    pieces = math.ceil(share / job.micro_batch)
    if pieces == 1:
        z = project(job, model, batch)
        loss = nt_xent(*z, temperature)
        (loss / divisor).backward()
        return loss.detach(), z.detach()

    # Every `pieces`-th image, as ranks take every world-th: a process with two pieces has those of two ranks.
    parts = [[x[first::pieces] for x in batch] for first in range(pieces)]
    buffers = copies(model.buffers())
    with torch.no_grad():
        z = torch.cat([project(job, model, part) for part in parts], 1).float()
    restore(model, buffers)
    loss = nt_xent(*z.requires_grad_(), temperature)
    (loss / divisor).backward()
    of_parts = z.grad.split([len(part[0]) for part in parts], 1)
    for number, (part, gradient) in enumerate(zip(parts, of_parts, strict=True), start=1):
        # DistributedDataParallel averages what has been summed up when the last piece is through.
        with model.no_sync() if hasattr(model, "no_sync") and number < pieces else nullcontext():
            again = project(job, model, part)
            again.backward(gradient.to(again.dtype))
    return loss.detach(), z.detach()


def project(job: Job, model: nn.Module, batch: Batch) -> Tensor:
    """Return the projections `(2, n, D)` of both views of n images.

    Both views pass through the network as one batch, so BatchNorm sees them together.
    """
    images, *parameters = (x.transpose(0, 1).flatten(0, 1) for x in batch)
    if job.config.pipeline == "device":
        images = augment(images, *parameters)
    with torch.autocast(job.device.type, torch.bfloat16, enabled=job.bfloat16):
        return model(images.contiguous(memory_format=torch.channels_last)).unflatten(0, (2, -1))


@torch.no_grad()
def measure(loss: Tensor, z: Tensor, network: nn.Module) -> dict[str, float]:
    """Return loss, norm of the gradient, and alignment and uniformity of projections `(2, n, D)`.

    Alignment is the mean squared distance of the two views of an image; uniformity the logarithm of the mean
    of exp(−2·squared distance) over all pairs, here of at most 512 projections of the first rank (Wang and
    Isola 2020, arXiv 2005.10242). Loss and norm are the same on every rank.
    """
    z = F.normalize(z.float(), dim=-1)
    rows = z[:, : UNIFORMITY_ROWS // 2].flatten(0, 1)
    values = {
        "loss": loss,
        "gradient_norm": nn.utils.get_total_norm([p.grad for p in network.parameters()]),
        "alignment": (z[0] - z[1]).square().sum(1).mean(),
        "uniformity": F.pdist(rows).square().mul(-2).exp().mean().log(),
    }
    # One transfer, so that the device is waited for once.
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def skip_step(job: Job, state: dict[str, Any], step: int, lr: float, measured: dict[str, float]) -> None:
    """Count a step that is to be undone; raises `BadInput` when the run bears no more of them.

    Loss and norm of the gradient are the same on every rank, so all stop together.
    """
    state["skipped_steps"] += 1
    found = ", ".join(f"{key} {measured[key]}" for key in ("loss", "gradient_norm"))
    if state["skipped_steps"] > job.execution.skip_steps:
        raise BadInput(
            f"step {step}: expected finite numbers, found {found} at a learning rate of {lr:.3g}; lower `lr` "
            "or raise `warmup_epochs` or `temperature` in the recipe; or go on from the last good state, in "
            f"{job.folder}, with execution.skip_steps above {job.execution.skip_steps}, which leaves such "
            "steps out"
        )
    if distributed.rank() == 0:
        print(f"step {step}: {found} at a learning rate of {lr:.3g}; undone and left out", file=sys.stderr)


def agree(
    job: Job, state: dict[str, Any], paths: Sequence[Any], stopping: bool, undecodable: list[int]
) -> bool:
    """Tell every rank what happened on one; return whether any was asked to stop.

    Raises `BadInput` on all of them when more images cannot be decoded than the run bears.
    """
    news = torch.tensor([float(stopping), float(len(undecodable))], device=job.device)
    stop, found = distributed.total(news).tolist()
    if found:
        mine = torch.tensor(undecodable, dtype=torch.int64, device=job.device)
        everyone = torch.cat(distributed.gather(mine)).tolist()
        state["undecodable"] = sorted({*state["undecodable"], *everyone})
    if len(state["undecodable"]) > job.execution.skip_images:
        names = ", ".join(str(paths[i]) for i in state["undecodable"][:5])
        raise BadInput(
            f"{len(state['undecodable'])} images cannot be decoded, more than execution.skip_images: "
            f"{job.execution.skip_images}; replace them by intact copies, or raise it: {names}"
        )
    return stop > 0


def knn_is_due(job: Job, epoch: int) -> bool:
    """Return whether the nearest neighbours are asked at the end of `epoch`, counted from 0."""
    every = job.execution.knn_every
    return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == job.config.epochs)


def announce(job: Job, step: int, steps: int, images: int) -> None:
    """Say in a line what is about to run, and from where."""
    if distributed.rank() == 0:
        config, on = job.config, job.machine
        where = f"going on after step {step} of {steps}" if step else "starting"
        print(
            f"{config.architecture} at {job.size} pixels, {config.epochs} epochs of {images:,} images in "
            f"steps of {config.batch_size}, on {on['processes']} × {on['device']} in {on['precision']}; "
            f"{where}; state in {job.folder}",
            flush=True,
        )


def count_steps(job: Job, images: int) -> int:
    """Return the steps per epoch; raises `BadInput` for a batch that does not fit images and processes."""
    config = job.config
    if fault := misfit(config, job.execution, distributed.world_size(), images):
        raise BadInput(fault)
    return images // config.batch_size if config.drop_last else math.ceil(images / config.batch_size)


# ---------------------------------------------------------------- stopping and going on


def run_of(config: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Return what makes two runs the same: the recipe, its version included, and the images."""
    return {"recipe": config.model_dump(mode="json"), "dataset_manifest": dataset.dataset.manifest_sha256}


def save(
    job: Job, step: int, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write the state after `step` steps, whole or not at all; raises `BadInput` for weights not finite."""
    if not torch.stack(torch._foreach_norm(list(network.parameters()))).isfinite().all():
        raise BadInput(
            f"after step {step} a weight is not finite; the state before is in {job.folder}; lower `lr` or "
            "raise `warmup_epochs`"
        )
    if distributed.rank() == 0:
        held = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        rolling.save(job.folder, step, run_of(job.config, job.dataset), state | held)


def resume(job: Job, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the newest rolling checkpoint, if there is one; return step, history and what was counted."""
    here = {"from_step": 0, **job.machine}
    state = rolling.newest(job.folder, run_of(job.config, job.dataset))
    if state is None:
        counted = {"seconds": 0.0, "gpu_seconds": 0.0, "images_seen": 0, "skipped_steps": 0}
        return {"step": 0, "rows": [], "open_row": [], **counted, "undecodable": [], "machines": [here]}
    network.load_state_dict(state.pop("network"))
    optimizer.load_state_dict(state.pop("optimizer"))
    here["from_step"] = state["step"]
    before = {**state["machines"][-1], "from_step": state["step"]}
    changed = list(rolling.differences(before, here))
    if changed:
        state["machines"].append(here)
    if changed and distributed.rank() == 0:
        alike = before["batch_norm_images"] == here["batch_norm_images"]
        effect = "only rounding differs" if alike else "BatchNorm takes other statistics"
        if before["precision"] != here["precision"]:
            effect += ", in another precision"
        print(
            f"going on after step {state['step']}: {'; '.join(changed)}; from here on {effect}",
            file=sys.stderr,
        )
    return state


def count_time(job: Job, state: dict[str, Any], seconds: float) -> None:
    """Count what was worked since the last state that was saved; what a kill loses is not."""
    state["seconds"] += seconds
    if job.device.type == "cuda":
        state["gpu_seconds"] += seconds * distributed.world_size()


# ---------------------------------------------------------------- what a run leaves


def facts(job: Job, state: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return what a run did, as far as it is the same for every run like it."""
    return {
        "steps": steps,
        "images_seen": state["images_seen"],
        "skipped_steps": state["skipped_steps"],
        "processes": distributed.world_size(),
        "batch_norm_images": job.batch_norm_images,
        "precision": job.machine["precision"],
    }


def metadata(job: Job, state: dict[str, Any], steps: int) -> dict[str, str]:
    """Return what the backbone file says of itself; a function of the run, so equal runs give equal files.

    What differs between equal runs, as time does, is in pretrain.json, which names the file's hash.
    """
    return {
        "architecture": job.config.architecture,
        "source": "pretrain",
        "recipe": json.dumps(job.config.model_dump(mode="json"), sort_keys=True),
        "execution": job.execution.model_dump_json(),
        "epochs": str(job.config.epochs),
        **{key: str(value) for key, value in facts(job, state, steps).items()},
        "skipped_images": json.dumps(state["undecodable"]),
        "dataset": job.dataset.dataset.name,
        "dataset_manifest_sha256": job.dataset.dataset.manifest_sha256,
        "software": json.dumps(results.software()),
        "hardware": json.dumps(results.hardware()),
    }


def record(job: Job, state: dict[str, Any], steps: int, backbone: Path) -> results.Pretraining:
    """Return what was run, on what, and how long it took."""
    seconds = state["seconds"]
    knn = [row["knn"] for row in state["rows"] if row["knn"] is not None]
    return results.Pretraining(
        checkpoint_sha256=files.sha256(backbone),
        dataset=job.dataset.dataset,
        recipe=job.config.model_dump(mode="json"),
        execution=job.execution.model_dump(mode="json"),
        **facts(job, state, steps),
        skipped_images=state["undecodable"],
        machines=state["machines"],
        knn=knn[-1] if knn else None,
        seconds=seconds,
        gpu_hours=state["gpu_seconds"] / 3600,
        images_per_second=state["images_seen"] / seconds,
        peak_memory_gb=devices.peak_memory_gb(),
        software=results.software(),
        hardware=results.hardware(),
    )
