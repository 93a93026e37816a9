"""Fine-tuning and testing an FCN with MMSegmentation: what the segmentation benchmarks share.

Training and testing are separate steps: training leaves checkpoints, the test reads the last one, and a kill
anywhere loses at most the iterations since the last checkpoint. MMSegmentation is the maintained fork
(onedl-mmsegmentation); the packaged config is the base and every number of the protocol is set from `Config`.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import math
import pickle
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from simclr import BadInput, datasets
from simclr.distributed import process_group, rank, world_size
from simclr.model import resnet
from simclr.protocol import Metrics
from simclr.results import locked, replacing

if TYPE_CHECKING:
    from simclr.benchmarks.voc12aug_segmentation import Config
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

# At import the fork prints two bare lines and warns, both about packages that an FCN does not need.
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mmseg.datasets
    import mmseg.engine
    import mmseg.models
    import mmseg.visualization
    from mmengine.config import Config as Settings
    from mmengine.dataset import pseudo_collate
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from mmengine.runner.checkpoint import get_torch_safe_globals
    from mmseg.evaluation import IoUMetric
    from mmseg.registry import DATASETS, METRICS

SHEET_IMAGES = 4  # rows of the sheet of predictions


def evaluate(backbone: Backbone, dataset: Dataset, config: Config, work: Path) -> Metrics:
    """Fine-tune an FCN on `backbone` and return `miou`, `macc` and `aacc` of the val split, in percent.

    The run lives in a folder of its own under `work`, named by a hash of backbone, dataset and config, so
    that it never resumes another run's checkpoint. Details list the IoU of each class in percent, the classes
    that do not count and why, and how many tensors of the backbone were loaded. Raises `BadInput` when the
    dataset does not fit the protocol, the loss is not finite, or another process works on the same run.
    """
    with process_group() as device:
        inputs = inputs_of(backbone, dataset, config)
        folder = Path(work) / fingerprint(inputs)
        base = settings(config, backbone.architecture, dataset, folder, device.type)
        check_dataset(base, dataset)
        with locked(folder):
            if rank() == 0:
                describe(folder, inputs, base)
            checkpoint = train(base, backbone, config.iterations, folder)
            areas, sheet = test(base, checkpoint, folder)
    if areas["images"] != dataset.images["val"]:
        raise BadInput(
            f"{dataset.root}: expected {dataset.images['val']} val images, tested {areas['images']}"
        )
    metrics = scores(areas)
    metrics.details |= {
        "images": areas["images"],
        "backbone_tensors": json.loads((folder / "backbone.json").read_text()),
        "norm": base.model.backbone.norm_cfg.type,
        "predictions": str(sheet),
    }
    return metrics


# ---------------------------------------------------------------- the folder of a run


def fingerprint(inputs: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that stand for `inputs`."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def describe(folder: Path, inputs: dict[str, Any], base: Settings) -> None:
    """Write `run.json` into `folder`: what its name stands for, and MMSegmentation's config as it is run."""
    with replacing(folder / "run.json") as part:
        part.write_text(json.dumps({**inputs, "mmsegmentation": base.to_dict()}, indent=1) + "\n")


def inputs_of(backbone: Backbone, dataset: Dataset, config: Config) -> dict[str, Any]:
    """Return all that the result of a run depends on, as JSON values."""
    return {
        "checkpoint_sha256": backbone.checkpoint_sha256,
        "dataset": dataset.dataset.model_dump(),
        # What changes neither data nor arithmetic may change between a run and its resumption.
        "config": config.model_dump(mode="json", exclude={"workers", "checkpoint_every"}),
    }


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of the run in `folder`, or None before the first.

    MMEngine notes it by its absolute path; only the name counts here, so that the folder may be moved.
    """
    note = folder / "last_checkpoint"
    # MMEngine does not write the note whole or not at all: a kill may leave an empty one.
    name = Path(note.read_text().strip()).name if note.is_file() else ""
    return folder / name if name else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint that MMEngine wrote, on the CPU; no code of the file is run.

    Raises `BadInput` when the file is truncated or holds anything else than MMEngine's checkpoints do.
    """
    try:
        with torch.serialization.safe_globals(get_torch_safe_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"{path}: expected a checkpoint of this benchmark, found a truncated or foreign file ({reason}); "
            f"delete the folder {path.parent} to train again"
        ) from error


# ---------------------------------------------------------------- MMSegmentation's config


