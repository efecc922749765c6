"""Small convolutional networks of the kinds that are deployed, written by hand: one class, one idea."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), act())


class Gate(nn.Module):
    """Squeeze-excitation."""

    def __init__(self, channels: int, squeezed: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), act(), gate()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class MobileBlock(nn.Module):
    """Expand, depthwise, gate, project."""

    def __init__(
        self, i: int, wide: int, o: int, k: int, stride: int, act: type[nn.Module], gate: type[nn.Module] | None
    ) -> None:
        super().__init__()
        layers = [conv(i, wide, 1, act=act), conv(wide, wide, k, stride, wide, act)]
        if gate is not None:
            layers.append(Gate(wide, max(4, wide // 4), nn.ReLU if gate is nn.Hardsigmoid else nn.SiLU, gate))
        self.block = nn.Sequential(*layers, conv(wide, o, 1, act=nn.Identity))
        self.skip = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.skip else self.block(x)


class MobileNetV3(nn.Module):
    shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        swish, hard = nn.Hardswish, nn.Hardsigmoid
        self.features = nn.Sequential(
            conv(3, 8, 3, 2, act=swish),
            MobileBlock(8, 16, 8, 3, 1, nn.ReLU, hard),
            MobileBlock(8, 24, 12, 5, 2, swish, hard),
            MobileBlock(12, 36, 12, 5, 1, swish, hard),
            conv(12, 40, 1, act=swish),
        )
        self.head = nn.Sequential(nn.Linear(40, 48), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class EfficientNet(nn.Module):
    shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        act, gate = nn.SiLU, nn.Sigmoid
        self.features = nn.Sequential(
            conv(3, 8, 3, 2, act=act),
            MobileBlock(8, 32, 12, 3, 2, act, gate),
            MobileBlock(12, 48, 12, 5, 1, act, gate),
            conv(12, 40, 1, act=act),
        )
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(x).mean([2, 3]), 0.2, self.training))


class UNet(nn.Module):
    """Up by a transposed conv, by bilinear and by nearest interpolation; concatenation with what was there before."""

    shape = (3, 24, 20)

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3, 8), conv(8, 12), conv(12, 16), conv(16, 20)])
        self.up = nn.ConvTranspose2d(20, 16, 2, 2)
        self.merge = nn.ModuleList([conv(32, 12), conv(24, 10), conv(18, 8)])
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for k, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if k else x)
            kept.append(x)
        x = F.interpolate(self.up(kept[3]), size=kept[2].shape[2:], mode="nearest")
        x = self.merge[0](torch.cat([x, kept[2]], 1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = self.merge[1](torch.cat([x, kept[1]], 1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(self.merge[2](torch.cat([x, kept[0]], 1)))


class Neck(nn.Module):
    """A YOLO-like detector: split stages, pooling pyramid, a path up and a path down, heads at two scales."""

    shape = (3, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        act = nn.SiLU
        self.stem = nn.Sequential(conv(3, 8, 3, 2, act=act), conv(8, 16, 3, 2, act=act))
        self.inner = nn.ModuleList([conv(8, 8, act=act), conv(8, 8, act=act)])
        self.fuse = conv(32, 16, 1, act=act)
        self.deep = conv(16, 24, 3, 2, act=act)
        self.squeeze, self.spread = conv(24, 12, 1, act=act), conv(48, 24, 1, act=act)
        self.merge, self.back, self.final = conv(40, 16, act=act), conv(16, 16, 3, 2, act=act), conv(40, 24, act=act)
        self.heads = nn.ModuleList([nn.Conv2d(16, 18, 1), nn.Conv2d(24, 18, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem(x).chunk(2, 1)
        parts = [a, b]
        for layer in self.inner:
            parts.append(layer(parts[-1]))
        high = self.fuse(torch.cat(parts, 1))
        low = self.squeeze(self.deep(high))
        pyramid = [low]
        for _ in range(3):
            pyramid.append(F.max_pool2d(pyramid[-1], 5, 1, 2))
        low = self.spread(torch.cat(pyramid, 1))
        high = self.merge(torch.cat([F.interpolate(low, scale_factor=2.0), high], 1))
        low = self.final(torch.cat([self.back(high), low], 1))
        heads = [head(y) for head, y in zip(self.heads, (high, low))]
        flat = [h.view(h.shape[0], 3, 6, *h.shape[2:]).permute(0, 1, 3, 4, 2).flatten(1, 3) for h in heads]
        return torch.cat([f.sigmoid() for f in flat], 1), low


class SqueezeNet(nn.Module):
    shape = (3, 33, 33)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2)
        self.squeeze = nn.ModuleList([nn.Conv2d(12, 6, 1), nn.Conv2d(16, 6, 1)])
        self.small = nn.ModuleList([nn.Conv2d(6, 8, 1), nn.Conv2d(6, 10, 1)])
        self.large = nn.ModuleList([nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 10, 3, padding=1)])
        self.last = nn.Conv2d(20, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)
        for squeeze, small, large in zip(self.squeeze, self.small, self.large):
            x = F.relu(squeeze(x))
            x = torch.cat([F.relu(small(x)), F.relu(large(x))], 1)
        return F.adaptive_avg_pool2d(F.relu(self.last(F.dropout(x, 0.5, self.training))), (1, 1)).flatten(1)


class ShuffleNet(nn.Module):
    shape = (3, 24, 24)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3, 2)
        self.branches = nn.ModuleList(
            nn.Sequential(conv(8, 8, 1), conv(8, 8, 3, 1, 8, nn.Identity), conv(8, 8, 1)) for _ in range(2)
        )
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            a, b = x.chunk(2, 1)
            x = torch.cat([a, branch(b)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(x.mean([2, 3]))


class ResNeXt(nn.Module):
    shape = (3, 20, 20)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(16, 24, 1), conv(24, 24, 3, 1, 4), conv(24, 16, 1, act=nn.Identity)) for _ in range(2)
        )
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.last(x.mean([2, 3]))


PICTURES = (MobileNetV3, EfficientNet, UNet, Neck, SqueezeNet, ShuffleNet, ResNeXt)
