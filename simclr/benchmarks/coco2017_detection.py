"""COCO2017 Detection and Instance Segmentation: Mask R-CNN fine-tuned on train2017, tested on val2017.

`variant` names the published protocol. Without a prefix it is Detectron2's, as MoCo configures it
(detection/configs/coco_R_50_*_moco.yaml; the default is the R50-FPN 1x of MMSelfSup's file set).
`mmselfsup_c4_*` are the C4 files of OpenSelfSup and MMSelfSup v0.11.0 (configs/benchmarks/detectron2),
which bound the long edge of training images by 1200 pixels instead of 1333. `mmselfsup_fpn_*` are those of
MMSelfSup's published row, made with MMDetection (configs/benchmarks/mmdetection/coco): a box head of four
convolutions and one fully connected layer, BatchNorm in all heads, BatchNorm decayed, no Precise-BN, 12 or
24 epochs of 7,330 iterations. Of MMDetection they leave out that mask targets are cropped by RoIAlign, and
that an object's best anchor counts only from an IoU of 0.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from simclr.benchmarks import voc0712_detection
from simclr.protocol import Column, Metrics

if TYPE_CHECKING:
    from simclr.checkpoint import Backbone
    from simclr.datasets import Dataset

TITLE = "COCO2017 Detection and Instance Segmentation"

COLUMNS = {
    "box_ap": Column("mAP(Box)"),
    "box_ap50": Column("AP50(Box)"),
    "box_ap75": Column("AP75(Box)"),
    "mask_ap": Column("mAP(Mask)"),
    "mask_ap50": Column("AP50(Mask)"),
    "mask_ap75": Column("AP75(Mask)"),
}

_FPN = {"detector": "fpn", "rpn_pre_nms": (2000, 1000), "rpn_post_nms": (1000, 1000)}
_C4 = {"detector": "c4", "rpn_pre_nms": (12000, 6000), "rpn_post_nms": (2000, 1000)}
_1X = {"iterations": 90000, "steps": (60000, 80000)}
_2X = {"iterations": 180000, "steps": (120000, 160000)}
_MMDETECTION = {**_FPN, "box_head": "4conv1fc", "norm_weight_decay": 1e-4, "precise_bn": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "fpn_1x": {**_FPN, **_1X},
    "fpn_2x": {**_FPN, **_2X},
    "c4_1x": {**_C4, **_1X},
    "c4_2x": {**_C4, **_2X},
    "mmselfsup_c4_1x": {**_C4, **_1X, "train_max_edge": 1200},
    "mmselfsup_c4_2x": {**_C4, **_2X, "train_max_edge": 1200},
    "mmselfsup_fpn_1x": {**_MMDETECTION, "iterations": 87960, "steps": (58640, 80630)},
    "mmselfsup_fpn_2x": {**_MMDETECTION, "iterations": 175920, "steps": (117280, 161260)},
}


class Config(voc0712_detection.Config):
    """VOC's protocol but for masks, schedule, short edges, one run, and the keys that `variant` sets."""

    dataset: ClassVar[str] = "coco2017"
    train_splits: ClassVar[tuple[str, ...]] = ("train2017",)
    test_split: ClassVar[str] = "val2017"
    masks: ClassVar[bool] = True
    variants: ClassVar[dict[str, dict[str, Any]]] = VARIANTS

    variant: Literal[tuple(VARIANTS)] = Field(
        "fpn_1x",
        description="Published protocol: Detectron2's R50-FPN or R50-C4, 90k (1x) or 180k (2x) iterations; "
        "mmselfsup_c4: training images bounded by 1200 pixels; mmselfsup_fpn: that of MMSelfSup's published "
        "row, made with MMDetection. Sets detector, iterations, steps, rpn_pre_nms, rpn_post_nms, "
        "train_max_edge, box_head, norm_weight_decay and precise_bn where they are not given.",
    )
    detector: Literal["c4", "fpn"] = Field("fpn", description="Set by `variant`.")
    iterations: int = Field(90000, ge=1, description="Training iterations; set by `variant`.")
    steps: tuple[int, ...] = Field(
        (60000, 80000), description="Iterations from which the learning rate is ten times lower."
    )
    warmup_iterations: int = Field(1000, ge=0, description="Iterations of linear warm-up (Detectron2).")
    train_edges: tuple[int, ...] = Field(
        (640, 672, 704, 736, 768, 800),
        min_length=1,
        description="Short edges, pixels, of which each training image draws one.",
    )
    rpn_pre_nms: tuple[int, int] = Field(
        (2000, 1000), description="Proposals per map before NMS, in training and in testing."
    )
    rpn_post_nms: tuple[int, int] = Field(
        (1000, 1000), description="Proposals per image after NMS at 0.7, in training and in testing."
    )
    trials: int = Field(1, ge=1, description="Runs of different seeds; the mean is reported.")


def evaluate(
    backbone: Backbone, dataset: Dataset, config: Config, work: Path, picture: Path | None = None
) -> Metrics:
    """Fine-tune Mask R-CNN and return COCO's box and mask AP, AP50, AP75 on val2017, in percent.

    All areas, 100 detections per image, IoU 0.50:0.05:0.95. Killed, it goes on from `work` when called again.
    `picture` and what is raised are as VOC's.
    """
    from simclr.benchmarks import _detection, _detection_metrics

    return _detection.evaluate(backbone, dataset, config, work, _detection_metrics.coco_metrics, picture)
