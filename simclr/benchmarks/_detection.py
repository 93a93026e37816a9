"""What the detection benchmarks share: trials, and the two engines behind one file interface.

An engine trains a detector and detects; it computes no metric, so both are measured by the same code here.
It reads a spec (JSON: protocol, masks, classes, backbone, architecture, train and test lists, folder, seed,
and whose run it is) and writes a result (JSON: engine, software, load report, usage, losses, detections):

    python -m simclr.benchmarks._detection_detectron2 SPEC RESULT

Detectron2 so runs in a Python of its own where `SIMCLR_DETECTRON2_PYTHON` names one. Either engine uses every
visible GPU, or the first `SIMCLR_GPUS` of them. A list holds one image per line, as JSON in Detectron2's
layout. A detection has `image_id`, `category_id` from 0, `bbox` as x0 y0 x1 y1 in pixels of the original
image, `score`, `segmentation` (RLE).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simclr import BadInput
from simclr.files import clear, locked, replacing, workplace

if TYPE_CHECKING:
    from PIL import Image

    from simclr.benchmarks.voc0712_detection import Config
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset
    from simclr.protocol import Metrics

Json = dict[str, Any]
# What may change without another training.
FREE_KEYS = {"trials", "seed", "checkpoint_every"}
REFUSAL = "refused.txt"  # of an engine, beside where its result would be
# What a run with another number of images per iteration has by the linear rule.
SCHEDULE = ("batch_size", "lr", "iterations", "steps", "warmup_iterations")


def evaluate(
    backbone: Backbone,
    dataset: Dataset,
    config: Config,
    work: Path,
    measure: Callable[..., Metrics],
    picture: Path | None = None,
) -> Metrics:
    """Train and test `config.trials` detectors in `work`; return the mean of what `measure` finds, percent.

    `measure(test images, detections, class names)` is one of `_detection_metrics`. `picture` is a PNG
    file of some test images with what was detected in the first trial.
    """
    from simclr import datasets, rolling
    from simclr.benchmarks._detection_metrics import check_truth, measured
    from simclr.benchmarks._detection_sheet import draw

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("detection starts one process per GPU itself: call it once, without torchrun")
    truth = datasets.detection(dataset, config.test_split)
    check_truth(measure, truth, dataset.class_names)
    run = identity(backbone, dataset, config)
    with workplace(work, run) as folder, rolling.queued_again_in_time():
        spec = _prepare(folder, backbone, dataset, config, truth)
        seeds = range(config.seed, config.seed + config.trials)
        results = [_trial(spec | {"seed": s, "run": {**run, "seed": s}}, folder) for s in seeds]
    values = [measured(measure, truth, result["detections"], dataset.class_names) for result in results]
    if picture is not None:
        draw(truth, results[0]["detections"], dataset.class_names, picture)
    metrics = _summary(values, results)
    metrics.details |= {
        "variant": config.variant,
        "schedule": {key: spec["protocol"][key] for key in SCHEDULE},
    }
    return metrics


def _summary(values: list[Metrics], results: list[Json]) -> Metrics:
    from simclr.protocol import Metrics

    table = {key: np.array([value[key] for value in values]) for key in values[0]}
    several = len(values) > 1
    return Metrics(
        {key: float(column.mean()) for key, column in table.items()},
        spread={key: float(column.std(ddof=1)) for key, column in table.items()} if several else {},
        trials={key: len(column) for key, column in table.items()} if several else {},
        details={
            **{key: results[0][key] for key in ("engine", "software", "load")},
            **total([result["usage"] for result in results]),
            "last_losses": results[0]["losses"],
            "trials": [{**value, **value.details} for value in values],
        },
    )


def total(usages: list[Json]) -> Json:
    """Return what all trials took together: the usual seconds per iteration, most memory, all GPU-hours."""
    gpu_seconds = sum(
        each["processes"] * (each["seconds"] + each["test_seconds"]) for each in usages if each["gpu"]
    )
    return {
        "processes": usages[0]["processes"],
        "gpu": usages[0]["gpu"],
        "seconds_per_iteration": float(np.median([each["seconds_per_iteration"] for each in usages])),
        "peak_memory_gb": max(each["peak_memory_gb"] for each in usages),
        "gpu_hours": gpu_seconds / 3600,
    }


# ---------------------------------------------------------------- the work folder


def identity(backbone: Backbone, dataset: Dataset, config: Config) -> Json:
    """Return all that the result of a run depends on; a run of another has a folder of its own."""
    return {
        "protocol": config.model_dump(mode="json", exclude=FREE_KEYS),
        "checkpoint_sha256": backbone.checkpoint_sha256,
        "manifest_sha256": dataset.dataset.manifest_sha256,
    }


def _prepare(folder: Path, backbone: Backbone, dataset: Dataset, config: Config, truth: list[Json]) -> Json:
    """Write the lists of images and return the spec that all trials share."""
    from simclr import datasets

    lists = {"train": folder / "train.jsonl", "test": folder / "test.jsonl"}
    images = (image for split in config.train_splits for image in datasets.detection(dataset, split))
    train = training_images(images, config.masks, config.train_difficult)
    if not train:
        raise BadInput(f"{dataset.name}: no training image has an object; nothing can be learned")
    write_lines(lists["train"], train)
    # The engines see no truth of the test images.
    keys = ("image_id", "height", "width")
    write_lines(lists["test"], ({**_file(image), **{key: image[key] for key in keys}} for image in truth))
    return {
        "engine": config.engine,
        "protocol": scaled(config.model_dump(mode="json")),
        "masks": config.masks,
        "classes": dataset.classes,
        "backbone": str(backbone.path.resolve()),
        "architecture": backbone.architecture,
        **{key: str(path.resolve()) for key, path in lists.items()},
    }


def scaled(protocol: Json) -> Json:
    """Return the protocol with the schedule that `images_per_iteration` asks for, which then is `batch_size`.

    The linear rule of Goyal et al. 2017 ("Accurate, Large Minibatch SGD", section 2.1), rounded as by
    Detectron2's auto_scale_workers.
    """
    images = protocol["images_per_iteration"] or protocol["batch_size"]
    ratio = images / protocol["batch_size"]
    return {
        **protocol,
        "batch_size": images,
        "images_per_iteration": None,
        "lr": protocol["lr"] * ratio,
        "iterations": max(round(protocol["iterations"] / ratio), 1),
        "steps": [round(step / ratio) for step in protocol["steps"]],
        "warmup_iterations": round(protocol["warmup_iterations"] / ratio),
    }


def training_images(images: Iterable[Json], masks: bool, difficult: bool = True) -> list[Json]:
    """Return the images that have objects, with their usable objects: no crowds, with masks only polygons.

    Difficult objects stay (Detectron2, pascal_voc.py) unless `difficult` is False. A polygon needs three
    points; an object without any such polygon is left out (Detectron2, coco.py).
    """
    kept = []
    for image in images:
        wanted = (e for e in image["annotations"] if not e["iscrowd"] and (difficult or not e["difficult"]))
        objects = [usable for each in wanted if (usable := _usable(each, masks, image))]
        if objects:
            kept.append({**image, **_file(image), "annotations": objects})
    return kept


def _file(image: Json) -> Json:
    return {"file_name": os.path.abspath(image["file_name"])}


def _usable(annotation: Json, masks: bool, image: Json) -> Json | None:
    usable = {"bbox": list(annotation["bbox"]), "category_id": annotation["category_id"], "iscrowd": 0}
    if not masks:
        return usable
    polygons = annotation["segmentation"]
    if not isinstance(polygons, list):
        raise BadInput(f"{image['file_name']}: an object that is no crowd has an RLE; expected polygons")
    polygons = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    return {**usable, "segmentation": polygons} if polygons else None


def write_lines(path: Path, items: Iterable[Json]) -> None:
    """Write one JSON object per line, whole or not at all."""
    with replacing(path) as part, part.open("w") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def read_lines(path: str | Path) -> list[Json]:
    """Read what `write_lines` wrote."""
    with Path(path).open() as file:
        return [json.loads(line) for line in file]


def decoded(line: Json) -> Image.Image:
    """Return the image of a list's line, RGB; raises `BadInput` for a file that is not as it was verified."""
    from simclr.datasets import decode

    annotated = (line["width"], line["height"])
    image = decode(Path(line["file_name"]), annotated)
    if image.size != annotated:
        raise BadInput(
            f"{line['file_name']}: expected {line['width']} × {line['height']} pixels, as its annotation "
            f"says; found {image.size[0]} × {image.size[1]}"
        )
    return image


