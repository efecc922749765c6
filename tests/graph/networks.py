"""Small networks, one for each way in which channels go."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.train.zoo.residual import BasicBlock


class Chain(nn.Module):
    """conv, pool, conv, pool, a view with its size wired in, linear."""

    shape = (1, 20, 20)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 9, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), 2))), 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 72))))


class Residual(nn.Module):
    """Basic blocks with both shortcuts."""

    shape = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(
            BasicBlock(8, 8, 1, "A"), BasicBlock(8, 16, 2, "A"), BasicBlock(16, 24, 2, "B"), BasicBlock(24, 24, 1, "B")
        )
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Dense(nn.Module):
    """Concatenations with a norm before each conv, as in DenseNet."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * k) for k in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * k, 4, 3, padding=1, bias=False) for k in range(3))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.fc(F.relu(self.norms[3](x)).mean((2, 3)))


class Inverted(nn.Module):
    """An inverted residual with a depthwise conv, squeeze-excitation, and a grouped conv."""

    shape = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand, self.norm1 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.deep, self.norm2 = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.project, self.norm3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu6(self.norm2(self.deep(F.relu6(self.norm1(self.expand(x))))))
        x = x + self.norm3(self.project(y))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(self.grouped(x * gate).mean((2, 3)))


class Shuffle(nn.Module):
    """Split, convs on one half, concat, channel shuffle."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([a, F.relu(self.branch(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(x).mean((2, 3))


class Sequence(nn.Module):
    """1-d convs over a signal."""

    shape = (4, 32)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(4, 12, 5, padding=2), nn.Conv1d(12, 6, 3, 2, dilation=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.leaky_relu(self.conv2(F.elu(self.conv1(x)))).mean(2))


class Unknown(nn.Module):
    """An op without a row in the middle."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cumsum(F.relu(self.conv1(x)), 1)
        return self.conv3(F.relu(self.conv2(x))).mean((2, 3))


class Pixels(nn.Module):
    """A pixel shuffle, which puts several channels into one, and a slope for every channel."""

    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.slopes = nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.slopes(F.pixel_shuffle(self.stem(x), 2))).mean((2, 3))


class Tied(nn.Module):
    """One weight used by two layers."""

    shape = (8,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Several(nn.Module):
    """Two inputs, a dict of outputs."""

    shape = (8,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        hidden = F.relu(self.a(x) + self.b(y))
        return {"logits": self.c(hidden), "more": [hidden.mean(1), x * 2]}


NETWORKS = [Chain, Residual, Dense, Inverted, Shuffle, Sequence, Unknown, Pixels, Tied]


def stirred(kind: type[nn.Module], seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in eval mode whose norms do something, and an example input."""
    torch.manual_seed(seed)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model, torch.randn(1, *kind.shape)
