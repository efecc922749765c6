"""Residual networks: for CIFAR (ResNet-20 to 56, ResNet-18) and for ImageNet (ResNet-18, ResNet-50)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import DataError, UnknownNameError
from espalier.train.zoo.initial import initialise
from espalier.train.zoo.weights import inner_widths

SHORTCUTS = ("A", "B")


def _conv(inputs: int, outputs: int, window: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, window, stride, window // 2, bias=False)


class PadShortcut(nn.Module):
    """Shortcut "option A" of the ResNet paper: every other pixel, zero channels in front and behind; no parameters.

    >>> PadShortcut(16)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        front = self.extra // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, front, self.extra - front))


class BasicBlock(nn.Module):
    """Two 3 x 3 convs and a shortcut; `inner` is the width between them, by default `width`.

    >>> BasicBlock(16, 32, 2, "A")(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or width
        self.conv1 = _conv(inputs, inner, 3, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        _add_shortcut(self, inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + _shortcut(self, x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride), 1 x 1 to 4 x `width`, and a shortcut; `inner` is the width of the first two.

    >>> Bottleneck(16, 32, 2, "B")(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 128, 4, 4])
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or width
        self.conv1 = _conv(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, 4 * width, 1)
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
    if shortcut not in SHORTCUTS:
        raise UnknownNameError("shortcut", shortcut, SHORTCUTS)
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
    inner: the inner width of every block, for networks that were narrowed before.

    >>> ResNet(BasicBlock, [1, 1], [8, 16], classes=5)(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 5])
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
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for k in range(self.stages):
            x = self.get_submodule(f"layer{k + 1}")(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.get_submodule(self.classifier_name)(x)


def cifar_resnet(
    depth: int,
    classes: int = 10,
    shortcut: str = "A",
    classifier: str | None = None,
    widths: Sequence[int] | str | Path | None = None,
) -> ResNet:
    """ResNet-20, 32, 44, 56 for CIFAR: three stages 16/32/64 of (depth - 2) / 6 basic blocks.

    shortcut: "A" (no parameters) or "B" (1 x 1 convs). classifier: the name of the last layer, by default ``linear``
    with A and ``fc`` with B, as in the weights that are about. widths: the inner width of every block, or a
    safetensors file of a narrowed network to read them from.
    Source: He et al. 2015, "Deep residual learning for image recognition", 4.2.

    >>> cifar_resnet(20, widths=[8] * 9).layer1[0].conv1.weight.shape
    torch.Size([8, 16, 3, 3])
    """
    blocks = (depth - 2) // 6
    inner = inner_widths(widths) if isinstance(widths, (str, Path)) else widths
    if inner is not None and len(inner) != 3 * blocks:
        raise DataError(f"ResNet-{depth} has {3 * blocks} blocks, but there are {len(inner)} widths")
    classifier = classifier or ("linear" if shortcut == "A" else "fc")
    return ResNet(BasicBlock, [blocks] * 3, (16, 32, 64), classes, "cifar", shortcut, classifier, inner)


def cifar_resnet56_bottleneck(classes: int = 100) -> ResNet:
    """The bottleneck ResNet-56 for CIFAR: three stages 16/32/64 (times 4) of six bottlenecks.

    >>> cifar_resnet56_bottleneck().fc.out_features
    100
    """
    return ResNet(Bottleneck, [6] * 3, (16, 32, 64), classes)


def resnet18(classes: int = 1000, stem: str = "imagenet") -> ResNet:
    """ResNet-18, for ImageNet or (stem "cifar") for 32 x 32 images.

    >>> resnet18(10, stem="cifar")(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    return ResNet(BasicBlock, [2] * 4, (64, 128, 256, 512), classes, stem)


def resnet50(classes: int = 1000) -> ResNet:
    """ResNet-50 for ImageNet, the stride on the 3 x 3 convs.

    >>> resnet50().fc.in_features
    2048
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), classes, "imagenet")
