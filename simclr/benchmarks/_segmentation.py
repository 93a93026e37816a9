"""Fine-tuning and testing an FCN with MMSegmentation: what the segmentation benchmarks share.

Training and testing are separate steps: training leaves checkpoints, the test reads the last one. A kill
anywhere loses at most the iterations since the last checkpoint, SIGTERM and SIGUSR1 lose none, and on a CPU a
training that was resumed ends in the weights of one that was not. The packaged config is the base, and every
number of the protocol is set from `Config` (`_segmentation_config`).
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
import sys
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from simclr import BadInput, devices, distributed, files, loading, rolling
from simclr.benchmarks import _segmentation_sheet as sheet
from simclr.benchmarks._mmseg import (
    DATASETS,
    METRICS,
    Hook,
    IoUMetric,
    Runner,
    Settings,
    get_torch_safe_globals,
    pseudo_collate,
)
from simclr.benchmarks._segmentation_config import check_dataset, settings
from simclr.datasets import decode
from simclr.files import replacing
from simclr.protocol import Metrics

if TYPE_CHECKING:
    from simclr.benchmarks.voc12aug_segmentation import Config
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset


class Job(NamedTuple):
    """A run on a machine."""

    config: Config
    dataset: Dataset
    run: dict[str, Any]  # all that the result depends on
    folder: Path
    device: torch.device


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, picture: Path | None = None
) -> Metrics:
    """Fine-tune an FCN on `backbone` and return `miou`, `macc` and `aacc` of the val split, in percent.

    The run lives in a folder of its own under `work`, named by a hash of backbone, dataset and config, and
    each of its checkpoints says whose it is: another run's is never resumed. `picture` is a PNG to write, of
    some images with ground truth and prediction. Details list the IoU of each class in percent, the classes
    that do not count and why, how many tensors of the backbone were loaded, and what the run cost. Raises
    `BadInput` when the dataset does not fit the protocol, the loss is not finite, the folder holds another
    run's checkpoint, or another process works on the same run.
    """
    run = inputs_of(backbone, dataset, config)
    with distributed.process_group() as device, files.workplace(work, run) as folder:
        devices.float32_as_published()
        job = Job(config, dataset, run, folder, device)
        base = settings(config, backbone.architecture, dataset, folder, device.type)
        check_dataset(base, dataset)
        check_count(dataset, ("val",), _count_tested(base))
        state = read_checkpoint(train(job, base, backbone))
        started = time.monotonic()
        areas = test(job, base, state["state_dict"], picture)
        details = run_details(job, Cost(**state["cost"]), time.monotonic() - started)
    check_count(dataset, ("val",), areas["images"])
    metrics = scores(areas)
    metrics.details |= {"images": areas["images"], **details}
    return metrics


def inputs_of(backbone: Backbone, dataset: Dataset, config: Config) -> dict[str, Any]:
    """Return all that the result of a run depends on, as JSON values."""
    # What changes neither data nor arithmetic may change between a run and its resumption.
    protocol = config.model_dump_json(exclude={"workers", "checkpoint_every"})
    return {
        "checkpoint_sha256": backbone.checkpoint_sha256,
        "dataset": dataset.dataset.model_dump(),
        "config": json.loads(protocol),
    }


def _count_tested(base: Settings) -> int:
    """Return how many images the test will have."""
    return len(DATASETS.build({**base.test_dataloader.dataset, "pipeline": []}))


def check_count(dataset: Dataset, splits: Collection[str], found: int) -> None:
    """Raise `BadInput` unless MMSegmentation has found as many images as were verified."""
    expected = sum(dataset.images[split] for split in splits)
    if found != expected:
        raise BadInput(
            f"{dataset.root}: expected {expected:,} images in {' and '.join(splits)}, found {found:,}; "
            "verify the dataset again"
        )


# ---------------------------------------------------------------- what a run costs


class Cost(NamedTuple):
    """What a training has taken, without what was lost to kills."""

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory_gb: float = 0.0  # of the first process: on its GPU, or on the CPU all that was resident

    def plus(self, seconds: float, device: torch.device) -> Cost:
        """Return the cost after so many seconds more, by all processes."""
        gpus = distributed.world_size() if device.type == "cuda" else 0
        return Cost(
            self.seconds + seconds,
            self.gpu_seconds + gpus * seconds,
            max(self.peak_memory_gb, devices.peak_memory_gb()),
        )


def run_details(job: Job, training: Cost, seconds: float) -> dict[str, Any]:
    """Return what the record says of how a run was made, the last `seconds` of it the test."""
    processes = distributed.world_size()
    total = training.plus(seconds, job.device)
    return {
        "backbone_tensors": json.loads((job.folder / "backbone.json").read_text()),
        "norm": "SyncBN" if processes > 1 else "BN",
        "processes": processes,
        "batch_per_process": job.config.batch_size // processes,
        "seconds_per_iteration": training.seconds / job.config.iterations,
        "gpu_hours": total.gpu_seconds / 3600,
        "peak_memory_gb": total.peak_memory_gb,
    }


# ---------------------------------------------------------------- checkpoints


def checkpoint_path(folder: Path, iterations: int) -> Path:
    """Return where the state after so many iterations lies; names sort by it."""
    return folder / f"iter_{iterations:09d}.pth"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint that MMEngine wrote, on the CPU; no code of the file is run.

    Raises `BadInput` when the file is truncated or holds anything else than MMEngine's checkpoints do.
    """
    try:
        with torch.serialization.safe_globals(get_torch_safe_globals()):
            state = torch.load(path, map_location="cpu", weights_only=True)
            return {key: state[key] for key in ("run", "cost", "state_dict", "meta")}
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError) as error:
        reason = (str(error).strip() or "it is empty").splitlines()[0]
        raise BadInput(
            f"{path}: expected a checkpoint of this benchmark, found a truncated or foreign file ({reason}); "
            f"delete the folder {path.parent} to train again"
        ) from error


