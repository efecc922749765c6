"""MobileNetV2 and DenseNet-40."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.train.zoo.initial import initialise


def _conv_norm(
    inputs: int, outputs: int, window: int, stride: int, groups: int, tensorflow: bool, folded: bool
) -> nn.Sequential:
    pad = tensorflow and stride == 2 and window == 3
    layers: dict[str, nn.Module] = {"pad": nn.ZeroPad2d((0, 1, 0, 1))} if pad else {}  # "0" stays the conv
    layers["0"] = nn.Conv2d(inputs, outputs, window, stride, 0 if pad else window // 2, groups=groups, bias=folded)
    layers["1"] = nn.Identity() if folded else nn.BatchNorm2d(outputs)
    layers["2"] = nn.ReLU6()
    return nn.Sequential(OrderedDict(layers))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, tensorflow: bool, folded: bool) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(_conv_norm(inputs, hidden, 1, 1, 1, tensorflow, folded))
        layers.append(_conv_norm(hidden, hidden, 3, stride, hidden, tensorflow, folded))
        layers.append(nn.Conv2d(hidden, outputs, 1, bias=folded))
        layers += [] if folded else [nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 with torchvision's names.

    tensorflow: TensorFlow's padding before each stride-2 3 x 3 conv. folded: no batch norms, every conv has a bias.
    Source: Sandler et al. 2018, table 2.

    >>> MobileNetV2(10, folded=True)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(self, classes: int = 1000, tensorflow: bool = False, folded: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm(3, 32, 3, 2, 1, tensorflow, folded)]
        inputs = 32
        rows = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expand, width, count, stride in rows:
            for j in range(count):
                layers.append(_InvertedResidual(inputs, width, stride if j == 0 else 1, expand, tensorflow, folded))
                inputs = width
        layers.append(_conv_norm(inputs, 1280, 1, 1, 1, tensorflow, folded))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet40(nn.Module):
    """DenseNet-40 (k = 12) for CIFAR: three dense blocks of twelve layers, no bottleneck, no compression.

    Source: Huang et al. 2017, "Densely connected convolutional networks".

    >>> DenseNet40()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, growth: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        width = 16
        for block in range(3):
            for _ in range(12):
                layers.append(_DenseLayer(width, growth))
                width += growth
            if block < 2:
                layers.append(
                    nn.Sequential(
                        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1, bias=False), nn.AvgPool2d(2)
                    )
                )
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.layers(self.conv(x)))).mean((2, 3)))
