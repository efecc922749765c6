"""A training by several processes: python -m tests.train.together RESULT STRATEGY DEVICES PRECISION [CHECKPOINT]."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.methods import METHODS, start
from espalier.sparsity import Plan, scheme
from espalier.train import Data, Processes, Recipe, fit, launch, load_data, seed_everything

RECIPE = Recipe(epochs=3, batch_size=30, lr=0.05, accumulate=2, clip=1.0, seed=1, warmup_epochs=0.0)
EXAMPLE = torch.zeros(1, 2, 8, 8)


def network(norm: bool) -> nn.Sequential:
    seed_everything(0)
    middle = nn.BatchNorm2d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(2, 16, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(576, 5))


def data() -> Data:
    return load_data("synthetic:2x8x8:5")


def together(
    strategy: Any,
    devices: int,
    precision: str = "32-true",
    checkpoint: Path | None = None,
    stop_after: int = 0,
    seed: int = 1,
) -> dict[str, Any]:
    """Shape and retrain; returns weights, masks, history. It stops after `stop_after` epochs, where that is given."""
    given = data()
    model, recipe = network(norm=checkpoint is not None), replace(RECIPE, precision=precision, seed=seed)
    plan = Plan.of({"0": scheme("filter", 0.5), "4": scheme("block_punched", 0.4, m=1, n=4)})
    run = start(model, plan, "admm", EXAMPLE, steps=recipe.epochs * given.train.steps(recipe.batch_size))
    options: dict[str, Any] = {"devices": devices, "strategy": strategy, "accelerator": "cpu", "progress": False}

    def after(row: Any) -> None:
        if row.epoch == stop_after:
            raise InterruptedError

    shaping: dict[str, Any] = {"checkpoint": checkpoint, "resume": True, "on_epoch": after}
    history = fit(model, given, recipe, hooks=run, **shaping, **options)
    run.finish()
    fit(model, given, replace(recipe, epochs=1), hooks=run, phase="retrain", **options)
    return {
        "model": model.state_dict(),
        "masks": run.masks,
        "history": [[row.loss, row.penalty, row.accuracy, row.holdout_accuracy] for row in history.epochs],
    }


def every_method(strategy: Any, devices: int) -> dict[str, Any]:
    """What each method holds when a short shaping ends, before and after `finish`."""
    found, given = {}, data()
    recipe = replace(RECIPE, epochs=1, batch_size=64)
    for name in METHODS:
        model = network(norm=False)  # norms see a process's part of a batch: masks could differ from one process's
        plan = Plan.of({"0": scheme("filter", 0.5), "4": scheme("block_punched", 0.4, m=1, n=4)})
        run = start(model, plan, name, EXAMPLE, steps=given.train.steps(recipe.batch_size))
        options: dict[str, Any] = {"devices": devices, "strategy": strategy, "accelerator": "cpu", "progress": False}
        fit(model, given, recipe, hooks=run, **options)
        state = run.state_dict()["method"]
        run.finish()
        found[name] = {"state": state, "masks": run.masks, "model": model.state_dict()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, strategy, devices, precision = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    checkpoint = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    team = launch(Processes(devices, 1, strategy, "cpu"))  # type: ignore[arg-type]
    results = {}
    if checkpoint is None:
        results["whole"] = together(strategy, devices, precision)
        results["methods"] = every_method(strategy, devices)
    else:
        results["whole"] = together(strategy, devices, precision, checkpoint.with_suffix(".other"))
        try:
            together(strategy, devices, precision, checkpoint, stop_after=2)
        except InterruptedError:
            if team.leads:
                shutil.copy(checkpoint, checkpoint.with_suffix(".half"))
            results["resumed"] = together(strategy, devices, precision, checkpoint)
    torch.save(results, target.with_suffix(f".{team.rank}"))