def newest_checkpoint(job: Job) -> Path | None:
    """Return the newest whole checkpoint of the run, or None before the first; the same in all processes.

    For a broken one it takes the one before, with a warning. Raises `BadInput` when none is whole, for the
    checkpoint of another run, naming what differs, and when the processes do not find the same.
    """
    path = _newest(job)
    steps = distributed.of_all_ranks(int(path.stem.removeprefix("iter_")) if path else 0)
    if len(set(steps)) > 1:
        raise BadInput(
            f"{job.folder}: the processes found checkpoints of iterations {', '.join(map(str, steps))}; "
            "expected one for all; --work must be one folder that all nodes share"
        )
    return path


def _newest(job: Job) -> Path | None:
    faults = []
    for path in sorted(job.folder.glob("iter_*.pth"), reverse=True):
        try:
            state = read_checkpoint(path)
        except BadInput as error:
            faults.append(error)
            if distributed.rank() == 0:
                print(f"{error}; for now, going on from the one before", file=sys.stderr)
            continue
        rolling.check_run(path, state, job.run)
        return path
    if faults:
        raise faults[0]
    return None


class Checkpoints(Hook):
    """Write the state every so often, after the last iteration, and when a signal asks to stop.

    Each is written whole or not at all, says whose it is and what it cost, and the newest two are kept. A
    loss that is no number stops the run before it can reach one.
    """

    priority = "VERY_LOW"  # after the scheduler has set the next learning rate

    def __init__(self, job: Job, signals: list[int]):
        self.job, self.signals = job, signals
        self.before, self.since = Cost(), time.monotonic()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Go on counting from what the run has cost."""
        self.before = Cost(**checkpoint["cost"])

    def before_train(self, runner: Runner) -> None:
        """Start the clock."""
        self.since = time.monotonic()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint of MMEngine whose it is and what it cost."""
        cost = self.before.plus(time.monotonic() - self.since, self.job.device)
        checkpoint |= {"run": self.job.run, "cost": cost._asdict()}

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Tensor] | None = None
    ) -> None:
        """Raise `BadInput` in all processes for a loss that is no number in one; exit when asked to stop."""
        loss = outputs["loss"].detach().float().reshape(1)
        asked = loss.new_tensor([float(bool(self.signals))])
        loss, asked = distributed.total(torch.cat([loss, asked])).tolist()
        done, last = batch_idx + 1, self.job.config.iterations
        if not math.isfinite(loss):
            raise BadInput(
                f"the loss is {loss} in iteration {done}; expected a finite number; lower the "
                "benchmark's `lr`, or look for a backbone that is itself broken"
            )
        if asked or done == last or done % self.job.config.checkpoint_every == 0:
            if distributed.rank() == 0:
                self.save(runner, done)
            distributed.barrier()
        if asked and done < last:
            rolling.stop(f"after iteration {done} of {last}", self.signals)

    def save(self, runner: Runner, iterations: int) -> None:
        """Write the state after so many iterations, and drop all but the newest two up to it."""
        path = checkpoint_path(self.job.folder, iterations)
        with replacing(path) as part:
            runner.save_checkpoint(str(part.parent), part.name, by_epoch=False)
        rolling.drop_others(path, "iter_*.pth")


