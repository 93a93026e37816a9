"""What the linear evaluations and semi-supervised fine-tuning share: data, training loop, resume, accuracy.

Every random number is a function of (seed, epoch, index of the image), so a training that was killed and
resumed, or that loads images in other processes, gives the same result as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from simclr import BadInput, distributed, results
from simclr.benchmarks._training import Training
from simclr.datasets import Samples, decode, samples
from simclr.metrics import label_rank
from simclr.results import replacing
from simclr.transforms import (
    center_crop,
    color_jitter,
    crop_centre,
    normalize,
    random_resized_crop,
    resize_short_edge,
    to_tensor,
)

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

Crop = Callable[[Image.Image, np.random.Generator], Image.Image]
Transform = Callable[[Image.Image, np.random.Generator], Tensor]
Frozen = Callable[[Tensor], dict[str, Tensor]]

# ---------------------------------------------------------------- transforms

# Principal components of ImageNet's RGB colours in [0, 1] (Krizhevsky et al. 2012; MMSelfSup, Lighting).
EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def train_transform(crop: Crop, jitter: float = 0, lighting_std: float = 0) -> Transform:
    """Return crop → flip → colour jitter → [0, 1] → lighting → normalise: PIL in, `(3, H, W)` out.

    `jitter` is the range of the brightness, contrast and saturation factors around 1, always on, in random
    order; `lighting_std` that of AlexNet's noise, before normalisation (MMSelfSup v0.11.0, mhead configs).
    """

    def transform(image: Image.Image, rng: np.random.Generator) -> Tensor:
        image = crop(image, rng)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if jitter:
            image = color_jitter(image, jitter, jitter, jitter, 0, rng)
        tensor = to_tensor(image)
        if lighting_std:
            tensor = lighting(tensor, rng.normal(0, lighting_std, 3))
        return normalize(tensor)

    return transform


def resized_crop(config: Training) -> Crop:
    """Return the random resized crop of the published configs: bilinear, aspect ratio from 3/4 to 4/3."""
    return lambda image, rng: random_resized_crop(
        image, config.image_size, config.crop_area, (3 / 4, 4 / 3), rng
    )


def shifted_crop(config: Training) -> Crop:
    """Return Places205's crop: short edge and central crop to `resize`, then a random `image_size` of it."""
    size, room = config.image_size, config.resize - config.image_size + 1

    def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        left, top = (int(edge) for edge in rng.integers(room, size=2))
        image = crop_centre(resize_short_edge(image, config.resize), config.resize)
        return image.crop((left, top, left + size, top + size))

    return crop


def lighting(image: Tensor, alpha: np.ndarray) -> Tensor:
    """Add Σ alpha·eigenvalue·eigenvector to all pixels of `image` `(3, H, W)` in [0, 1]; `alpha`: `(3,)`."""
    change = EIGENVECTORS @ (torch.as_tensor(alpha, dtype=torch.float32) * EIGENVALUES)
    return image + change[:, None, None]


def still_transform(config: Training) -> Transform:
    """Return the transform of test images: short edge to `resize`, centre crop; nothing is random."""
    transform = center_crop(config.resize, config.image_size)
    return lambda image, rng: transform(image)


# ---------------------------------------------------------------- data


class Images(torch.utils.data.Dataset):
    """Transformed images; an item is asked for as (epoch, index), which decide its augmentation."""

    def __init__(self, samples: Samples, transform: Transform, seed: int):
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        rng = np.random.default_rng((self.seed, epoch, index))
        return self.transform(decode(self.samples.paths[index]), rng), int(self.samples.labels[index])


def train_and_val(dataset: Dataset) -> tuple[Samples, Samples]:
    """Return both splits; raises `BadInput` for an empty split or a label that the dataset does not have."""
    splits = samples(dataset, "train"), samples(dataset, "val")
    for name, split in zip(("train", "val"), splits, strict=True):
        check_labels(split, dataset.classes, f"{dataset.name} {name}")
    return splits


def check_labels(split: Samples, classes: int, where: str) -> None:
    """Raise `BadInput` unless `split` has images and all its labels are in 0 … `classes` - 1."""
    if len(split.labels) == 0:
        raise BadInput(f"{where}: expected at least one image, found none")
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= classes))
    if len(wrong):
        first = wrong[0]
        raise BadInput(
            f"{where}: expected labels 0…{classes - 1}, found {split.labels[first]} for "
            f"{split.paths[first]}; correct the list of the split, or `classes` of the dataset in the config"
        )


