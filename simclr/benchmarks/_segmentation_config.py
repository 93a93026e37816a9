"""MMSegmentation's packaged config with every number of a protocol set, and the parts of ours that it names.

Its data come through `LoadImage` and `LoadMask`, which refuse what is not as it was verified. What is random
in a training image follows from the seed and from how many were drawn before (`SeededDataset`), so that a
training that was killed and resumed, or that runs in another number of processes, sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from simclr import BadInput, datasets
from simclr.benchmarks._mmseg import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    TRANSFORMS,
    InfiniteSampler,
    LoadAnnotations,
    LoadImageFromFile,
    Settings,
    mmseg,
)
from simclr.distributed import world_size
from simclr.loading import ignore_signals
from simclr.model import resnet

if TYPE_CHECKING:
    from simclr.benchmarks.voc12aug_segmentation import Config
    from simclr.datasets import Dataset


def settings(config: Config, architecture: str, dataset: Dataset, folder: Path, device: str) -> Settings:
    """Return MMSegmentation's packaged config with every value of the protocol set from `config`.

    `device` is "cpu" or "cuda". Raises `BadInput` when the batch cannot be dealt evenly over the processes.
    """
    base = Settings.fromfile(Path(mmseg.__file__).parent / ".mim" / "configs" / config.packaged)
    base.work_dir = str(folder)
    base.randomness = {"seed": config.seed}
    base.launcher = "pytorch" if world_size() > 1 else "none"
    if world_size() > 1:
        # The network stays on the device that the process has, which need not bear its number.
        wrapper = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
        base.model_wrapper_cfg = wrapper
    _set_model(base.model, config, architecture, device)
    _set_data(base, config, dataset, device)
    _set_schedule(base, config)
    base.default_hooks.pop("visualization")
    base.default_hooks.checkpoint = None  # `_segmentation.Checkpoints` writes them whole
    base.default_hooks.logger.interval = min(50, math.ceil(config.iterations / 10))
    return base


def _set_model(model: Any, config: Config, architecture: str, device: str) -> None:
    with torch.device("meta"):
        channels = resnet(architecture).channels
    # Over one process the statistics of both are the same; torch has SyncBN for GPUs only.
    norm = {"type": "SyncBN" if world_size() > 1 and device == "cuda" else "BN", "requires_grad": True}
    model.pretrained = None  # the packaged address of ImageNet weights
    model.backbone.update(
        type="ResNet",  # packaged: ResNetV1c
        depth=int(architecture.split("_")[0].removeprefix("resnet")),
        stem_channels=channels["feature1"],
        base_channels=channels["feature1"],
        contract_dilation=config.contract_dilation,
        norm_cfg=norm,
    )
    model.decode_head.update(in_channels=channels["feature5"], channels=config.decode_channels)
    model.auxiliary_head.update(in_channels=channels["feature4"], channels=config.auxiliary_channels)
    model.auxiliary_head.loss_decode.loss_weight = config.auxiliary_weight
    for head in (model.decode_head, model.auxiliary_head):
        head.update(dropout_ratio=config.dropout, align_corners=config.align_corners, norm_cfg=norm)
    window = (config.crop, config.crop)
    model.data_preprocessor.update(size=window, bgr_to_rgb=True)
    model.test_cfg = {"mode": "whole"}
    if config.slide_stride is not None:
        stride = (config.slide_stride, config.slide_stride)
        model.test_cfg = {"mode": "slide", "crop_size": window, "stride": stride}


def _set_data(base: Settings, config: Config, dataset: Dataset, device: str) -> None:
    for loader in (base.train_dataloader, base.test_dataloader):
        loader.update(num_workers=config.workers, persistent_workers=False, pin_memory=device == "cuda")
        for part in loader.dataset.get("datasets", [loader.dataset]):
            part.data_root = str(dataset.root / config.subfolder)
            # Without it, small crops are padded with 0 after normalisation, as in MMSegmentation 0.x.
            part.pipeline = [step for step in part.pipeline if step.type != "Pad"]
            for step in part.pipeline:
                step.update(_step(step.type, config, dataset))
    if config.batch_size % world_size():
        raise BadInput(
            f"batch_size: expected a multiple of the {world_size()} processes, found {config.batch_size}; "
            "start another number of them"
        )
    base.train_dataloader.batch_size = config.batch_size // world_size()
    base.train_dataloader.worker_init_fn = {"type": "ignore_signals"}
    base.train_dataloader.sampler = {"type": "DrawSampler"}
    base.train_dataloader.dataset = {
        "type": "SeededDataset",
        "dataset": base.train_dataloader.dataset,
        "seed": config.seed,
    }
    base.test_dataloader.sampler = {"type": "DefaultSampler", "shuffle": False, "round_up": False}
    base.test_evaluator = {"type": "AreaMetric"}
    base.val_dataloader = base.val_cfg = base.val_evaluator = None  # the test is a step of its own


def _step(name: str, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Return what the protocol says about the pipeline's step called `name`."""
    return {
        "LoadImageFromFile": {"type": "LoadImage"},
        "LoadAnnotations": {"type": "LoadMask", "classes": dataset.classes},
        "Resize": {"scale": config.resize},
        "RandomResize": {"scale": config.resize, "ratio_range": config.scale},
        "RandomCrop": {"crop_size": (config.crop, config.crop), "cat_max_ratio": config.category_ratio},
        "RandomFlip": {"prob": config.flip},
    }.get(name, {})


