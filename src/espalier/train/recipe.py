"""How to train: a recipe, and the tables of optimizers and schedules that it chooses from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from espalier.errors import TrainingError, UnknownNameError

STEPS_DOWN = (0.5, 0.75)  # of the run: where the "step" schedule divides by ten, as in the ResNet paper


@dataclass(frozen=True)
class Recipe:
    """How to train.

    lr: the highest learning rate; it rises to it over `warmup_epochs` and then follows `schedule`.
    weight_decay: of weights of two and more dimensions; biases and norms are left out.
    clip: the largest norm of the gradient, 0 for no limit. accumulate: parts in which a batch is worked, which saves
    memory.
    distill, temperature: the share of the loss that asks for the softened answers of a teacher (Hinton et al.,
        arXiv 1503.02531) instead of the labels: ``(1 - distill) CE + distill T^2 KL(teacher / T || network / T)``.
    precision: as lightning-fabric says it, such as "32-true" or "bf16-mixed".

    Raises UnknownNameError for an optimizer or schedule, TrainingError for a number outside its range.

    >>> Recipe(epochs=30, lr=0.1, schedule="step").batch_size
    128
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup_epochs: float = 0.5
    label_smoothing: float = 0.0
    clip: float = 0.0
    accumulate: int = 1
    distill: float = 0.0
    temperature: float = 4.0
    precision: str = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, name, table in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            _known(kind, name, table)
        for field, low in _LEAST.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= low):
                raise TrainingError(f"the recipe's {field} is {value}, expected a number of {low} or more")
        if self.distill > 1 or self.temperature == 0:
            raise TrainingError(
                f"the recipe's distill is {self.distill}, expected 0..1, and its temperature {self.temperature}, "
                "expected more than 0"
            )

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0.

        >>> [round(Recipe(epochs=2, lr=1.0, warmup_epochs=0.5).lr_at(step, 4), 3) for step in range(8)]
        [0.333, 0.667, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
        """
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1.0, self.epochs * steps_per_epoch - warmup)
        return self.lr * SCHEDULES[self.schedule](share)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `model`'s trainable parameters. Raises TrainingError where there are none.

        >>> Recipe(optimizer="adam", weight_decay=0.1).make_optimizer(nn.Linear(2, 2)).param_groups[1]["weight_decay"]
        0.0
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if not trained:
            raise TrainingError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to train")
        return OPTIMIZERS[self.optimizer]([group for group in groups if group["params"]], self)


Groups = list[dict[str, Any]]


def _sgd(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)


def _stepped(share: float) -> float:
    return 0.1 ** sum(share >= at for at in STEPS_DOWN)


OPTIMIZERS: dict[str, Callable[[Groups, Recipe], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": lambda groups, recipe: torch.optim.Adam(groups, lr=recipe.lr),
    "adamw": lambda groups, recipe: torch.optim.AdamW(groups, lr=recipe.lr),
}
SCHEDULES: dict[str, Callable[[float], float]] = {  # the share of the run that is done -> the share of lr
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
    "step": _stepped,
}
_LEAST: dict[str, float] = {
    "epochs": 0,
    "batch_size": 1,
    "lr": 0.0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "clip": 0.0,
    "accumulate": 1,
    "distill": 0.0,
    "temperature": 0.0,
}


def _known(kind: str, name: str, table: Collection[str]) -> None:
    if name not in table:
        raise UnknownNameError(kind, name, table)
