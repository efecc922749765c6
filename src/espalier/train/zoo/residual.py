"""Residual networks: for CIFAR (ResNet-20 to 56, ResNet-18) and for ImageNet (ResNet-18, ResNet-50)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(inputs: int, outputs: int, window: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, window, stride, window // 2, bias=False)


class PadShortcut(nn.Module):
    """Shortcut "option A" of the ResNet paper: every other pixel, zero channels in front and behind; no parameters."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        front = self.extra // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, front, self.extra - front))


class BasicBlock(nn.Module):
    """Two 3 x 3 convs and a shortcut; `inner` is the width between them."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str, inner: int | None = None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, inner or width, 3, stride)
        self.bn1 = nn.BatchNorm2d(inner or width)
        self.conv2 = _conv(inner or width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        _add_shortcut(self, inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + _shortcut(self, x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride), 1 x 1, four times as wide, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str, inner: int | None = None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        _add_shortcut(self, inputs, 4 * width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + _shortcut(self, x))


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    downsample: Any = block.downsample
    return x if downsample is None else downsample(x)


def _add_shortcut(block: nn.Module, inputs: int, width: int, stride: int, shortcut: str) -> None:
    if stride == 1 and inputs == width:
        block.downsample = None  # type: ignore[assignment]
    elif shortcut == "A":
        block.downsample = PadShortcut(width - inputs)
    else:
        block.downsample = nn.Sequential(_conv(inputs, width, 1, stride), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """A residual network with torchvision's parameter names.

    widths: of the stages; blocks: how many in each. stem: "imagenet" (7 x 7, stride 2, pool) or "cifar" (3 x 3).
    shortcut: "A" (padding) or "B" (a 1 x 1 conv). classifier: the name of the last layer.
    inner: widths between the two convs of each basic block, for networks that were narrowed before.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        classes: int,
        stem: str = "cifar",
        shortcut: str = "B",
        classifier: str = "fc",
        inner: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        imagenet = stem == "imagenet"
        self.conv1 = _conv(3, widths[0], 7, 2) if imagenet else _conv(3, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        inputs, self.stages, narrowed = widths[0], len(widths), iter(inner or ())
        for k, (count, width) in enumerate(zip(blocks, widths)):
            layers: list[nn.Module] = []
            for j in range(count):
                stride = 2 if j == 0 and k > 0 else 1
                layers.append(block(inputs, width, stride, shortcut, next(narrowed, None)))
                inputs = width * block.expansion
            self.add_module(f"layer{k + 1}", nn.Sequential(*layers))
        self.classifier_name = classifier
        self.add_module(classifier, nn.Linear(inputs, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for k in range(self.stages):
            x = self.get_submodule(f"layer{k + 1}")(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.get_submodule(self.classifier_name)(x)


def cifar_resnet(
    depth: int, classes: int = 10, shortcut: str = "A", classifier: str = "linear", inner: Sequence[int] | None = None
) -> ResNet:
    """ResNet-20, 32, 44, 56 for CIFAR: three stages 16/32/64 of (depth - 2) / 6 basic blocks."""
    return ResNet(BasicBlock, [(depth - 2) // 6] * 3, (16, 32, 64), classes, "cifar", shortcut, classifier, inner)


def cifar_resnet56_bottleneck(classes: int = 100) -> ResNet:
    """The bottleneck ResNet-56 for CIFAR: three stages 16/32/64 (times 4) of six bottlenecks."""
    return ResNet(Bottleneck, [6] * 3, (16, 32, 64), classes)


def resnet18(classes: int = 1000, stem: str = "imagenet") -> ResNet:
    """ResNet-18, for ImageNet or (stem "cifar") for 32 x 32 images."""
    return ResNet(BasicBlock, [2] * 4, (64, 128, 256, 512), classes, stem)


def resnet50(classes: int = 1000) -> ResNet:
    """ResNet-50 for ImageNet."""
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), classes, "imagenet")
