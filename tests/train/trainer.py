"""A training run that can be killed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.train import Data, Recipe, fit, load_data, seed_everything

RECIPE = Recipe(epochs=4, batch_size=16, lr=0.05, warmup_epochs=1.0, label_smoothing=0.1, clip=1.0, seed=3)


class Drifting:
    """Hooks with a state of their own, that draw random numbers of all three kinds."""

    pause_s = 0.0  # in a step

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.target, self.count = weight, torch.zeros_like(weight), 0

    def penalty(self) -> Tensor:
        return 0.01 * (self.weight - self.target).square().sum()

    def step(self) -> None:
        self.count += 1
        time.sleep(self.pause_s)
        noise = torch.rand(()) * float(np.random.rand()) * random.random()
        with torch.no_grad():
            self.target.lerp_(self.weight, 0.1 * float(noise))
            self.weight.mul_(0.999)

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.target, self.count = state["target"].clone(), state["count"]


def network() -> nn.Sequential:
    """Batch norm, dropout: whatever has a state or draws random numbers."""
    seed_everything(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 4),
    )


def data() -> Data:
    return load_data("synthetic:3x12x12:4")


def train(checkpoint: Path | None, recipe: Recipe = RECIPE, **options: Any) -> dict[str, Any]:
    """Train, or go on; returns everything that must not depend on whether there was an interruption."""
    model = network()
    hooks = Drifting(model[0].weight)
    history = fit(model, data(), recipe, hooks=hooks, checkpoint=checkpoint, resume=True, progress=False, **options)
    return {
        **{f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hooks.target": hooks.target,
        "hooks.count": torch.tensor(hooks.count),
        "history": torch.tensor([[e.loss, e.penalty, e.accuracy, e.holdout_loss, e.lr] for e in history.epochs]),
        "random": torch.rand(4),  # what follows goes on alike
    }


def slowly(checkpoint: Path, result: Path, save_every_s: float) -> None:
    """In a process of its own, with time to kill it, on any machine."""
    torch.set_num_threads(1)
    Drifting.pause_s = 0.005
    torch.save(train(checkpoint, save_every_s=save_every_s), result)
