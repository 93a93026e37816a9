"""The benchmarks, in page order. One file each: `TITLE`, `COLUMNS`, `Config`, `evaluate`; and `NOTE`, what a
reader of the numbers on the page must know, where there is such a thing.

These files are imported to read the config, so they import nothing heavy before `evaluate` is called.
The parameters of `evaluate` are the step's inputs: `train: Features` is `--train FOLDER` on the command
line and the keyword `train=` in Python.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from simclr import BadInput

BENCHMARKS = (
    "voc07_svm",
    "voc07_lowshot",
    "imagenet_mhead",
    "imagenet_linear",
    "places205_mhead",
    "inat18_mhead",
    "imagenet_knn",
    "imagenet_semi",
    "voc0712_detection",
    "coco2017_detection",
    "voc12aug_segmentation",
    "cityscapes_segmentation",
)


def load(name: str) -> ModuleType:
    """Return the module of benchmark `name`."""
    return importlib.import_module(f"simclr.benchmarks.{name}")


def run(name: str, model: str, config: Any, output: Path, inputs: dict[str, Any]) -> None:
    """Evaluate one benchmark on opened `inputs` and write its record to `output`, whole or not at all.

    `config` is the benchmark's `Config`. Raises `BadInput` when two inputs come from different checkpoints,
    when `output` is a folder, or when a metric is not a finite number: a failure is never written as a value.
    """
    from simclr import results

    if output.is_dir():
        raise BadInput(f"--output: expected a file to write, found the folder {output}; name a file in it")
    checkpoint, dataset = results.provenance(inputs)
    started = time.monotonic()
    metrics = load(name).evaluate(**inputs, config=config)
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun the first process writes
        return
    made = next((value.made for value in inputs.values() if hasattr(value, "made")), None)
    details = metrics.details | ({"features": made} if made else {})
    for key, value in [*metrics.items(), *metrics.spread.items()]:
        if not math.isfinite(value):
            raise BadInput(
                f"{name} of {model}: expected finite numbers, but {key} is {value}; no record was written"
            )
    results.write(
        results.Record(
            benchmark=name,
            protocol_version=config.version,
            model=model,
            metrics=metrics,
            spread={
                key: results.Spread(std=std, trials=metrics.trials[key])
                for key, std in metrics.spread.items()
            },
            details=details,
            config=config.model_dump(mode="json"),
            checkpoint_sha256=checkpoint,
            dataset=dataset,
            software=results.software(),
            hardware=results.hardware(),
            seconds=time.monotonic() - started,
        ),
        output,
    )