def _set_schedule(base: Settings, config: Config) -> None:
    base.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": config.iterations}
    base.optim_wrapper.optimizer.update(
        lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    # PolyLR is at its floor in iteration `end` - 1, counted from 0; the protocol's formula is after the last.
    base.param_scheduler[0].update(
        power=config.power, eta_min=config.lr_floor, begin=0, end=config.iterations + 1
    )


def check_dataset(base: Settings, dataset: Dataset) -> None:
    """Raise `BadInput` unless `dataset` is as it was verified and has MMSegmentation's classes in order."""
    for split in dataset.images:
        datasets.segmentation(dataset, split)
    expected = list(DATASETS.get(base.test_dataloader.dataset.type).METAINFO["classes"])
    if dataset.class_names != expected:
        raise BadInput(
            f"{dataset.name}: expected the {len(expected)} classes {', '.join(expected)}; found "
            f"{', '.join(dataset.class_names)}"
        )


# ---------------------------------------------------------------- images and masks


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """MMCV's decoder, as published; an image that it cannot read is named."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Raise `BadInput` for an image that is missing or damaged."""
        try:
            return super().transform(results)
        except (OSError, AssertionError):
            datasets.decode(Path(results["img_path"]))  # says what is wrong with it
            raise


@TRANSFORMS.register_module()
class LoadMask(LoadAnnotations):
    """MMSegmentation's reader of masks of `classes` classes; a mask that does not fit is named.

    All were verified with the dataset; what changed since then must not end as an assertion on a GPU.
    """

    def __init__(self, classes: int, **options: Any):
        super().__init__(**options)
        self.classes = classes

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Raise `BadInput` for a mask that is missing, damaged, of another size, or with a wrong label."""
        path = Path(results["seg_map_path"])
        try:
            results = super().transform(results)
        except (OSError, SyntaxError, ValueError):
            datasets.decode(path)
            raise
        labels, (height, width) = results["gt_seg_map"], results["ori_shape"]
        if labels.shape != (height, width):
            found = " × ".join(map(str, labels.shape[1::-1]))
            raise BadInput(
                f"{path}: expected {width} × {height} pixels, the size of its image, found {found}; restore "
                "both and verify the dataset again"
            )
        wrong = labels[(labels >= self.classes) & (labels != datasets.VOID)]
        if len(wrong):
            raise BadInput(
                f"{path}: expected class numbers 0 to {self.classes - 1} or {datasets.VOID}, found "
                f"{wrong[0]}; restore it and verify the dataset again"
            )
        return results


@DATA_SAMPLERS.register_module()
class DrawSampler(InfiniteSampler):
    """MMEngine's endless stream of permutations, as (number of the draw over all processes, index)."""

    def _indices_of_rank(self) -> Iterator[tuple[int, int]]:
        yield from islice(enumerate(self._infinite_indices()), self.rank, None, self.world_size)


@DATASETS.register_module()
class SeededDataset(torch.utils.data.Dataset):
    """Training images by (draw, index): what is random in one follows from the seed and the draw alone."""

    def __init__(self, dataset: dict[str, Any], seed: int):
        self.dataset = DATASETS.build(dataset)
        self.metainfo = self.dataset.metainfo
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        draw, index = item
        np.random.seed(np.random.SeedSequence((self.seed, draw)).generate_state(4))  # all steps draw from it
        return self.dataset[index]


FUNCTIONS.register_module(name="ignore_signals", module=ignore_signals)