# ---------------------------------------------------------------- the engines


def _trial(spec: Json, folder: Path) -> Json:
    """Return the result of the run of one seed, from its file if it is there.

    Raises `BadInput` for that of another run, naming what differs.
    """
    from simclr.rolling import check_run

    folder = folder / f"seed{spec['seed']}"
    result = folder / "result.json"
    if not result.is_file():
        spec_file = folder / "spec.json"
        spec = {**spec, "folder": str(folder.resolve())}
        with replacing(spec_file) as part:
            part.write_text(json.dumps(spec, indent=1))
        _run(spec["engine"], spec_file, result)
    found = json.loads(result.read_text())
    check_run(result, found, spec["run"])
    return found


def _run(engine: str, spec: Path, result: Path) -> None:
    """Run an engine on a spec file; raises `BadInput` with the engine's sentence when it refuses the spec."""
    result.with_name(REFUSAL).unlink(missing_ok=True)
    module = f"simclr.benchmarks._detection_{engine}"
    command = _detectron2_command() if engine == "detectron2" else _torchvision_command()
    if engine == "detectron2":
        check_python(command[0])
    if command is None:
        status = main(importlib.import_module(module).run, [str(spec), str(result)])
    else:
        status = _call([*command, "-m", module, str(spec), str(result)], _environment())
    refusal = result.with_name(REFUSAL)
    if refusal.is_file():
        raise BadInput(refusal.read_text())
    if status == 2:
        raise BadInput(
            f"{refusal}: no space for what the {engine} engine has to say; free some, then give the same "
            "command again"
        )
    if status != 0:
        raise RuntimeError(f"the {engine} engine ended with status {status}; its own messages stand above")


