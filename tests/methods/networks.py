"""A small network that runs of the method tests shape, and the training of a few steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.methods import Run

EXAMPLE = torch.zeros(1, 2, 6, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))).mean((2, 3)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Sixteen images and labels: the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 2, 6, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def train(model: nn.Module, run: Run, optimizer: torch.optim.Optimizer, first: int, last: int, end: int = 0) -> None:
    """Steps `first` .. `last`; after step `end` the run is finished."""
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + run.penalty()).backward()
        optimizer.step()
        run.step()
        if step + 1 == end:
            run.finish()
