"""Pascal VOC07+12 Detection: Faster R-CNN fine-tuned on VOC2007 and VOC2012 trainval, tested on VOC2007 test.

The defaults, `variant: moco`, are MoCo's protocol for Detectron2, which MMSelfSup v0.11.0 copies
(configs/benchmarks/detectron2/pascal_voc_R_50_C4_24k_moco.yaml). MMSelfSup's published AP50 was made with
MMDetection instead (configs/benchmarks/mmdetection/voc0712/faster_rcnn_r50_c4_mstrain_24k_voc0712.py), of
which `variant: mmselfsup` takes over the weight decay of BatchNorm, the running averages, that difficult
objects are not trained on, and that anchors across the border do not count. Two things it leaves out: in
MMDetection an object's best anchor counts only from an IoU of 0.3, and images whose objects are all
difficult stay, as images without an object, where here they are not trained on. Nor does it change how
boxes are read and measured: MMDetection lowers all four coordinates by one and counts no last pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from simclr.protocol import Column, Metrics, Protocol

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "Pascal VOC07+12 Detection"

COLUMNS = {
    "ap50": Column("AP50"),
    "ap": Column("AP"),
    "ap75": Column("AP75"),
}

# What each variant sets where the config does not: its whole difference from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "moco": {},
    "mmselfsup": {
        "norm_weight_decay": 1e-4,
        "precise_bn": 0,
        "train_difficult": False,
        "border_anchors": False,
    },
}

# Must be left of a schedule that the linear rule shortens. The rule is known to hold up to 256 images per
# iteration (MegDet, arXiv 1711.07240), with which VOC's protocol has 1,500 iterations.
LEAST_ITERATIONS = 1000

# Short edges of training images, in pixels.
VOC_EDGES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


class Config(Protocol):
    """Fixed for either engine, as they are the same in every published protocol of this family: SGD without
    Nesterov, BatchNorm trained and synchronised over processes, no frozen layer, flips of half the images,
    anchors of ratios 1/2, 1, 2, 25 % positive regions, NMS at 0.5, L1 box losses.
    """

    dataset: ClassVar[str] = "voc0712"
    train_splits: ClassVar[tuple[str, ...]] = ("trainval07", "trainval12")
    test_split: ClassVar[str] = "test07"
    masks: ClassVar[bool] = False
    variants: ClassVar[dict[str, dict[str, Any]]] = VARIANTS

    engine: Literal["detectron2", "torchvision"] = Field(
        "detectron2",
        description="Program that trains and detects: detectron2, for which the published protocol is "
        "written, or torchvision, whose parts are put together here so that losses and detections are equal.",
    )
    variant: Literal["moco", "mmselfsup"] = Field(
        "moco",
        description="Published protocol. moco: Detectron2's, as MoCo and MMSelfSup configure it. mmselfsup: "
        "that of MMSelfSup's published AP50, made with MMDetection; sets norm_weight_decay, precise_bn, "
        "train_difficult and border_anchors where they are not given.",
    )
    detector: Literal["c4", "fpn"] = Field(
        "c4",
        description="c4: one map of stride 16, the last stage and one extra BatchNorm as region head; "
        "fpn: five maps and `box_head` (Detectron2, Base-RCNN-C4 and -FPN).",
    )
    iterations: int = Field(24000, ge=1, description="Training iterations (MoCo: 24k).")
    batch_size: int = Field(
        16, ge=1, description="Images per iteration, over all GPUs, for which lr and iterations are given."
    )
    images_per_iteration: int | None = Field(
        None,
        ge=1,
        description="Images per iteration, over all GPUs, if these do not hold batch_size: lr is multiplied "
        "by the ratio of the two; iterations, steps and warmup_iterations are divided by it (linear rule, "
        "Goyal 2017, as Detectron2's auto_scale_workers). null: batch_size.",
    )
    lr: float = Field(0.02, gt=0, description="Learning rate for that batch size, after the warm-up.")
    steps: tuple[int, ...] = Field(
        (18000, 22000), description="Iterations from which the learning rate is ten times lower, ascending."
    )
    warmup_iterations: int = Field(100, ge=0, description="Iterations of linear warm-up (MoCo).")
    warmup_factor: float = Field(
        0.001, gt=0, le=1, description="Learning rate of iteration 0 as a share of `lr`."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay of all but BatchNorm's parameters.")
    norm_weight_decay: float = Field(
        0.0, ge=0, description="Weight decay of BatchNorm's parameters (Detectron2: 0; MMDetection: 1e-4)."
    )
    train_difficult: bool = Field(
        True,
        description="Whether VOC's difficult objects are objects in training (Detectron2), or not there "
        "(MMDetection). The test never counts them.",
    )
    train_edges: tuple[int, ...] = Field(
        VOC_EDGES, min_length=1, description="Short edges, pixels, of which each training image draws one."
    )
    test_edge: int = Field(800, ge=32, description="Short edge of test images, pixels.")
    max_edge: int = Field(
        1333, ge=32, description="Longest edge of any image, pixels, which then bounds the short edge."
    )
    train_max_edge: int | None = Field(
        None, ge=32, description="Longest edge of training images, pixels; null: max_edge."
    )
    anchor_sizes: tuple[int, ...] = Field(
        (32, 64, 128, 256, 512),
        min_length=1,
        description="Edges of the square anchors, pixels; fpn has one per map, so five.",
    )
    border_anchors: bool = Field(
        True,
        description="Whether anchors that cross the image's border count in the region proposal losses "
        "(Detectron2: yes; MMDetection's C4: no).",
    )
    rpn_batch: int = Field(256, ge=1, description="Anchors per image in the region proposal losses.")
    rpn_pre_nms: tuple[int, int] = Field(
        (12000, 6000), description="Proposals per map before NMS, in training and in testing (C4)."
    )
    rpn_post_nms: tuple[int, int] = Field(
        (2000, 1000), description="Proposals per image after NMS at 0.7, in training and in testing (C4)."
    )
    roi_batch: int = Field(512, ge=1, description="Regions per image in the region head's losses.")
    head_channels: int = Field(256, ge=1, description="Channels of the pyramid and of the mask head.")
    fc_channels: int = Field(1024, ge=1, description="Width of fpn's fully connected layers.")
    box_head: Literal["2fc", "4conv1fc"] = Field(
        "2fc",
        description="Box head of fpn. 2fc: two fully connected layers (Detectron2). 4conv1fc: four "
        "convolutions and one fully connected layer, BatchNorm in them and in the mask head's convolutions "
        "(MMSelfSup's MMDetection files).",
    )
    score_threshold: float = Field(0.05, ge=0, lt=1, description="Detections with a higher score are kept.")
    detections: int = Field(100, ge=1, description="Most detections per test image.")
    precise_bn: int = Field(
        200,
        ge=0,
        description="Training batches from which BatchNorm's statistics are taken anew before the test; "
        "0: keep the running averages.",
    )
    trials: int = Field(
        5, ge=1, description="Runs of different seeds; the mean is reported (MoCo; spread about 0.2 AP)."
    )
    seed: int = Field(0, ge=0, description="Seed of the first run; each further run adds 1.")
    checkpoint_every: int = Field(
        1000, ge=1, description="Iterations between rolling checkpoints, from which a killed run goes on."
    )

    @model_validator(mode="before")
    @classmethod
    def _variant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**cls.variants.get(str(values.get("variant")), {}), **values}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        fault = _schedule_fault(self.iterations, self.steps, self.warmup_iterations)
        if fault:
            raise ValueError(fault)
        if self.detector == "fpn" and len(self.anchor_sizes) != 5:
            raise ValueError(f"detector: fpn needs five anchor_sizes, one per map; found {self.anchor_sizes}")
        if self.detector == "c4" and self.box_head != "2fc":
            raise ValueError(f"box_head: {self.box_head} is of detector: fpn; c4's head is the last stage")
        if max(*self.train_edges, self.test_edge) > self.max_edge:
            raise ValueError(f"train_edges and test_edge must not exceed max_edge {self.max_edge}")
        if max(self.train_edges) > (self.train_max_edge or self.max_edge):
            raise ValueError(f"train_edges must not exceed train_max_edge {self.train_max_edge}")
        return self

    @model_validator(mode="after")
    def _possible_when_scaled(self) -> Self:
        if self.images_per_iteration is None:
            return self
        from simclr.benchmarks._detection import scaled

        schedule = scaled(self.model_dump(mode="json"))
        least = min(self.iterations, LEAST_ITERATIONS)
        fault = _schedule_fault(schedule["iterations"], schedule["steps"], schedule["warmup_iterations"])
        if schedule["iterations"] < least:
            fault = f"at least {least} must be left"
        if fault:
            raise ValueError(
                f"images_per_iteration {self.images_per_iteration} instead of batch_size {self.batch_size} "
                f"gives lr {schedule['lr']:g} and {schedule['iterations']} iterations: {fault}"
            )
        return self


def _schedule_fault(iterations: int, steps: Sequence[int], warmup_iterations: int) -> str | None:
    """Return what is impossible about a schedule, or None."""
    if list(steps) != sorted(set(steps)) or any(step >= iterations for step in steps):
        return f"steps must ascend and lie below iterations {iterations}; {tuple(steps)}"
    if warmup_iterations > iterations:
        return f"warmup_iterations {warmup_iterations} exceed iterations {iterations}"
    return None


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, picture: Path | None = None
) -> Metrics:
    """Fine-tune a detector `config.trials` times and return the mean AP, AP50, AP75 on VOC2007 test, percent.

    AP is VOC2007's 11-point average precision, averaged over classes; `ap` is also averaged over the IoU
    thresholds 0.50, 0.55 … 0.95. Killed, it goes on from `work` when called again. `picture` is the PNG file
    of some test images, the objects beside what was detected. Raises `BadInput` when the engine is not
    installed, refuses the backbone, or its detections give no number.
    """
    from simclr.benchmarks import _detection, _detection_metrics

    return _detection.evaluate(backbone, dataset, config, work, _detection_metrics.voc_metrics, picture)