def _environment() -> dict[str, str]:
    """Return the environment of an engine that is a program of its own."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Of torchrun, which would leave its processes behind on SIGUSR1.
    signals = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}
    # The time of a job of Slurm is watched by this process, which asks the engine to stop.
    inherited = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    return {**inherited, **signals, "PYTHONPATH": path}


def _call(command: list[str], environment: dict[str, str]) -> int:
    """Run a program, which never outlives this call; return its exit status.

    What asks this process to stop reaches it as SIGTERM; once it has ended, this one exits with `STOPPED`.
    """
    from simclr.rolling import STOPPED

    programs: list[subprocess.Popen] = []
    with (
        handing_on(lambda: [program.terminate() for program in programs]) as received,
        subprocess.Popen(command, env=environment) as program,
    ):
        programs.append(program)
        if received:  # while it was started
            program.terminate()
        try:
            status = program.wait()
        finally:
            program.terminate()
    if signal.SIGALRM in received:
        signal.raise_signal(signal.SIGALRM)  # to what queues the job again
    if received or status == STOPPED:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    return status


@contextlib.contextmanager
def handing_on(stop: Callable[[], Any]) -> Iterator[list[int]]:
    """Call `stop` at each signal that asks this process to stop, and collect it, instead of dying of it."""
    from simclr.rolling import ASKING, handling

    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        stop()

    with handling(ASKING, receive):
        yield received


def _detectron2_command() -> list[str]:
    python = os.environ.get("SIMCLR_DETECTRON2_PYTHON")
    if python is None and importlib.util.find_spec("detectron2") is None:
        raise BadInput(
            "engine: detectron2 is not installed here: create the environment envs/detectron2.yaml and run "
            "in it, or name its Python in SIMCLR_DETECTRON2_PYTHON, or set engine: torchvision"
        )
    if python is not None and shutil.which(python) is None:
        raise BadInput(
            f"SIMCLR_DETECTRON2_PYTHON: expected the Python of an environment with Detectron2, found no "
            f"program {python}; correct the path, or set engine: torchvision"
        )
    return [python or sys.executable]


@functools.cache
def check_python(python: str) -> None:
    """Raise `BadInput` unless all that the Detectron2 engine needs can be imported there."""
    program = (
        "from simclr.benchmarks import _detection_detectron2 as engine; engine.known()\n"
        "import detectron2._C, detectron2.engine, pycocotools.mask, torchvision, simclr.checkpoint"
    )
    call = [python, "-c", program]
    done = subprocess.run(call, env=_environment(), capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr.strip() or f"it ended with status {done.returncode}").splitlines()[-1]
        raise BadInput(
            f"engine: {python} cannot run Detectron2 ({said.removeprefix('simclr.BadInput: ')}); create the "
            "environment envs/detectron2.yaml and name its Python in SIMCLR_DETECTRON2_PYTHON, or set "
            "engine: torchvision"
        )


def _torchvision_command() -> list[str] | None:
    """Return how to start one process per GPU; None: this process will do."""
    count = processes()
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [sys.executable, "-m", *launcher] if count > 1 else None


def processes() -> int:
    """Return how many processes share a training: one per GPU, on the CPU one.

    `SIMCLR_GPUS` says how many of the visible GPUs are this job's. Raises `BadInput` where there are fewer.
    """
    import torch

    visible = torch.cuda.device_count()
    wanted = os.environ.get("SIMCLR_GPUS", str(visible))
    if not visible and "SIMCLR_ALLOW_CPU" in os.environ:
        return 1
    if not wanted.isdecimal() or not min(visible, 1) <= int(wanted) <= visible:
        raise BadInput(
            f"SIMCLR_GPUS: expected a number of GPUs of the {visible} that torch sees, found {wanted}; let "
            "`gpus` of the model be what the machine has, or 0, or work on the CPU with SIMCLR_ALLOW_CPU=1"
        )
    return max(int(wanted), 1)


def main(run: Callable[[Json], Json | None], arguments: list[str]) -> int:
    """Run an engine as a program of two file names; return the exit status, 2 for bad input.

    `run` takes the spec and returns the result, or None on all but the first process.
    """
    spec, result = map(Path, arguments)
    try:
        # The caller holds the folder above; an engine that outlives a killed caller still holds its own.
        with refusing(result.parent), locked(spec.parent):
            if int(os.environ.get("RANK", 0)) == 0:
                clear(spec.parent)
            given = json.loads(spec.read_text())
            outcome = run(given)
    except BadInput:
        return 2
    if outcome is not None:
        with replacing(result) as part:
            part.write_text(json.dumps({"run": given["run"], **outcome}, allow_nan=False))
    return 0


@contextlib.contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Leave the sentence of a `BadInput` in `folder`, for the process that started this one.

    That the GPU has too little memory is one, too.
    """
    import torch

    try:
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            said = str(error).split(". ")[0]
            raise BadInput(
                f"the GPU has too little memory ({said}); let `gpus` of the model be more, or set "
                "images_per_iteration of the benchmark to fewer than it has"
            ) from error
    except BadInput as error:
        with replacing(folder / REFUSAL) as part:
            part.write_text(str(error))
        raise


