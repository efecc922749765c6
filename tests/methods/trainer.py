"""Runs of every method that can be killed: `every(folder)` makes a METHOD.result for each, and goes on where it was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.methods import METHODS, Run, start
from espalier.sparsity import Plan
from espalier.train import Recipe, fit, load_data, seed_everything

RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05, seed=3)
SETTINGS: dict[str, dict[str, Any]] = {"magnitude": {"ramp": "cubic", "score": "taylor", "regrow": True}}


class Slow:
    """A run that leaves time to kill it."""

    def __init__(self, run: Run, pause_s: float) -> None:
        self.run, self.pause_s = run, pause_s
        self.penalty, self.state_dict, self.load_state_dict = run.penalty, run.state_dict, run.load_state_dict

    def step(self) -> None:
        time.sleep(self.pause_s)
        self.run.step()


def train(method: str, checkpoint: Path | None, pause_s: float = 0.0) -> dict[str, Any]:
    """Shape a small network, or go on with it; returns its weights."""
    data = load_data("synthetic:3x12x12:4")
    seed_everything(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 4),
    )
    plan, example = Plan.uniform("filter+column", 0.3, dense=["5"]), torch.zeros(1, 3, 12, 12)
    steps = RECIPE.epochs * data.train.steps(RECIPE.batch_size)
    run = start(model, plan, get_method(method), example, steps=steps)
    hooks = Slow(run, pause_s)
    fit(model, data, RECIPE, hooks=hooks, checkpoint=checkpoint, resume=True, progress=False, save_every_s=0.0)
    run.finish()
    return dict(model.state_dict())


def get_method(method: str) -> Any:
    return METHODS[method](**SETTINGS.get(method, {}))


def every(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in METHODS:
        if not (folder / f"{name}.result").exists():
            made = train(name, folder / f"{name}.pt", pause_s=0.005)
            torch.save(made, folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / f"{name}.result")