def settings(config: Config, architecture: str, dataset: Dataset, folder: Path, device: str) -> Settings:
    """Return MMSegmentation's packaged config with every value of the protocol set from `config`.

    `device` is "cpu" or "cuda". Raises `BadInput` when the batch cannot be dealt evenly over the processes.
    """
    base = Settings.fromfile(Path(mmseg.__file__).parent / ".mim" / "configs" / config.packaged)
    base.work_dir = str(folder)
    base.randomness = {"seed": config.seed}
    base.launcher = "pytorch" if world_size() > 1 else "none"
    if world_size() > 1 and device == "cpu":
        base.model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "device_ids": None,
            "broadcast_buffers": False,
        }
    _set_model(base.model, config, architecture, device)
    _set_data(base, config, dataset)
    _set_schedule(base, config)
    base.default_hooks.pop("visualization")
    base.default_hooks.logger.interval = min(50, math.ceil(config.iterations / 10))
    # With one checkpoint kept, MMEngine would delete it before it writes the next.
    base.default_hooks.checkpoint.update(interval=config.checkpoint_every, max_keep_ckpts=2)
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
    model.data_preprocessor.size = window
    model.test_cfg = {"mode": "whole"}
    if config.slide_stride is not None:
        stride = (config.slide_stride, config.slide_stride)
        model.test_cfg = {"mode": "slide", "crop_size": window, "stride": stride}


def _set_data(base: Settings, config: Config, dataset: Dataset) -> None:
    for loader in (base.train_dataloader, base.test_dataloader):
        loader.update(num_workers=config.workers, persistent_workers=config.workers > 0)
        for part in loader.dataset.get("datasets", [loader.dataset]):
            part.data_root = str(dataset.root / config.subfolder)
            # Without it, small crops are padded with 0 after normalisation, as in MMSegmentation 0.x.
            part.pipeline = [step for step in part.pipeline if step.type != "Pad"]
            for step in part.pipeline:
                step.update(_step(step.type, config))
    if config.batch_size % world_size():
        raise BadInput(
            f"batch_size: expected a multiple of the {world_size()} processes, found {config.batch_size}"
        )
    base.train_dataloader.batch_size = config.batch_size // world_size()
    base.test_evaluator = {"type": "AreaMetric"}
    base.val_dataloader = base.val_cfg = base.val_evaluator = None  # the test is a step of its own


def _step(name: str, config: Config) -> dict[str, Any]:
    """Return what the protocol says about the pipeline's step called `name`."""
    return {
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


# ---------------------------------------------------------------- training


def train(base: Settings, backbone: Backbone, iterations: int, folder: Path) -> Path:
    """Train to the last iteration, from the newest checkpoint if there is one; return the last checkpoint."""
    last, newest = folder / f"iter_{iterations}.pth", latest_checkpoint(folder)
    if newest == last:
        return last
    resumed = {}
    if newest is not None:
        read_checkpoint(newest)  # MMEngine would run what a foreign file says
        resumed = {"load_from": str(newest), "resume": True}
    runner = _runner(base, test_dataloader=None, test_cfg=None, test_evaluator=None, **resumed)
    runner.register_hook(LoadBackbone(backbone.state(), folder / "backbone.json"), priority="LOWEST")
    runner.register_hook(StopUnlessFinite())
    runner.train()
    return last


def _runner(base: Settings, **changes: Any) -> Runner:
    """Return a runner of `base` with `changes`, under a name that no other runner of the process has.

    It is told nothing but its arguments: given the whole config, MMEngine formats it as source code for every
    checkpoint, which takes seconds, and executes that source when it resumes.
    """
    name = f"segmentation-{time.time_ns()}"
    options = {**base, **changes, "experiment_name": name, "visualizer": {**base.visualizer, "name": name}}
    known = inspect.signature(Runner).parameters.keys() - {"cfg"}
    wrapper = {key: options[key] for key in ("model_wrapper_cfg",) if key in options}
    with warnings.catch_warnings():
        # The protocol's loss is the mean over all pixels, the ignored ones included.
        warnings.filterwarnings("ignore", message="Default ``avg_non_ignore`` is False")
        return Runner(**{key: value for key, value in options.items() if key in known}, cfg=wrapper)


def _unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


class LoadBackbone(Hook):
    """Before iteration 0, load `state` into the backbone, prove it, and write the count to `report`."""

    def __init__(self, state: Mapping[str, Tensor], report: Path):
        self.state = state
        self.report = report

    def before_train(self, runner: Runner) -> None:
        if runner.iter > 0:  # resumed: the checkpoint holds what became of these weights
            return
        backbone = _unwrapped(runner.model).backbone
        backbone.load_state_dict(self.state, strict=True)
        loaded = count_equal(backbone, self.state)
        runner.logger.info(f"backbone: {loaded} of {len(self.state)} tensors loaded")
        if rank() == 0:
            with replacing(self.report) as part:
                part.write_text(json.dumps({"expected": len(self.state), "loaded": loaded}))


def count_equal(module: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Return how many tensors `module` has, which are all equal to those of `state`, name by name.

    Raises `RuntimeError` listing those that are not, or that only one of the two has.
    """
    found = module.state_dict()
    wrong = [
        key
        for key in sorted({*found, *state})
        if key not in found or key not in state or not torch.equal(found[key].cpu(), state[key].cpu())
    ]
    if wrong:
        raise RuntimeError(
            f"the network does not hold the backbone's weights: {len(wrong)} of {len(state)} tensors differ, "
            f"among them {', '.join(wrong[:5])}"
        )
    return len(found)


class StopUnlessFinite(Hook):
    """Stop before a loss that is no number can reach a checkpoint."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Tensor] | None = None
    ) -> None:
        loss = float(outputs["loss"].detach())
        if not math.isfinite(loss):
            raise BadInput(
                f"the loss is {loss} in iteration {batch_idx + 1}; expected a finite number; lower the "
                "benchmark's `lr`, or look for a backbone that is itself broken"
            )


# ---------------------------------------------------------------- the test


def test(base: Settings, checkpoint: Path, folder: Path) -> tuple[dict[str, Any], Path]:
    """Test the weights of `checkpoint` on the val split.

    Returns the areas that `AreaMetric` adds up, and the path of a sheet with some predictions.
    """
    training = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler")
    runner = _runner(base, **dict.fromkeys(training), work_dir=str(folder / "test"))
    _unwrapped(runner.model).load_state_dict(read_checkpoint(checkpoint)["state_dict"], strict=True)
    areas = runner.test()
    sheet = folder / "predictions.png"
    if rank() == 0:
        with replacing(sheet) as part:
            draw_sheet(runner).save(part, format="png")
    return areas, sheet


@METRICS.register_module()
class AreaMetric(IoUMetric):
    """MMSegmentation's areas per class, added up as integers and neither divided nor rounded."""

    default_prefix = ""

    def process(self, data_batch: dict[str, Any], data_samples: list[dict[str, Any]]) -> None:
        """Add the areas of some images; raises `BadInput` for a label that is neither a class nor 255."""
        for sample in data_samples:
            labels = sample["gt_sem_seg"]["data"]
            wrong = labels[(labels >= len(self.dataset_meta["classes"])) & (labels != self.ignore_index)]
            if len(wrong):
                raise BadInput(f"{sample['seg_map_path']}: label {int(wrong[0])} is no class of this dataset")
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, Any]:
        """Return `intersection`, `union`, `prediction` and `truth` in pixels per class, and `images`."""
        names = ("intersection", "union", "prediction", "truth")
        areas = (torch.stack(areas).long().sum(0).tolist() for areas in zip(*results, strict=True))
        return {
            "classes": list(self.dataset_meta["classes"]),
            "images": len(results),
            **dict(zip(names, areas, strict=True)),
        }


