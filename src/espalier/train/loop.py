"""A training loop for people who have none. The only file that knows lightning-fabric."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import MissingExtraError, TrainingError
from espalier.train.split import Data, Split

try:  # an optional extra
    from lightning_fabric import Fabric
except ImportError:
    Fabric = None  # type: ignore[assignment,misc]


class TrainHooks(Protocol):
    """What the loop calls: a `methods.Run`, or anything like it."""

    def penalty(self) -> Tensor: ...

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """How to train.

    lr falls from its top along `ramp` after `warmup_epochs` of linear rise. clip: largest norm of the gradient, 0 for
    none. precision: as lightning-fabric says it, such as "32-true" or "bf16-mixed".
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    ramp: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 0.5
    label_smoothing: float = 0.0
    clip: float = 0.0
    precision: str = "32-true"
    seed: int = 0

    def lr_at(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """The learning rate of a step (from 0) of `steps`."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1.0, steps - warmup)
        return self.lr * (0.5 * (1 + math.cos(math.pi * share)) if self.ramp == "cosine" else 1.0)


@dataclass(frozen=True)
class Score:
    """Accuracy 0..1, mean loss, samples."""

    accuracy: float
    loss: float
    n: int


@dataclass
class History:
    """What an epoch came to, one dict each: epoch, loss, penalty, holdout accuracy, seconds."""

    epochs: list[dict[str, float]] = field(default_factory=list)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    hooks: TrainHooks | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    phase: str = "train",
    progress: bool = True,
    accelerator: str = "auto",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> History:
    """Train `model` in place by `recipe`.

    hooks: a `methods.Run`: its penalty joins the loss, its step follows the optimizer's.
    checkpoint: a file written after every epoch, whole or not at all; with `resume` training goes on from it and, on a
        CPU, ends bit for bit as if it had not been stopped.

    Raises TrainingError for a loss that is not finite, a checkpoint of something else, or a disk that is full.
    """
    if Fabric is None:
        raise MissingExtraError("lightning-fabric", "train")
    fabric = Fabric(accelerator=accelerator, devices=1, precision=recipe.precision)  # type: ignore[arg-type]
    optimizer = _optimizer(model, recipe)
    history, first = History(), 0
    if resume and checkpoint is not None and checkpoint.exists():
        first = _restore(checkpoint, model, optimizer, hooks, recipe, history)
    model.to(fabric.device)
    wrapped, optimizer = fabric.setup(model, optimizer)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn(),
        console=console, disable=not (progress and console.is_terminal), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task(phase, total=recipe.epochs * data.train.steps(recipe.batch_size), told="")
        bar.advance(task, first * data.train.steps(recipe.batch_size))
        for epoch in range(first, recipe.epochs):
            start = time.perf_counter()
            loss, penalty = _epoch(fabric, wrapped, optimizer, data, recipe, epoch, hooks, lambda: bar.advance(task))
            score = evaluate(model, data.holdout)
            row = {"epoch": epoch + 1, "loss": loss, "penalty": penalty, "holdout": 100 * score.accuracy}
            told = f"loss {loss:.4f}  holdout {100 * score.accuracy:.2f} %"
            bar.update(task, told=f"epoch {epoch + 1}/{recipe.epochs}  {told}")
            history.epochs.append({**row, "seconds": time.perf_counter() - start})
            if checkpoint is not None:
                _save(checkpoint, model, optimizer, hooks, recipe, epoch + 1, history)
            if on_epoch is not None:
                on_epoch(row)
            if progress and not console.is_terminal:
                console.print(f"{phase} {epoch + 1}/{recipe.epochs}  {told}  {time.perf_counter() - start:.1f} s")
    return history


def _epoch(
    fabric: Any,
    model: nn.Module,
    optimizer: Any,
    data: Data,
    recipe: Recipe,
    epoch: int,
    hooks: TrainHooks | None,
    advance: Callable[[], None],
) -> tuple[float, float]:
    """One pass over the training set; the mean loss and penalty."""
    per_epoch = data.train.steps(recipe.batch_size)
    seed_everything(recipe.seed * 7919 + epoch)  # dropout, so that a resumed epoch draws the same
    model.train()
    total, extra = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    batches = data.train.batches(recipe.batch_size, seed=recipe.seed, epoch=epoch, shuffle=True, augment=True)
    for k, (x, y) in enumerate(batches):
        step = epoch * per_epoch + k
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step, recipe.epochs * per_epoch, per_epoch)
        loss = F.cross_entropy(model(x.to(fabric.device)), y.to(fabric.device), label_smoothing=recipe.label_smoothing)
        penalty = hooks.penalty() if hooks is not None else torch.zeros((), device=loss.device)
        if not torch.isfinite(loss + penalty):
            raise TrainingError(
                f"the loss is {float(loss)} (penalty {float(penalty)}) in epoch {epoch + 1}, step {k + 1}: training "
                f"has diverged. Try a lower learning rate than {recipe.lr}, a longer warm-up, or clip=1"
            )
        optimizer.zero_grad()
        fabric.backward(loss + penalty)
        if recipe.clip:
            fabric.clip_gradients(model, optimizer, max_norm=recipe.clip)
        optimizer.step()
        if hooks is not None:
            hooks.step()
        total += loss.detach().double().cpu()
        extra += penalty.detach().double().cpu()
        advance()
    return float(total) / per_epoch, float(extra) / per_epoch


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 500) -> Score:
    """Accuracy and loss of `model` in eval mode; its train() and eval() flags are put back."""
    flags = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        for x, y in split.batches(batch_size):
            out = model(x.to(device)).float().cpu()
            right += int((out.argmax(1) == y).sum())
            loss += float(F.cross_entropy(out, y, reduction="sum"))
    for module, training in flags:
        module.training = training
    return Score(right / len(split), loss / len(split), len(split))


def recalibrate(model: nn.Module, split: Split, batches: int = 50, batch_size: int = 128) -> None:
    """Estimate the batch norms' statistics anew, as plain means over `batches` batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [m.momentum for m in norms]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.train()
    with torch.no_grad():
        for k, (x, _) in enumerate(split.batches(batch_size, shuffle=True)):
            if k == batches:
                break
            model(x.to(device))
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum
    for module, training in flags:
        module.training = training


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Weight decay on weights of two and more dimensions only: biases and norms are left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=recipe.lr)


def _save(
    path: Path, model: nn.Module, optimizer: Any, hooks: TrainHooks | None, recipe: Recipe, epoch: int, history: History
) -> None:
    part = path.with_name(path.name + ".part")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "hooks": hooks.state_dict() if hooks is not None else {},
        "recipe": asdict(recipe),
        "epoch": epoch,
        "history": history.epochs,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        raise TrainingError(
            f"cannot write the checkpoint {path}: {error}. The one before it is whole: make room and resume"
        ) from error


def _restore(
    path: Path, model: nn.Module, optimizer: Any, hooks: TrainHooks | None, recipe: Recipe, history: History
) -> int:
    """Load a checkpoint; returns how many epochs are done."""
    try:
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise TrainingError(f"{path} belongs to another recipe ({state['recipe']}): resume with that one")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except TrainingError:
        raise
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise TrainingError(f"{path} is no checkpoint of this network and recipe: {error}. Remove it") from error
    if hooks is not None:
        hooks.load_state_dict(state["hooks"])
    history.epochs = state["history"]
    return int(state["epoch"])
