"""The parts of MMSegmentation that the segmentation benchmarks use, imported without noise.

It is the maintained fork (onedl-mmsegmentation, imported as mmseg, mmcv and mmengine).
"""

from __future__ import annotations

import contextlib
import io
import warnings

from simclr import BadInput

__all__ = [
    "DATASETS",
    "DATA_SAMPLERS",
    "FUNCTIONS",
    "METRICS",
    "TRANSFORMS",
    "Hook",
    "InfiniteSampler",
    "IoUMetric",
    "LoadAnnotations",
    "LoadImageFromFile",
    "Runner",
    "Settings",
    "get_torch_safe_globals",
    "mmseg",
    "pseudo_collate",
]

# At import the fork prints two bare lines and warns, both about packages that an FCN does not need.
try:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmseg.datasets
        import mmseg.engine
        import mmseg.models
        import mmseg.visualization
        from mmcv.transforms import LoadImageFromFile
        from mmengine.config import Config as Settings
        from mmengine.dataset import InfiniteSampler, pseudo_collate
        from mmengine.hooks import Hook
        from mmengine.registry import FUNCTIONS
        from mmengine.runner import Runner
        from mmengine.runner.checkpoint import get_torch_safe_globals
        from mmseg.datasets.transforms import LoadAnnotations
        from mmseg.evaluation import IoUMetric
        from mmseg.registry import DATA_SAMPLERS, DATASETS, METRICS, TRANSFORMS
except ImportError as error:
    raise BadInput(
        f"MMSegmentation cannot be imported ({error}), and no other engine serves the segmentation "
        "benchmarks; install it with `uv sync`, or call snakemake with `--software-deployment-method conda`, "
        "which takes envs/mmseg.yaml"
    ) from error
