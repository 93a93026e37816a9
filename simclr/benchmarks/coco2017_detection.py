"""COCO2017 Detection and Instance Segmentation: Mask R-CNN fine-tuned on train2017, tested on val2017.

The published row of the page is MMDetection's Mask R-CNN R50-FPN 1x with a box head of four convolutions and
one fully connected layer, SyncBN in all heads, decayed BatchNorm and no Precise-BN (MMSelfSup v0.11.0,
configs/benchmarks/mmdetection/coco). The default here is the nearest Detectron2 protocol, R50-FPN 1x (same
file set, detectron2/coco_R_50_FPN_1x_moco.yaml): same schedule, scales and columns, but two fully connected
layers and no norm in the heads. So the two rows are not like for like.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

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
VARIANTS: dict[str, dict[str, Any]] = {
    "fpn_1x": {**_FPN, **_1X},
    "fpn_2x": {**_FPN, **_2X},
    "c4_1x": {**_C4, **_1X},
    "c4_2x": {**_C4, **_2X},
}


class Config(voc0712_detection.Config):
    """VOC's protocol but for masks, schedule, short edges, one run, and the keys that `variant` sets.

    MMSelfSup's and OpenSelfSup's C4 files bound the long edge of training images by 1200 pixels; MoCo's, and
    this one, by 1333.
    """

    dataset: ClassVar[str] = "coco2017"
    train_splits: ClassVar[tuple[str, ...]] = ("train2017",)
    test_split: ClassVar[str] = "val2017"
    masks: ClassVar[bool] = True

    variant: Literal["fpn_1x", "fpn_2x", "c4_1x", "c4_2x"] = Field(
        "fpn_1x",
        description="Sets detector, iterations, steps, rpn_pre_nms and rpn_post_nms where they are not given "
        "(Detectron2's R50-FPN or R50-C4, 90k or 180k iterations).",
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

    @model_validator(mode="before")
    @classmethod
    def _variant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**VARIANTS.get(str(values.get("variant")), {}), **values}


def evaluate(backbone: Backbone, dataset: Dataset, config: Config, work: Path) -> Metrics:
    """Fine-tune Mask R-CNN and return COCO's box and mask AP, AP50, AP75 on val2017, in percent.

    All areas, 100 detections per image, IoU 0.50:0.05:0.95. Killed, it goes on from `work` when called again.
    Raises `BadInput` as VOC's does.
    """
    from simclr.benchmarks import _detection

    return _detection.evaluate(backbone, dataset, config, work, _detection.coco_metrics)
