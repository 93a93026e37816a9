"""The torchvision detectors against Detectron2: equal weights and inputs, hence equal losses and detections.

`data/detectron2.json` holds what Detectron2 computed for each miniature below, in float64: the losses of
three SGD steps with warm-up and decay, and, after BatchNorm's statistics were taken anew over two batches,
the detections in the original images with their pasted masks (run lengths, as COCO counts them). Detectron2's
revision of June 2026 (02b5c4e2) made it, by this file run as a program, with its casts to float32 lifted: a
rounding there decides which boxes survive, and the runs then part. Weights and inputs follow from seeds; all
anchors and proposals are sampled, so no random draw takes part. Where Detectron2 is installed, it computes
the numbers again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from simclr.benchmarks import _detection_detectron2 as detectron2
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
    "weight_decay": 0.01,
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
# BatchNorm's decay is far above the published one, so that three steps show it.
MINIATURES = {
    "voc_c4": Voc(**SMALL),
    "voc_mmselfsup": Voc(**SMALL, variant="mmselfsup", norm_weight_decay=0.1),
    "coco_c4": Coco(**SMALL, variant="c4_1x"),
    "coco_fpn": Coco(**SMALL, variant="fpn_1x"),
    "coco_mmselfsup": Coco(**SMALL, variant="mmselfsup_fpn_1x", norm_weight_decay=0.1),
}
CLASSES = 5
ARCHITECTURE = "resnet50_w0.125"
SIZES = [(75, 88), (120, 160)]  # height, width of the original images
REFERENCE = Path(__file__).parent / "data" / "detectron2.json"


def miniature(name: str) -> tuple[dm.Detector, list[torch.Tensor], list[dict]]:
    """Return a detector of seeded weights, two images of odd sizes, and their targets; all in float64."""
    config = MINIATURES[name]
    network = resnet(ARCHITECTURE)
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


def run_lengths(masks: torch.Tensor) -> list[list[int]]:
    """Return masks `(n, height, width)` as COCO counts them: down the columns, from a run of zeros on."""
    flat = [np.concatenate([[0], mask.T.ravel(), [0]]) for mask in masks.numpy().astype(np.int8)]
    ends = [np.flatnonzero(np.diff(mask)).tolist() for mask in flat]
    return [np.diff([0, *each, masks[0].numel()]).tolist() for each in ends]


# ---------------------------------------------------------------- Detectron2's numbers


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Let what Detectron2 casts to float32 stay, or become, float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch, "float32", torch.float64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def compute(name: str) -> dict:
    """Return Detectron2's losses and detections for a miniature, built by the engine's own config."""
    from detectron2.modeling import build_model
    from detectron2.solver import build_lr_scheduler, build_optimizer
    from detectron2.utils.events import EventStorage
    from fvcore.nn.precise_bn import update_bn_stats

    detector, images, targets = miniature(name)
    config = MINIATURES[name]
    protocol = {**config.model_dump(mode="json"), "score_threshold": detector.roi_heads.score_thresh}
    spec = {"protocol": protocol, "architecture": ARCHITECTURE, "classes": CLASSES, "masks": config.masks}
    cfg = detectron2.configure({**spec, "folder": "", "seed": 0}, device="cpu")
    with in_float64(), EventStorage(0):
        model = build_model(cfg).double()
        model.load_state_dict(weights_of(detector, config.detector), strict=True)
        model.pixel_mean, model.pixel_std = detector.mean, detector.std
        for anchors in model.proposal_generator.anchor_generator.cell_anchors:
            anchors.copy_(torch.from_numpy(anchors.numpy().astype(np.float32)))  # as both have them in use
        optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, optimizer)
        batch = [example(*each) for each in zip(images, targets, SIZES, strict=True)]
        losses = []
        for _ in range(3):
            found = model.train()(batch)
            losses.append({LOSSES[key]: value.item() for key, value in found.items()})
            optimizer.zero_grad()
            sum(found.values()).backward()
            optimizer.step()
            scheduler.step()
        update_bn_stats(model, [batch, batch[:1]], 2)
        with torch.no_grad():
            found = [model.eval()([each])[0]["instances"] for each in batch]  # tested one by one
        return {"losses": losses, "detections": [listed(each, config.masks) for each in found]}


LOSSES = {
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
}


def example(image: torch.Tensor, target: dict, size: tuple[int, int]) -> dict:
    from detectron2.structures import Boxes, Instances, PolygonMasks

    truth = Instances(tuple(image.shape[1:]))
    truth.gt_boxes, truth.gt_classes = Boxes(target["boxes"]), target["labels"] - 1
    truth.gt_masks = PolygonMasks(target["polygons"])
    return {"image": image, "instances": truth, "height": size[0], "width": size[1]}


def listed(instances: object, masks: bool) -> dict:
    return {
        "labels": (instances.pred_classes + 1).tolist(),
        "scores": instances.scores.tolist(),
        "boxes": instances.pred_boxes.tensor.tolist(),
        **({"masks": run_lengths(instances.pred_masks)} if masks else {}),
    }


def weights_of(detector: dm.Detector, kind: str) -> dict[str, torch.Tensor]:
    """Return the detector's tensors under Detectron2's names, background last, its deltas left out."""
    names = {**layer_names(detector, "box_head", "conv"), **layer_names(detector, "mask_branch", "mask_fcn")}
    state = {}
    for key, value in detector.state_dict().items():
        if key.startswith("roi_heads.box_predictor.cls_score"):
            value = value.roll(-1, 0)
        elif key.startswith("roi_heads.box_predictor.bbox_pred"):
            value = value[4:]
        layer, _, last = key.rpartition(".")
        state[f"{names[layer]}.{last}" if layer in names else detectron2_name(key, kind)] = value
    return state


def layer_names(detector: dm.Detector, head: str, convolution: str) -> dict[str, str]:
    """Return the names of a region head's layers, which are numbered here and named there."""
    names, count = {}, {torch.nn.Conv2d: 0, torch.nn.Linear: 0}
    for i, layer in enumerate(getattr(detector.roi_heads, head) or ()):
        if type(layer) in count:
            count[type(layer)] += 1
        name = {
            torch.nn.Conv2d: f"{convolution}{count[torch.nn.Conv2d]}",
            torch.nn.BatchNorm2d: f"{convolution}{count[torch.nn.Conv2d]}.norm",
            torch.nn.Linear: f"fc{count[torch.nn.Linear]}",
            torch.nn.ConvTranspose2d: "deconv",
        }.get(type(layer))
        names[f"roi_heads.{head}.{i}"] = f"roi_heads.{head.replace('branch', 'head')}.{name}"
    if head == "mask_branch" and names:
        names[f"roi_heads.{head}.{i}"] = "roi_heads.mask_head.predictor"
    return names


