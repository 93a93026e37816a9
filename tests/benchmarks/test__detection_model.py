"""The torchvision detectors against numbers that Detectron2 computed on equal weights and inputs.

`detectron2.json` holds, for each miniature below, in float64: the losses of three SGD steps with warm-up and
decay, and, after BatchNorm's statistics were taken anew over two batches, the detections in the original
images. Detectron2's revision of June 2026 (02b5c4e2) made it, with BatchNorm for SyncBN and with its casts to
float32 lifted: a rounding there decides which boxes survive, and the runs then part. Weights and inputs
follow from seeds; all anchors and proposals are sampled, so no random draw takes part.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr.benchmarks import _detection_model as dm
from simclr.benchmarks import _detection_torchvision as engine
from simclr.benchmarks.coco2017_detection import Config as Coco
from simclr.benchmarks.voc0712_detection import Config as Voc
from simclr.model import resnet

SMALL = {
    "iterations": 3,
    "steps": [2],
    "warmup_iterations": 1,
    "warmup_factor": 0.1,
    "lr": 0.01,
    "rpn_batch": 8192,
    "roi_batch": 512,
    "anchor_sizes": [8, 16, 24, 32, 64],
    "head_channels": 16,
    "fc_channels": 32,
    "detections": 40,
    "rpn_post_nms": [60, 40],
    "rpn_pre_nms": [400, 300],
    "max_edge": 1333,
}
MINIATURES = {
    "voc_c4": Voc(**SMALL),
    "coco_c4": Coco(**SMALL, detector="c4"),
    "coco_fpn": Coco(**SMALL, detector="fpn"),
}
CLASSES = 5
REFERENCE = json.loads((Path(__file__).parent / "data" / "detectron2.json").read_text())


def miniature(name: str) -> tuple[dm.Detector, list[torch.Tensor], list[dict]]:
    """Return a detector of seeded weights, two images of odd sizes, and their targets; all in float64."""
    config = MINIATURES[name]
    network = resnet("resnet50_w0.125")
    detector = dm.build(network, config.model_dump(mode="json"), CLASSES, config.masks).double()
    random = np.random.RandomState(7)
    with torch.no_grad():
        for key, value in sorted(detector.state_dict().items()):
            if value.is_floating_point():
                value.copy_(torch.from_numpy(weights(random, key, tuple(value.shape))))
    images = [scene(random, *size) for size in ((101, 118), (90, 131))]
    return detector, images, [objects(random, image) for image in images]


def weights(random: np.random.RandomState, key: str, shape: tuple[int, ...]) -> np.ndarray:
    draw = random.standard_normal(shape)
    if key.endswith(("running_var", "weight")) and len(shape) == 1:
        return 1 + 0.2 * np.tanh(draw)
    if len(shape) <= 1:
        return 0.1 * draw
    if "cls_score" in key:
        return draw * 0.15
    scale = 0.05 if "bbox" in key else 1.0
    return scale * draw / np.sqrt(np.prod(shape[1:]))


def scene(random: np.random.RandomState, height: int, width: int) -> torch.Tensor:
    coarse = torch.from_numpy(random.uniform(0, 255, (1, 3, 6, 7)))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].round()


def objects(random: np.random.RandomState, image: torch.Tensor, count: int = 4) -> dict:
    height, width = image.shape[1:]
    corners = random.uniform(0, 0.6, (count, 2)) * (width, height)
    boxes = np.concatenate([corners, corners + random.uniform(12, 45, (count, 2))], 1)
    boxes = np.minimum(boxes, (width, height, width, height)).astype(np.float32)
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    ellipse = (np.stack([np.cos(angles), np.sin(angles)], 1) + 1) / 2
    return {
        "boxes": torch.from_numpy(boxes).double(),
        "labels": torch.from_numpy(random.randint(1, CLASSES + 1, count)),
        "polygons": [[(b[:2] + ellipse * (b[2:] - b[:2])).ravel().astype(np.float64)] for b in boxes],
    }


@pytest.mark.parametrize("name", MINIATURES)
def test_equals_detectron2(name):
    detector, images, targets = miniature(name)
    config = MINIATURES[name].model_dump(mode="json")
    optimizer = engine.sgd(detector, config)
    expected = REFERENCE[name]
    detector.train()
    for iteration in range(3):
        engine.set_lr(optimizer, config, iteration)
        losses = detector(images, targets)
        found = {key: value.item() for key, value in losses.items()}
        assert found == pytest.approx(expected["losses"][iteration], rel=2e-5)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    engine.precise_bn(detector, [(images, targets), (images[:1], targets[:1])])
    detector.eval()
    with torch.no_grad():
        for image, (height, width), wanted in zip(
            images, expected["sizes"], expected["detections"], strict=True
        ):
            found = engine.in_image(detector([image])[0], image.shape[1:], height, width)
            assert found["labels"].tolist() == wanted["labels"]
            np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=1e-4)
            np.testing.assert_allclose(found["boxes"], wanted["boxes"], rtol=1e-4, atol=1e-3)
            if "areas" in wanted:
                areas = [int(mask.sum()) for mask in found["masks"]]
                np.testing.assert_allclose(areas, wanted["areas"], atol=1)
