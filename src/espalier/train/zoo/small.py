"""LeNet-5, the digits network, AlexNet, VGG, SqueezeNet: chains of convs and linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.train.zoo.initial import initialise


class LeNet5(nn.Module):
    """LeNet-5 in its 20-50-500-10 form (the one that pruning papers count): 431,080 parameters on 1 x 28 x 28.

    >>> LeNet5()(torch.zeros(1, 1, 28, 28)).shape
    torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class LeNetDigits(nn.Module):
    """LeNet's shape for the 8 x 8 digits of scikit-learn: two convs, two pools, two linear layers.

    >>> LeNetDigits(width=32)(torch.zeros(1, 1, 8, 8)).shape
    torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc1 = nn.Linear(8 * width, 4 * width)
        self.fc2 = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class AlexNet(nn.Module):
    """AlexNet with torchvision's sizes and parameter names.

    >>> AlexNet(10)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(256 * 36, 4096), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pool


class VGG16(nn.Module):
    """VGG-16 with torchvision's names; `cifar` replaces the three linear layers by one and adds batch norms.

    >>> VGG16(10, cifar=True)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, classes: int = 1000, batch_norm: bool = False, cifar: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in _VGG16:
            if width == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers.append(nn.Conv2d(inputs, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] if batch_norm or cifar else []
            layers.append(nn.ReLU())
            inputs = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1 if cifar else 7)
        self.classifier: nn.Module = (
            nn.Linear(512, classes)
            if cifar
            else nn.Sequential(
                *(nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Dropout()),
                *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
                nn.Linear(4096, classes),
            )
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class _Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.conv1x1_1 = nn.Conv2d(inputs, squeeze, 1)
        self.conv1x1_2 = nn.Conv2d(squeeze, expand, 1)
        self.conv3x3_2 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1x1_1(x))
        return torch.cat([F.relu(self.conv1x1_2(x)), F.relu(self.conv3x3_2(x))], 1)


class SqueezeNet10(nn.Module):
    """SqueezeNet 1.0 in its authors' form (no padding in the stem, the classifier's 1 x 1 conv padded).

    >>> SqueezeNet10(10)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        widths = (16, 16, 32, 32, 48, 48, 64, 64)
        inputs = 96
        for k, squeeze in enumerate(widths):
            self.add_module(f"fire{k + 2}", _Fire(inputs, squeeze, 4 * squeeze))
            inputs = 8 * squeeze
        self.conv_final = nn.Conv2d(512, classes, 1, padding=1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        for k in range(2, 10):
            if k in (2, 5, 9):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = self.get_submodule(f"fire{k}")(x)
        return F.relu(self.conv_final(x)).mean((2, 3))