# ---------------------------------------------------------------- training


def train(job: Job, base: Settings, backbone: Backbone) -> Path:
    """Train to the last iteration, from the newest checkpoint if there is one; return the last checkpoint."""
    last, newest = checkpoint_path(job.folder, job.config.iterations), newest_checkpoint(job)
    if newest == last:
        return last
    if distributed.rank() == 0:
        with replacing(job.folder / "mmsegmentation.json") as part:
            part.write_text(json.dumps(base.to_dict(), indent=1) + "\n")
    resumed = {"load_from": str(newest), "resume": True} if newest else {}
    runner = _runner(base, test_dataloader=None, test_cfg=None, test_evaluator=None, **resumed)
    if distributed.world_size() > 1 and job.device.type == "cpu":
        distributed.sync_batchnorm(_unwrapped(runner.model))  # MMSegmentation has it for GPUs only
    splits = [split for split in job.dataset.images if split != "val"]
    check_count(job.dataset, splits, len(runner.train_loop.dataloader.dataset))
    runner.register_hook(LoadBackbone(backbone.state(), job.folder / "backbone.json"), priority="LOWEST")
    runner.register_hook(Reseed(job.config.seed))
    with rolling.stop_signals() as signals:
        runner.register_hook(Checkpoints(job, signals))
        try:
            runner.train()
        finally:
            # Where its making failed, the runner's loop is not yet one.
            iterator = getattr(runner._train_loop, "dataloader_iterator", None)
            loading.end_workers(getattr(iterator, "_iterator", None))
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
        """Raise `RuntimeError` unless every tensor of the backbone is the source's."""
        if runner.iter > 0:  # resumed: the checkpoint holds what became of these weights
            return
        backbone = _unwrapped(runner.model).backbone
        backbone.load_state_dict(self.state, strict=True)
        loaded = count_equal(backbone, self.state)
        runner.logger.info(f"backbone: {loaded} of {len(self.state)} tensors loaded")
        if distributed.rank() == 0:
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


class Reseed(Hook):
    """Before each iteration, seed what the network draws (dropout) by seed, iteration and process alone."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed torch on all devices."""
        drawn = np.random.SeedSequence((self.seed, batch_idx, distributed.rank())).generate_state(1)
        torch.manual_seed(int(drawn[0]))


# ---------------------------------------------------------------- the test


def test(job: Job, base: Settings, weights: Mapping[str, Tensor], picture: Path | None) -> dict[str, Any]:
    """Test `weights` on the val split; return the areas that `AreaMetric` adds up, and draw `picture`."""
    training = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler")
    runner = _runner(base, **dict.fromkeys(training), work_dir=str(job.folder / "test"))
    _unwrapped(runner.model).load_state_dict(weights, strict=True)
    areas = runner.test()
    if picture is not None and distributed.rank() == 0:
        with replacing(picture) as part:
            draw_sheet(runner).save(part, format="png")
    return areas


@METRICS.register_module()
class AreaMetric(IoUMetric):
    """MMSegmentation's areas per class, added up as integers and neither divided nor rounded."""

    def evaluate(self, size: int) -> dict[str, Any]:
        """Return `intersection`, `union`, `prediction` and `truth` in pixels per class, and `images`.

        They are sums over the images of all processes, none of which has an image of another.
        """
        classes = list(self.dataset_meta["classes"])
        areas = torch.zeros(4, len(classes), dtype=torch.long)
        for image in self.results:
            areas += torch.stack(image).long().cpu()
        images = torch.tensor(len(self.results))
        self.results.clear()
        areas, images = (distributed.total(distributed.on_device(each)).tolist() for each in (areas, images))
        names = ("intersection", "union", "prediction", "truth")
        return {"classes": classes, "images": images, **dict(zip(names, areas, strict=True))}


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
    """Return some val images, always the same, each beside its ground truth and its prediction."""
    dataset = runner.test_dataloader.dataset
    rows = []
    for i in sheet.chosen(len(dataset)):
        with torch.no_grad():
            (tested,) = runner.model.test_step(pseudo_collate([dataset[i]]))
        maps = (tested.gt_sem_seg, tested.pred_sem_seg)
        truth, predicted = (part.data.squeeze().cpu().numpy() for part in maps)
        rows.append((decode(Path(tested.img_path), truth.shape[::-1]), truth, predicted))
    return sheet.draw(rows, dataset.metainfo["classes"], dataset.metainfo["palette"])