def epoch_plan(images: int, config: Training, epoch: int, micro_batch: int) -> list[list[list]]:
    """Return this process's part of each batch of an epoch, cut in pieces of `micro_batch` (epoch, index).

    The batches themselves, a random permutation cut in pieces, are the same for any number of processes.
    """
    order = np.random.default_rng((config.seed, epoch)).permutation(images).tolist()
    batches = [order[i : i + config.batch_size] for i in range(0, images, config.batch_size)]
    rank, world = distributed.rank(), distributed.world_size()
    if len(batches[-1]) < world:
        raise BadInput(
            f"the last batch of an epoch has {len(batches[-1])} images, fewer than the {world} processes; "
            "start fewer processes"
        )
    return [pieces([(epoch, index) for index in batch[rank::world]], micro_batch) for batch in batches]


def pieces(items: Sequence, size: int) -> list:
    """Cut `items` into pieces of `size`; the last one may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def load(images: Images, plan: Iterable[list[tuple[int, int]]], device: torch.device) -> Iterator:
    """Yield `(images, labels)` on `device` for each list of (epoch, index) in `plan`, in that order.

    With a GPU, as many processes decode as the job has threads; on the CPU the network needs them itself.
    """
    cuda = device.type == "cuda"
    workers = torch.get_num_threads() if cuda else 0
    loader = DataLoader(
        images,
        batch_sampler=list(plan),
        num_workers=workers,
        pin_memory=cuda,
        multiprocessing_context="fork" if workers else None,
    )
    for batch, labels in loader:
        yield batch.to(device, non_blocking=True), labels.to(device, non_blocking=True)


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
    model: Heads,
    optimizer: torch.optim.Optimizer,
    images: Images,
    config: Training,
    schedule: Callable[[int], float],
    folder: Path,
    device: torch.device,
    frozen: Frozen,
    micro_batch: int,
) -> None:
    """Train `model` for `config.epochs` epochs, resuming from `folder`, where it writes after every epoch.

    `frozen` turns images into the inputs of `model`, without gradient, `micro_batch` images at a time; the
    step is then taken on the whole batch at once, so that `micro_batch` does not change what is computed.
    The loss is the sum of the heads' mean cross-entropies. Raises `Diverged` with step and learning rate.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    first, curve = resume(folder, model, optimizer, device)
    bar = tqdm(
        initial=first * len(images),
        total=config.epochs * len(images),
        unit="images",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=distributed.rank() > 0,
    )
    for epoch in range(first, config.epochs):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(epoch)
        model.train()
        totals = torch.zeros(len(model), device=device)
        plan = epoch_plan(len(images), config, epoch, micro_batch)
        stream = load(images, (piece for batch in plan for piece in batch), device)
        for step, batch in enumerate(plan):
            inputs, labels = whole_batch(islice(stream, len(batch)), frozen)
            size = min(config.batch_size, len(images) - step * config.batch_size)
            losses = torch.stack(
                [F.cross_entropy(x, labels, reduction="sum") / size for x in model(inputs).values()]
            )
            optimizer.zero_grad()
            losses.sum().backward()
            share_gradients(model)
            losses = distributed.total(losses)
            check_finite(losses, epoch * len(plan) + step, optimizer)
            optimizer.step()
            totals += size * losses
            bar.update(size)
        means = dict(zip(model, (totals / len(images)).tolist(), strict=True))
        curve.append({"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], **means})
        bar.set_postfix({name: f"{loss:.3f}" for name, loss in means.items()}, refresh=False)
        if distributed.rank() == 0:
            save(folder, model, optimizer, curve)
    bar.close()


@torch.no_grad()
def whole_batch(parts: Iterable[tuple[Tensor, Tensor]], frozen: Frozen) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs of the heads and the labels of a batch whose images and labels come in `parts`."""
    inputs, labels = zip(*((frozen(images), labels) for images, labels in parts), strict=True)
    return {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}, torch.cat(labels)


def share_gradients(model: nn.Module) -> None:
    """Replace every gradient by its sum over the processes, each of which divided by the whole batch."""
    if distributed.world_size() > 1:
        for parameter in model.parameters():
            parameter.grad = distributed.total(parameter.grad)


def check_finite(losses: Tensor, step: int, optimizer: torch.optim.Optimizer) -> None:
    """Raise `Diverged` when a loss is infinite or NaN."""
    if not torch.isfinite(losses).all():
        rates = ", ".join(f"{group['lr']:g}" for group in optimizer.param_groups)
        raise Diverged(
            f"training diverged: the loss is {losses.sum().item()} at step {step} with a learning rate of "
            f"{rates}; choose a smaller lr, and check the backbone"
        )


@torch.no_grad()
def accuracy(
    model: Heads, images: Images, device: torch.device, frozen: Frozen, batch_size: int
) -> dict[str, float]:
    """Return `{name}` and `{name}_top5` in percent for each head of `model`, in evaluation mode."""
    model.eval()
    mine = [(0, index) for index in range(len(images))][distributed.rank() :: distributed.world_size()]
    hits, finite = torch.zeros(len(model), 2, dtype=torch.int64), True
    for batch, labels in load(images, pieces(mine, batch_size), device):
        for row, logits in zip(hits, model(frozen(batch)).values(), strict=True):
            finite = finite and bool(torch.isfinite(logits).all())
            if finite:
                ranks = torch.from_numpy(label_rank(logits.cpu().numpy(), labels.cpu().numpy()))
                row += torch.stack([(ranks < 1).sum(), (ranks < 5).sum()])
    # All ranks together, for none may wait for one that has given up.
    if distributed.any_rank(not finite, device):
        raise Diverged("training diverged: the classifier gives infinity or NaN; choose a smaller lr")
    percent = 100 * distributed.total(hits.to(device)).double() / len(images)
    return {
        key: value
        for name, row in zip(model, percent.tolist(), strict=True)
        for key, value in zip((name, f"{name}_top5"), row, strict=True)
    }


# ---------------------------------------------------------------- the work folder


def workplace(
    work: Path, config: Training, backbone: Backbone, dataset: Dataset
) -> AbstractContextManager[Path]:
    """Hold and yield the folder under `work` of exactly this config, backbone and dataset.

    Another config, backbone or dataset gets another folder, so nothing is ever resumed from the wrong state.
    Raises `BadInput` while another run is in it.
    """
    run = {
        "benchmark": type(config).__module__,
        "config": config.model_dump(mode="json"),
        "checkpoint": backbone.checkpoint_sha256,
        "dataset": dataset.dataset.manifest_sha256,
    }
    return results.workplace(work, run)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, curve: list[dict]) -> None:
    """Write the rolling checkpoint `state.pt` and the learning curve `curve.csv`, whole or not at all."""
    with replacing(folder / "state.pt") as part:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}, part)
    with replacing(folder / "curve.csv") as part:
        rows = [",".join(curve[0]), *(",".join(map(str, row.values())) for row in curve)]
        part.write_text("\n".join(rows) + "\n")


def resume(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, list[dict[str, Any]]]:
    """Load the rolling checkpoint of `folder`, if any; return the next epoch and the curve so far."""
    path = folder / "state.pt"
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: expected a whole rolling checkpoint; delete it to begin again") from error
    model.load_state_dict(state["model"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    return len(state["curve"]), state["curve"]


# ---------------------------------------------------------------- frozen protocols


def linear_evaluation(
    backbone: Backbone,
    dataset: Dataset,
    config: Training,
    work: Path,
    *,
    transform: Transform,
    heads: Callable[[Mapping[str, int], int, torch.Generator], Heads],
    inputs: Callable[[nn.Module, Tensor], dict[str, Tensor]],
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    schedule: Callable[[int], float],
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train `heads` on the frozen backbone's `inputs`; return val top-1 and top-5 in percent, and details.

    `heads(channels, classes, generator)` makes the classifiers, `inputs(network, images)` what they see.
    Accuracy is that of the last epoch, never of the best. Raises `RuntimeError` if the backbone is not
    bit-identical afterwards.
    """
    train, val = train_and_val(dataset)
    with distributed.process_group() as device, workplace(work, config, backbone, dataset) as folder:
        network = backbone.model().requires_grad_(False).to(device)
        first_weights = torch.Generator().manual_seed(config.seed)
        model = synchronised(heads(network.channels, dataset.classes, first_weights).to(device))

        def frozen(images: Tensor) -> dict[str, Tensor]:
            return inputs(network, images)

        test = Images(val, still_transform(config), config.seed)
        data = Images(train, transform, config.seed)
        arguments = (config, schedule, folder, device, frozen, config.micro_batch)
        with unchanged(network):
            fit(model, optimizer(model.parameters()), data, *arguments)
            metrics = accuracy(model, test, device, frozen, config.micro_batch)
        details = {"train_images": len(data), "val_images": len(test), "epoch": config.epochs}
        return metrics, details
