"""Faster R-CNN and Mask R-CNN of torchvision's parts, with Detectron2's arithmetic.

On equal weights and inputs, losses and detections equal those of Detectron2's C4 and FPN models with trained
BatchNorm. torchvision's constructor arguments alone are another protocol: what is overridden below says why.
Labels count from 1 here and 0 is background; Detectron2 counts from 0 and puts background last.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads, rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_area, clip_boxes_to_image, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from simclr import BadInput, transforms
from simclr.model import ResNet

RATIOS = (0.5, 1.0, 2.0)
# Box edge in pixels that is pooled from the pyramid's map of stride 16 (FPN paper, equation 1).
CANONICAL_EDGE, CANONICAL_LEVEL = 224, 4

Features = dict[str, Tensor]
Target = dict[str, Any]


class Detector(nn.Module):
    """Backbone, region proposals, region heads.

    Training: images and targets in, losses out. Testing: images in, detections out, in the images' pixels.
    An image is `(3, H, W)`, RGB, 0–255. A target has `boxes` `(n, 4)` as x0 y0 x1 y1, `labels` `(n,)`
    from 1, and for masks `polygons`: per object a list of arrays x y x y …
    A detection has `boxes`, `scores`, `labels` and for masks `masks` `(n, S, S)`, probabilities in the box.
    """

    def __init__(self, backbone: nn.Module, proposals: RPN, heads: RoIHeads, divisor: int):
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, proposals, heads
        self.divisor = divisor
        for name, values in (("mean", transforms.MEAN), ("std", transforms.STD)):
            scaled = torch.tensor([255 * value for value in values])
            self.register_buffer(name, scaled.view(3, 1, 1), persistent=False)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch = ImageList(self._batch(images), sizes)
        features = self.backbone(batch.tensors)
        proposals, proposal_losses = self.rpn(batch, features, targets)
        detections, head_losses = self.roi_heads(features, proposals, sizes, targets)
        return {**proposal_losses, **head_losses} if self.training else detections

    def _batch(self, images: list[Tensor]) -> Tensor:
        """Normalise, then pad with zeros at the right and the bottom to the largest image of the batch."""
        normal = [(image.to(self.mean) - self.mean) / self.std for image in images]
        edges = (math.ceil(max(i.shape[axis] for i in normal) / self.divisor) for axis in (1, 2))
        height, width = (edge * self.divisor for edge in edges)
        return torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in normal])


# ---------------------------------------------------------------- region proposals


class Anchors(AnchorGenerator):
    """Anchors that are not rounded, on grids of fixed strides; torchvision derives strides from sizes."""

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]):
        super().__init__(sizes, (RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(
        self, scales: Any, aspect_ratios: Any, dtype: Any = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        edges = [(s / math.sqrt(ratio), s * math.sqrt(ratio)) for s in scales for ratio in aspect_ratios]
        boxes = [(-w / 2, -h / 2, w / 2, h / 2) for w, h in edges]
        return torch.tensor(boxes, dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        steps = [[torch.tensor(stride, device=first.device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], steps))
        return [anchors] * len(image_list.image_sizes)


class RPN(rpn.RegionProposalNetwork):
    """L1 box loss, both losses over a fixed number of anchors; proposals ranked by logits.

    torchvision divides by the number of sampled anchors and ranks by probabilities, which saturate.
    Without `border_anchors`, those that cross the image's border are neither positive nor negative.
    """

    def __init__(self, *args: Any, border_anchors: bool = True, **options: Any):
        super().__init__(*args, **options)
        self.border_anchors = border_anchors
        self.shapes: list[tuple[int, int]] = []  # of the images at hand

    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        self.shapes = images.image_sizes
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        if not self.border_anchors:
            for label, boxes, (height, width) in zip(labels, anchors, self.shapes, strict=True):
                limit = boxes.new_tensor([width, height])
                inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] < limit).all(1)
                label[~inside] = -1.0
        return labels, matched

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        sampled = positive | negative
        normalizer = self.fg_bg_sampler.batch_size_per_image * len(labels)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels).to(objectness)[sampled], reduction="sum"
        )
        box_loss = F.l1_loss(
            pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum"
        )
        return objectness_loss / normalizer, box_loss / normalizer

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        logits = objectness.detach().reshape(len(proposals), -1)
        chosen = self._get_top_n_idx(logits, num_anchors_per_level)
        counts = torch.tensor(num_anchors_per_level, device=logits.device)
        levels = torch.repeat_interleave(torch.arange(len(counts), device=logits.device), counts)
        found = [
            self._suppress(boxes[index], scores[index], levels[index], shape)
            for boxes, scores, index, shape in zip(proposals, logits, chosen, image_shapes, strict=True)
        ]
        return [boxes for boxes, _ in found], [scores for _, scores in found]

    def _suppress(
        self, boxes: Tensor, logits: Tensor, levels: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        if self.training and not (boxes.isfinite().all() and logits.isfinite().all()):
            raise BadInput(
                "training diverged: the region proposals are not finite; lower lr or warm up longer"
            )
        boxes = clip_boxes_to_image(boxes, shape)
        kept = not_empty(boxes) & logits.isfinite()
        boxes, logits, levels = boxes[kept], logits[kept], levels[kept]
        best = batched_nms(boxes, logits, levels, self.nms_thresh)[: self.post_nms_top_n()]
        return boxes[best], logits[best]


def not_empty(boxes: Tensor) -> Tensor:
    """Return which boxes `(n, 4)` have an area; NaN has none."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