class Clock:
    """Seconds of a training, those before it was resumed included: a part of its checkpoints."""

    def __init__(self) -> None:
        self.before, self.began = 0.0, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.before, self.began = state["seconds"], time.monotonic()


def rle(mask: np.ndarray) -> Json:
    """Return a mask `(H, W)` of 0 and 1 as the run lengths that a result file holds."""
    from pycocotools import mask as coco

    found = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode()}


def usage(clock: Clock, seconds_per_iteration: float, processes: int) -> Json:
    """Return what a training took: `seconds` by the clock, what was lost to kills left out; the first
    process's memory.
    """
    import torch

    from simclr import devices

    return {
        "processes": processes,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "seconds": clock.seconds(),
        "seconds_per_iteration": seconds_per_iteration,
        "peak_memory_gb": devices.peak_memory_gb(),
    }


def load_report(found: dict[str, Any], expected: dict[str, Any], engine: str) -> Json:
    """Compare the backbone's tensors with those in the built detector, key by key.

    `found` maps a backbone's key to the detector's tensor, or None where it has none. Raises `BadInput`
    naming the tensors that did not arrive.
    """
    import torch

    unmatched = [
        key
        for key, value in expected.items()
        if found.get(key) is None or not torch.equal(found[key].detach().cpu(), value)
    ]
    report = {
        "expected": len(expected),
        "loaded": len(expected) - len(unmatched),
        "unmatched": unmatched,
    }
    if unmatched:
        raise BadInput(
            f"{engine}: {len(unmatched)} of {len(expected)} backbone tensors did not arrive in the detector, "
            f"e.g. {', '.join(unmatched[:4])}; nothing was trained"
        )
    return report


def feature_report(features: Callable[[Any], Json], state: dict[str, Any]) -> Json:
    """Compare the maps that the detector's backbone makes of a fixed input with those of its source.

    Every tensor may be in its place and the maps still be others, with the stride in the 1×1 convolution,
    say. Raises `BadInput` for the first that differs.
    """
    from simclr import checkpoint

    images = checkpoint.fixed_input()
    said = checkpoint.agreement(features(images), checkpoint.plain_features(state, images))
    return {"largest_relative_difference": said["largest_relative_difference"]}


def per_process(batch_size: int, processes: int) -> int:
    """Return the images of one process per iteration; raises `BadInput` when they do not divide evenly."""
    if batch_size % processes:
        raise BadInput(
            f"batch_size {batch_size} must be a multiple of the {processes} GPUs; "
            "set SIMCLR_GPUS to a number that divides it"
        )
    return batch_size // processes
