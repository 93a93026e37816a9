"""What storing features as float16 instead of float32 changes in the metrics.

    python tests/speed/float16.py --results results/demo --model simclr

takes the backbone and the verified datasets of a finished page, extracts the features of ImageNet and VOC2007
once in each type, with everything else as the page's config says, evaluates both and prints a Markdown table.

On the miniature (2,800 × 400 and 360 × 160 images), percent:

| metric | float32 | float16 | difference |
|---|---|---|---|
| k10 | 57.500 | 57.500 | +0.000 |
| k20 | 54.000 | 54.250 | +0.250 |
| k100 | 54.000 | 54.000 | +0.000 |
| k200 | 51.750 | 51.500 | -0.250 |
| feature1 | 21.828 | 21.828 | +0.000 |
| feature2 | 29.632 | 29.638 | +0.006 |
| feature3 | 31.594 | 31.587 | -0.006 |
| feature4 | 33.795 | 33.785 | -0.009 |
| feature5 | 33.697 | 33.848 | +0.151 |

0.25 is one test image. Top-5 accuracies are equal. The low-shot SVM was measured with --model random_init
alone: k1 +0.001, k2 -0.003, k4 +0.011, k8 -0.004, and no more with cross-validated costs. There top-1 and
top-5 also differed by one image at most, and the SVM by -0.022 on feature2, by less than 0.008 on the
other layers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from simclr import benchmarks, config
from simclr.checkpoint import Backbone
from simclr.datasets import Dataset
from simclr.features import Features, extract
from simclr.protocol import Metrics, Protocol

SPLITS = {"imagenet": ("train", "val"), "voc2007": ("trainval", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("config/demo.yaml"))
    parser.add_argument("--results", type=Path, default=Path("results/demo"))
    parser.add_argument("--model", default="simclr")
    args = parser.parse_args()
    page = config.read(args.config)
    backbone = Backbone.open(args.results / args.model / "backbone.safetensors")
    print("| metric | float32 | float16 | difference |")
    print("|---|---|---|---|")
    for name in ("imagenet_knn", "voc07_svm", "voc07_lowshot"):
        benchmark = benchmarks.load(name)
        dataset = Dataset.open(args.results / f"datasets/{benchmark.Config.dataset}.json")
        block, protocol = getattr(page.features, dataset.name), getattr(page.benchmarks, name)
        blocks = (block.model_copy(update={"dtype": dtype}) for dtype in ("float32", "float16"))
        single, half = (metrics(benchmark.evaluate, backbone, dataset, each, protocol) for each in blocks)
        for key, value in single.items():
            print(f"| {key} | {value:.3f} | {half[key]:.3f} | {half[key] - value:+.3f} |")


def metrics(
    evaluate: Callable[..., Metrics],
    backbone: Backbone,
    dataset: Dataset,
    block: config.FeatureSet,
    protocol: Protocol,
) -> Metrics:
    """Return what `evaluate` says of both splits, extracted as `block` says."""
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS[dataset.name]:
            extract(backbone, dataset, split, block, Path(folder) / "work", Path(folder) / split)
        return evaluate(*(Features.open(Path(folder) / split) for split in SPLITS[dataset.name]), protocol)


if __name__ == "__main__":
    main()
