"""What storing features as float16 instead of float32 changes in the metrics.

    python tests/speed/float16.py --results results/demo --model simclr

takes the backbone and the verified datasets of a finished page, extracts the features of ImageNet and VOC2007
once in each type, with everything else as the page's config says, evaluates both and prints a Markdown table.

TABLE
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from simclr import config
from simclr.benchmarks import imagenet_knn, voc07_svm
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
    for benchmark, name in ((imagenet_knn, "imagenet"), (voc07_svm, "voc2007")):
        dataset = Dataset.open(args.results / "datasets" / f"{name}.json")
        block, protocol = (
            getattr(page.features, name),
            getattr(page.benchmarks, benchmark.__name__.split(".")[-1]),
        )
        single, half = (
            metrics(
                benchmark.evaluate, backbone, dataset, block.model_copy(update={"dtype": dtype}), protocol
            )
            for dtype in ("float32", "float16")
        )
        for key, value in single.items():
            print(f"| {key} | {value:.3f} | {half[key]:.3f} | {half[key] - value:+.3f} |")


def metrics(
    evaluate, backbone: Backbone, dataset: Dataset, block: config.FeatureSet, protocol: Protocol
) -> Metrics:
    """Return what `evaluate` says of both splits, extracted as `block` says."""
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS[dataset.name]:
            extract(backbone, dataset, split, block, Path(folder) / "work", Path(folder) / split)
        return evaluate(*(Features.open(Path(folder) / split) for split in SPLITS[dataset.name]), protocol)


if __name__ == "__main__":
    main()
