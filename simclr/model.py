"""The encoder: a ResNet that shows its features stage by stage; and the projector of pretraining."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from simclr import BadInput


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, figure 5 left); torchvision's names."""

    # Written out because importing torchvision takes longer than importing torch.
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)).add_(shortcut))


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride: ResNet v1.5), 1×1 to four times the planes, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)).add_(shortcut))


# Depth → block and number of blocks per stage (He et al. 2016, table 1).
STAGES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}

# Layer → edge of its map at 224 pixels; kernel, stride, padding of its pooling (MMSelfSup, multi_pooling.py).
SPECIFIED_POOLING = {
    "feature1": (112, (10, 10, 4)),
    "feature2": (56, (16, 8, 0)),
    "feature3": (28, (13, 5, 0)),
    "feature4": (14, (8, 3, 0)),
    "feature5": (7, (6, 1, 0)),
}
# Layer → edge of the grid that either pooling leaves.
GRID = {"feature1": 12, "feature2": 6, "feature3": 4, "feature4": 3, "feature5": 2}


class ResNet(nn.Module):
    """ResNet v1.5 (stride in the 3×3 convolution) with torchvision's key names and without its classifier.

    `width` multiplies the channels of every layer, the stem's 64 included (SimCLR paper, section 4.1).
    `channels` maps each layer of `forward_features` to its number of channels.
    """

    def __init__(self, architecture: str):
        super().__init__()
        depth, width = parse_architecture(architecture)
        block, blocks = STAGES[depth]
        channels = [round(64 * width * 2**i) for i in range(4)]
        self.conv1 = nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = channels[0]
        for i, (planes, n) in enumerate(zip(channels, blocks, strict=True)):
            setattr(self, f"layer{i + 1}", _stage(block, inputs, planes, n, stride=1 if i == 0 else 2))
            inputs = planes * block.expansion
        outputs = [planes * block.expansion for planes in channels]
        names = (*GRID, "avgpool")
        self.channels = dict(zip(names, (channels[0], *outputs, outputs[-1]), strict=True))
        self.apply(_initialise)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return every layer of `images` `(N, 3, H, W)`.

        `feature1` is the stem after BatchNorm and ReLU, before max-pooling; `feature2` … `feature5` are the
        outputs of the four stages; `avgpool` is their end, averaged over space, `(N, D)`.
        """
        features = {"feature1": self.relu(self.bn1(self.conv1(images)))}
        x = self.maxpool(features["feature1"])
        for name, stage in zip(("feature2", "feature3", "feature4", "feature5"), self.stages, strict=True):
            features[name] = x = stage(x)
        return {**features, "avgpool": x.mean((2, 3))}

    def forward(self, images: Tensor) -> Tensor:
        """Return the globally averaged last stage of `images` `(N, 3, H, W)`: `(N, D)`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = stage(x)
        return x.mean((2, 3))


def resnet(architecture: str, zero_init_residual: bool = False) -> ResNet:
    """Return a randomly initialised `resnet18`, `resnet34` or `resnet50`, e.g. `resnet50_w2` of double width.

    `zero_init_residual` zeroes the last BatchNorm weight of every block, so that each block starts as its
    shortcut (Goyal et al. 2017). Raises `BadInput` for any other architecture.
    """
    model = ResNet(architecture)
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, Bottleneck | BasicBlock):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)
    return model


def parse_architecture(architecture: str) -> tuple[str, float]:
    """Split e.g. `resnet18_w0.25` into depth and width multiplier: `("resnet18", 0.25)`."""
    match = re.fullmatch(r"(\w+?)(?:_w(\d+(?:\.\d+)?))?", architecture)
    depth, width = (match[1], float(match[2] or 1)) if match else ("", 0.0)
    if depth not in STAGES or not (64 * width).is_integer() or width == 0:
        raise BadInput(
            f"expected an architecture among {', '.join(STAGES)}, with or without a width such as _w2 or "
            f"_w0.25 (a multiple of 1/64), found {architecture!r}"
        )
    return depth, width


def _stage(
    block: type[BasicBlock | Bottleneck], inputs: int, planes: int, blocks: int, stride: int
) -> nn.Module:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
    return nn.Sequential(
        block(inputs, planes, stride, shortcut), *(block(outputs, planes) for _ in range(blocks - 1))
    )


def _initialise(module: nn.Module) -> None:
    """Convolutions normal with fan-out, ReLU gain; BatchNorm keeps its weight 1, bias 0 (He et al. 2015)."""
    # Nothing to fill on the meta device, where drawing makes torch import its compiler (seconds).
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def projector(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return the projection head `(N, inputs)` → `(N, outputs)` (MMSelfSup, nonlinear_neck.py).

    Neither linear layer has a bias; the last BatchNorm is affine (google-research/simclr's has no beta).
    """
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
        nn.BatchNorm1d(outputs),
    )


def pool(features: dict[str, Tensor], pooling: str) -> dict[str, Tensor]:
    """Average-pool maps `(N, C, H, W)` to the grids of the linear benchmarks and flatten them to `(N, D)`.

    `pooling` is "specified" (MMSelfSup's five kernels, defined at 224 pixels; padded zeros count) or
    "adaptive" (grids of edge 12, 6, 4, 3, 2 at any size). `avgpool` passes through. D is (C, H, W) flattened.
    """
    return {
        name: x if name == "avgpool" else pool_layer(name, x, pooling).flatten(1)
        for name, x in features.items()
    }


def pool_layer(name: str, x: Tensor, pooling: str) -> Tensor:
    """Average-pool the map `x` `(N, C, H, W)` of layer `name` to a grid of `GRID[name]` × `GRID[name]`."""
    if pooling == "adaptive":
        return F.adaptive_avg_pool2d(x, GRID[name])
    edge, (kernel, stride, padding) = SPECIFIED_POOLING[name]
    if x.shape[-2:] != (edge, edge):
        raise BadInput(
            f"pooling: specified expects images of 224 × 224 pixels, with {name} of {edge} × {edge}; found "
            f"{x.shape[-2]} × {x.shape[-1]}; use pooling: adaptive"
        )
    return F.avg_pool2d(x, kernel, stride, padding)
