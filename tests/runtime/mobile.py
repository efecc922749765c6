"""Small networks like those for telephones: squeeze and excite, hard swish, shuffles, grouped convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(
    i: int, o: int, window: int = 1, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
) -> nn.Module:
    layers = [nn.Conv2d(i, o, window, stride, window // 2, groups=groups, bias=False), nn.BatchNorm2d(o), act()]
    return nn.Sequential(*layers)


class Squeeze(nn.Module):
    """x * gate(up(relu(down(mean(x)))))"""

    def __init__(self, channels: int, inner: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)
        self.mean, self.act, self.gate = nn.AdaptiveAvgPool2d(1), act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(self.act(self.down(self.mean(x)))))


class Inverted(nn.Module):
    """Expand, a depthwise window, squeeze and excite, project; as in MobileNetV3 and EfficientNet."""

    def __init__(self, i: int, wide: int, o: int, window: int, stride: int, act: type[nn.Module], squeeze: nn.Module):
        super().__init__()
        self.body = nn.Sequential(
            conv(i, wide, act=act),
            conv(wide, wide, window, stride, wide, act),
            squeeze,
            conv(wide, o, act=nn.Identity),
        )
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Shuffle(nn.Module):
    """Half of the channels pass, the others are worked on, then they are shuffled; as in ShuffleNetV2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(conv(half, half), conv(half, half, 3, 1, half, nn.Identity), conv(half, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, 1)
        y = torch.cat([kept, self.body(worked)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Bottleneck(nn.Module):
    """Of a ResNeXt: 1x1, grouped 3x3, 1x1, and the input again."""

    def __init__(self, channels: int, inner: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(channels, inner), conv(inner, inner, 3, 1, groups), conv(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def mobilenetv3() -> nn.Module:
    swish = nn.Hardswish

    def squeeze(n: int) -> nn.Module:
        return Squeeze(n, n // 4, nn.ReLU, nn.Hardsigmoid)

    return nn.Sequential(
        conv(3, 16, 3, 2, act=swish),
        Inverted(16, 16, 16, 3, 2, nn.ReLU, squeeze(16)),
        Inverted(16, 72, 24, 3, 2, nn.ReLU, nn.Identity()),
        Inverted(24, 88, 24, 3, 1, nn.ReLU, nn.Identity()),
        Inverted(24, 96, 40, 5, 2, swish, squeeze(96)),
        Inverted(40, 240, 40, 5, 1, swish, squeeze(240)),
        conv(40, 288, act=swish),
        head(288),
    )


def efficientnet() -> nn.Module:
    def squeeze(n: int) -> nn.Module:
        return Squeeze(n, max(4, n // 24), nn.SiLU, nn.Sigmoid)

    return nn.Sequential(
        conv(3, 32, 3, 2, act=nn.SiLU),
        Inverted(32, 96, 24, 3, 2, nn.SiLU, squeeze(96)),
        Inverted(24, 144, 24, 3, 1, nn.SiLU, squeeze(144)),
        Inverted(24, 144, 40, 5, 2, nn.SiLU, squeeze(144)),
        Inverted(40, 240, 40, 5, 1, nn.SiLU, squeeze(240)),
        head(40),
    )


def shufflenet() -> nn.Module:
    pool = nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(
        conv(3, 24, 3, 2), pool, conv(24, 116), Shuffle(116), Shuffle(116), pool, Shuffle(116), head(116)
    )


def resnext() -> nn.Module:
    stem = nn.Sequential(conv(3, 32, 7, 2), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(stem, Bottleneck(32, 64, 16), nn.AvgPool2d(2), conv(32, 64), Bottleneck(64, 128, 16), head(64))


NETWORKS = {"mobilenetv3": mobilenetv3, "efficientnet": efficientnet, "shufflenet": shufflenet, "resnext": resnext}