# ---------------------------------------------------------------- region heads


class RoIPool(nn.Module):
    """Aligned RoIAlign with adaptive sampling, from the map of the pyramid that fits the box's size."""

    def __init__(self, strides: dict[str, int], edge: int):
        super().__init__()
        self.strides, self.edge = strides, edge

    def forward(self, features: Features, boxes: list[Tensor]) -> Tensor:
        first = features[next(iter(self.strides))]
        rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)]).to(first.dtype)
        if len(self.strides) == 1:
            return self._pool(features, rois, *self.strides)
        edges = box_area(rois[:, 1:]).sqrt()
        levels = torch.floor(CANONICAL_LEVEL + torch.log2(edges / CANONICAL_EDGE + 1e-8)).clamp(2, 5)
        pooled = first.new_zeros(len(rois), first.shape[1], self.edge, self.edge)
        for level, name in enumerate(self.strides, start=2):
            here = torch.where(levels == level)[0]
            pooled = pooled.index_put((here,), self._pool(features, rois[here], name))
        return pooled

    def _pool(self, features: Features, rois: Tensor, name: str) -> Tensor:
        scale = 1 / self.strides[name]
        return roi_align(features[name], rois, self.edge, scale, sampling_ratio=0, aligned=True)


class RoIHeads(roi_heads.RoIHeads):
    """Box head, and a mask branch that either pools for itself (FPN) or shares the box features (C4).

    torchvision would run the last stage a second time for the masks, interpolate soft mask targets, use
    smooth L1, and drop detections narrower than 0.01 pixels.
    """

    def __init__(self, *args: Any, mask_pool: RoIPool | None = None, mask_branch: nn.Module | None = None):
        super().__init__(*args)
        self.mask_pool, self.mask_branch = mask_pool, mask_branch

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            return [], self._losses(features, proposals, targets)
        logits, deltas = self.box_predictor(self._box_features(features, proposals))
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        names = ("boxes", "scores", "labels")
        detections = [dict(zip(names, values, strict=True)) for values in zip(*found, strict=True)]
        if self.mask_branch is not None:
            self._add_masks(features, detections)
        return detections, {}

    def _box_features(self, features: Features, boxes: list[Tensor]) -> Tensor:
        return self.box_head(self.box_roi_pool(features, boxes))

    def _losses(self, features: Features, proposals: list[Tensor], targets: Any) -> dict[str, Tensor]:
        boxes, matched, labels, deltas = self.select_training_samples(proposals, targets)
        x = self._box_features(features, boxes)
        logits, predicted = self.box_predictor(x)
        label, delta = torch.cat(labels), torch.cat(deltas)
        positive = torch.where(label > 0)[0]
        predicted = predicted.view(len(label), -1, 4)[positive, label[positive]]
        losses = {
            "loss_classifier": F.cross_entropy(logits, label),
            "loss_box_reg": F.l1_loss(predicted, delta[positive], reduction="sum") / len(label),
        }
        if self.mask_branch is not None:
            chosen = [each > 0 for each in labels]
            boxes = [b[c] for b, c in zip(boxes, chosen, strict=True)]
            matched = [m[c] for m, c in zip(matched, chosen, strict=True)]
            x = x[positive] if self.mask_pool is None else self.mask_pool(features, boxes)
            losses["loss_mask"] = mask_loss(self.mask_branch(x), label[positive], boxes, matched, targets)
        return losses

    def _add_masks(self, features: Features, detections: list[dict[str, Tensor]]) -> None:
        boxes = [detection["boxes"] for detection in detections]
        x = self.mask_pool(features, boxes) if self.mask_pool else self._box_features(features, boxes)
        labels = torch.cat([detection["labels"] for detection in detections])
        masks = self.mask_branch(x)[torch.arange(len(labels)), labels - 1].sigmoid()
        for detection, part in zip(detections, masks.split([len(b) for b in boxes]), strict=True):
            detection["masks"] = part

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        counts = [len(boxes) for boxes in proposals]
        boxes = self.box_coder.decode(box_regression, proposals).split(counts)
        scores = class_logits.softmax(1).split(counts)
        found = [self._best(*each) for each in zip(boxes, scores, image_shapes, strict=True)]
        return tuple(list(each) for each in zip(*found, strict=True))

    def _best(self, boxes: Tensor, scores: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        finite = boxes.isfinite().all(2).all(1) & scores.isfinite().all(1)
        boxes, scores = clip_boxes_to_image(boxes[finite], shape)[:, 1:], scores[finite, 1:]
        rows, classes = torch.where(scores > self.score_thresh)
        boxes, scores = boxes[rows, classes], scores[rows, classes]
        best = batched_nms(boxes, scores, classes, self.nms_thresh)[: self.detections_per_img]
        return boxes[best], scores[best], classes[best] + 1


class Res5(nn.Sequential):
    """C4's region head: the backbone's last stage and one BatchNorm of its own (MoCo, detection/)."""

    def __init__(self, stage: nn.Module, channels: int):
        super().__init__(OrderedDict(layer4=stage, norm=nn.BatchNorm2d(channels)))


class BoxPredictor(nn.Module):
    """Class logits `(n, classes + 1)`, background first, and box deltas of each class.

    Initialised as Detectron2 does. The deltas of background are never read. Maps are averaged over space.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.cls_score = nn.Linear(channels, classes + 1)
        self.bbox_pred = nn.Linear(channels, 4 * (classes + 1))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.mean((2, 3)) if x.ndim == 4 else x
        return self.cls_score(x), self.bbox_pred(x)


def box_head(inputs: int, convolutions: int, connected: int, edge: int, width: int) -> nn.Sequential:
    """Return FPN's box head `(n, inputs, edge, edge)` → `(n, width)`: convolutions with BatchNorm, then
    fully connected layers; initialised as Detectron2.
    """
    layers = [each for _ in range(convolutions) for each in convolution(inputs, inputs, norm=True)]
    layers.append(nn.Flatten())
    size = inputs * edge**2
    for _ in range(connected):
        layer = nn.Linear(size, width)
        nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
        size = width
    return nn.Sequential(*layers)


def mask_branch(inputs: int, channels: int, convolutions: int, classes: int, norm: bool) -> nn.Sequential:
    """Return the mask head `(n, inputs, S, S)` → logits `(n, classes, 2S, 2S)`, initialised as Detectron2."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += convolution(inputs, channels, norm)
        inputs = channels
    enlarge = nn.ConvTranspose2d(inputs, channels, 2, stride=2)
    predict = nn.Conv2d(channels, classes, 1)
    for layer in (enlarge, predict):
        nn.init.zeros_(layer.bias)
    nn.init.kaiming_normal_(enlarge.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(predict.weight, std=0.001)
    return nn.Sequential(*layers, enlarge, nn.ReLU(), predict)


def convolution(inputs: int, channels: int, norm: bool) -> list[nn.Module]:
    """Return a 3×3 convolution, BatchNorm in place of its bias if there is one, and ReLU."""
    layer = nn.Conv2d(inputs, channels, 3, padding=1, bias=not norm)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if norm:
        return [layer, nn.BatchNorm2d(channels), nn.ReLU()]
    nn.init.zeros_(layer.bias)
    return [layer, nn.ReLU()]


# ---------------------------------------------------------------- masks


def mask_loss(
    logits: Tensor, labels: Tensor, boxes: list[Tensor], matched: list[Tensor], targets: list[Target]
) -> Tensor:
    """Return the binary cross entropy of each positive region's mask of its own class; 0 without regions."""
    if len(labels) == 0:
        return logits.sum() * 0
    wanted = [
        rasterize(target["polygons"][match], box, logits.shape[-1])
        for target, matches, found in zip(targets, matched, boxes, strict=True)
        for match, box in zip(matches.tolist(), found.detach().cpu().numpy(), strict=True)
    ]
    return F.binary_cross_entropy_with_logits(
        logits[torch.arange(len(labels)), labels - 1], torch.stack(wanted).to(logits)
    )


def rasterize(polygons: list[Any], box: Any, edge: int) -> Tensor:
    """Return the binary mask `(edge, edge)` of `polygons` within `box`, as COCO draws polygons."""
    import numpy as np
    from pycocotools import mask as coco

    scale = edge / np.maximum(box[2:] - box[:2], 0.1)
    parts = [((np.reshape(p, (-1, 2)) - box[:2]) * scale).ravel() for p in polygons]
    return torch.from_numpy(coco.decode(coco.merge(coco.frPyObjects(parts, edge, edge))))


def paste_mask(mask: Tensor, box: Tensor, height: int, width: int) -> Tensor:
    """Return where the probabilities `mask` `(S, S)` of `box` reach 0.5 in an image, `(height, width)` bool.

    The mask is interpolated at pixel centres, which a whole number of pixels around the box suffices for.
    """
    x0, y0, x1, y1 = (float(v) for v in box)
    left, top = max(math.floor(x0) - 1, 0), max(math.floor(y0) - 1, 0)
    right, bottom = min(math.ceil(x1) + 1, width), min(math.ceil(y1) + 1, height)
    xs = (torch.arange(left, right, device=mask.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
    ys = (torch.arange(top, bottom, device=mask.device) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).to(mask.dtype)
    inside = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    return F.pad(inside, (left, width - right, top, height - bottom))


# ---------------------------------------------------------------- the whole


def build(resnet: ResNet, config: dict[str, Any], classes: int, masks: bool) -> Detector:
    """Return the detector on `resnet`'s weights, heads initialised at random; `config` is VOC's `Config`."""
    assemble = _c4 if config["detector"] == "c4" else _fpn
    return assemble(resnet, config, classes, masks)


def _c4(resnet: ResNet, config: dict[str, Any], classes: int, masks: bool) -> Detector:
    channels = resnet.channels["feature5"]
    anchors = Anchors((config["anchor_sizes"],), (16,))
    head = Res5(resnet.layer4, channels)
    body = OrderedDict((name, m) for name, m in resnet.named_children() if name != "layer4")
    branch = mask_branch(channels, config["head_channels"], 0, classes, norm=False) if masks else None
    heads = _roi_heads(RoIPool({"0": 16}, 14), head, BoxPredictor(channels, classes), config, None, branch)
    proposals = _rpn(anchors, resnet.channels["feature4"], config)
    return Detector(OneMap(body), proposals, heads, divisor=1)


class OneMap(nn.Module):
    """C4's backbone: the ResNet up to its third stage."""

    def __init__(self, body: OrderedDict[str, nn.Module]):
        super().__init__()
        self.body = nn.Sequential(body)

    def forward(self, images: Tensor) -> Features:
        return {"0": self.body(images)}


def _fpn(resnet: ResNet, config: dict[str, Any], classes: int, masks: bool) -> Detector:
    channels, width = config["head_channels"], config["fc_channels"]
    convolutions, connected = {"2fc": (0, 2), "4conv1fc": (4, 1)}[config["box_head"]]
    backbone = BackboneWithFPN(
        resnet,
        {f"layer{i + 1}": str(i) for i in range(4)},
        [resnet.channels[f"feature{i}"] for i in (2, 3, 4, 5)],
        channels,
        LastLevelMaxPool(),
        norm_layer=nn.BatchNorm2d,
    )
    anchors = Anchors(tuple((size,) for size in config["anchor_sizes"]), (4, 8, 16, 32, 64))
    strides = {"0": 4, "1": 8, "2": 16, "3": 32}
    heads = _roi_heads(
        RoIPool(strides, 7),
        box_head(channels, convolutions, connected, 7, width),
        BoxPredictor(width, classes),
        config,
        RoIPool(strides, 14) if masks else None,
        mask_branch(channels, channels, 4, classes, norm=convolutions > 0) if masks else None,
    )
    return Detector(backbone, _rpn(anchors, channels, config), heads, divisor=32)


def _rpn(anchors: Anchors, channels: int, config: dict[str, Any]) -> RPN:
    phases = ("training", "testing")
    return RPN(
        anchors,
        rpn.RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config["rpn_batch"],
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(phases, config["rpn_pre_nms"], strict=True)),
        post_nms_top_n=dict(zip(phases, config["rpn_post_nms"], strict=True)),
        nms_thresh=0.7,
        border_anchors=config["border_anchors"],
    )


def _roi_heads(
    pool: RoIPool,
    head: nn.Module,
    predictor: BoxPredictor,
    config: dict[str, Any],
    mask_pool: RoIPool | None,
    branch: nn.Module | None,
) -> RoIHeads:
    return RoIHeads(
        pool,
        head,
        predictor,
        0.5,  # IoU of a positive region
        0.5,  # IoU below which a region is background
        config["roi_batch"],
        0.25,  # share of positive regions
        (10.0, 10.0, 5.0, 5.0),  # box weights
        config["score_threshold"],
        0.5,  # NMS
        config["detections"],
        mask_pool=mask_pool,
        mask_branch=branch,
    )


def detector_key(key: str, detector: str) -> str:
    """Return where the backbone's tensor `key` lives in a "c4" or "fpn" detector of this file."""
    in_head = detector == "c4" and key.startswith("layer4.")
    return f"roi_heads.box_head.{key}" if in_head else f"backbone.body.{key}"
