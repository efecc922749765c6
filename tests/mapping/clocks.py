"""A clock that counts instead of measuring: every step takes as long as its weights say."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.graph import Graph
from espalier.mapping.clock import Profile

PER_BLOCK, PER_WEIGHT, REST, OVERHEAD = 2e-5, 1e-5, 0.003, 0.002  # milliseconds


class Net(nn.Module):
    """3 x 3, depthwise, 1 x 1 and linear layers; two convs are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(F.relu(self.stem(x))))))
        x = F.relu(self.point(F.relu(self.deep(x))))
        return self.fc(x.mean((2, 3)))


def step_ms(weight: Tensor) -> float:
    """Rows that share a column set share its cost: what makes blocks cheaper than single weights."""
    matrix = weight.reshape(weight.shape[0], -1) != 0
    blocks = sum(int(matrix[k : k + 4].any(0).sum()) for k in range(0, len(matrix), 4))
    return PER_BLOCK * blocks + PER_WEIGHT * int(matrix.sum())


class CountingClock:
    """Counts what it was asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graphs: Sequence[Graph], threads: int) -> list[Profile]:
        self.graphs += len(graphs)
        profiles = []
        for graph in graphs:
            steps = {n.name: step_ms(graph.tensors[n.inputs[1]]) for n in graph.nodes if n.op in ("conv", "linear")}
            steps["mean/reduce"] = REST
            profiles.append(Profile(steps, sum(steps.values()) + OVERHEAD))
        return profiles


def example() -> Tensor:
    return torch.zeros(1, 3, 12, 12)