def scores(areas: dict[str, Any]) -> Metrics:
    """Return mean IoU, mean accuracy and pixel accuracy in percent of `areas`, as `AreaMetric` returns them.

    As in MMSegmentation, a class without a pixel in both truth and prediction leaves the mean of the IoU, one
    without a pixel in the truth that of the accuracy. Raises `BadInput` when no class is left.
    """
    classes = np.array(areas["classes"])
    intersection, union, truth = (np.array(areas[key]) for key in ("intersection", "union", "truth"))
    counts, labelled = union > 0, truth > 0
    if not labelled.any():
        raise BadInput("the val split has no labelled pixel, so there is no mIoU; look at its masks")
    iou = 100 * intersection[counts] / union[counts]
    accuracy = 100 * intersection[labelled] / truth[labelled]
    reason = "no pixel of it in the ground truth or in the predictions"
    return Metrics(
        {
            "miou": iou.mean(),
            "macc": accuracy.mean(),
            "aacc": 100 * intersection.sum() / truth.sum(),
        },
        details={
            "iou": dict(zip(classes[counts].tolist(), iou.tolist(), strict=True)),
            "not_counted": dict.fromkeys(classes[~counts].tolist(), reason),
            "predicted_only": classes[counts & ~labelled].tolist(),
        },
    )


def draw_sheet(runner: Runner) -> Image.Image:
    """Return `SHEET_IMAGES` val images, evenly spaced, each beside its ground truth and its prediction."""
    dataset = runner.test_dataloader.dataset
    palette = np.array([*dataset.metainfo["palette"], *[[255] * 3] * 256], dtype=np.uint8)[:256]
    rows = []
    for i in range(0, len(dataset), math.ceil(len(dataset) / SHEET_IMAGES)):
        sample = dataset[i]
        with torch.no_grad():
            (predicted,) = runner.model.test_step(pseudo_collate([sample]))
        image = np.asarray(Image.open(predicted.img_path).convert("RGB"))
        maps = (predicted.gt_sem_seg, predicted.pred_sem_seg)
        rows.append([image, *(palette[part.data.squeeze().cpu().numpy()] for part in maps)])
    height, width = (max(row[0].shape[axis] for row in rows) for axis in (0, 1))
    sheet = Image.new("RGB", (3 * width, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, part in enumerate(row):
            sheet.paste(Image.fromarray(part), (x * width, y * height))
    return sheet