def detectron2_name(key: str, kind: str) -> str:
    for pattern, name in (
        (r"^rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
        (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
        (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
        (r"^roi_heads\.box_head\.norm\.", "roi_heads.res5.norm."),
    ):
        key = re.sub(pattern, name, key)
    if pyramid := re.match(r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(\d)\.(.*)", key):
        role, level, layer, rest = pyramid.groups()
        where = {"inner": "fpn_lateral", "layer": "fpn_output"}[role] + str(int(level) + 2)
        return f"backbone.{where}.{'norm.' if layer == '1' else ''}{rest}"
    body = re.match(r"(?:backbone\.body|roi_heads\.box_head)\.(conv1|bn1|layer\d)\.(.*)", key)
    return detectron2.model_key(f"{body[1]}.{body[2]}", kind) if body else key


# ---------------------------------------------------------------- the comparison


@functools.cache
def numbers(source: str, name: str) -> dict:
    """Return Detectron2's numbers, stored, or computed here and now."""
    if source == "stored":
        return json.loads(REFERENCE.read_text())[name]
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("Detectron2 is not installed; its stored numbers are compared all the same")
    return compute(name)


@pytest.mark.parametrize("name", MINIATURES)
def test_detectron2_computes_the_stored_numbers(name):
    assert_close(numbers("computed", name), numbers("stored", name))


@pytest.mark.parametrize("source", ["stored", "computed"])
@pytest.mark.parametrize("name", MINIATURES)
def test_equals_detectron2(name, source):
    expected = numbers(source, name)
    detector, images, targets = miniature(name)
    config = MINIATURES[name].model_dump(mode="json")
    optimizer = engine.sgd(detector, config)
    losses = []
    for iteration in range(3):
        engine.set_lr(optimizer, config, iteration)
        found = detector.train()(images, targets)
        losses.append({key: value.item() for key, value in found.items()})
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
    engine.precise_bn(detector, [(images, targets), (images[:1], targets[:1])])
    with torch.no_grad():
        found = [
            engine.in_image(detector.eval()([image])[0], image.shape[1:], *size)
            for image, size in zip(images, SIZES, strict=True)
        ]
    assert_close({"losses": losses, "detections": [plain(each) for each in found]}, expected)


def plain(detection: dict) -> dict:
    masks = {"masks": run_lengths(torch.stack(detection["masks"]))} if "masks" in detection else {}
    return {**{key: detection[key].tolist() for key in ("labels", "scores", "boxes")}, **masks}


def assert_close(found: dict, expected: dict) -> None:
    """Every loss to 1e-7 of itself, every detection, and every pixel of the pasted masks."""
    for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7)
    for ours, theirs in zip(found["detections"], expected["detections"], strict=True):
        assert ours["labels"] == theirs["labels"]
        np.testing.assert_allclose(ours["scores"], theirs["scores"], rtol=1e-6)
        np.testing.assert_allclose(ours["boxes"], theirs["boxes"], rtol=1e-6, atol=1e-6)
        assert ours.get("masks") == theirs.get("masks")


if __name__ == "__main__":
    computed = json.dumps({name: compute(name) for name in MINIATURES})
    twelve = json.loads(computed, parse_float=lambda text: float(f"{float(text):.12g}"))
    REFERENCE.write_text(json.dumps(twelve) + "\n")
