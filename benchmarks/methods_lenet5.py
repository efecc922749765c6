"""Every method with every kind of scheme at three densities on LeNet-5 / MNIST, from one dense network, two seeds.

    python benchmarks/methods_lenet5.py --data FOLDER --workers 4      # goes on where it was stopped

Each cell: the dense network is shaped by the method and then retrained in its plan, for equally many epochs, with one
recipe for all. The held-out tenth of the training set was used to choose that recipe; the test set is only reported.
All layers count; densities are those of the whole network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cells import options, run_cells
from torch import nn

import espalier as es
from espalier.methods import get
from espalier.sparsity import unfit
from espalier.train import Data, Recipe, build, evaluate, fit, load_data, seed_everything

RESULTS = Path(__file__).parent / "results" / "methods_lenet5.json"
RECIPE = Recipe(batch_size=128, lr=0.02, weight_decay=1e-4, precision="bf16-mixed")
DENSE_EPOCHS, SHAPE_EPOCHS, RETRAIN_EPOCHS = 8, 3, 1
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude, one-shot": ("magnitude", {"ramp": "jump"}),
    "magnitude, ramp": ("magnitude", {"ramp": "cubic"}),
} | {name: (name, {}) for name in es.METHODS if name != "magnitude"}
SCHEMES = ("filter", "column", "filter+column", "block_punched", "pattern+kernel", "weight", "micro_block+unify")
DENSITIES = (0.1, 0.05, 0.025)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Cell:
    method: str
    scheme: str
    density: float
    seed: int


CELLS = [Cell(m, s, d, seed) for seed in SEEDS for d in DENSITIES for s in SCHEMES for m in METHODS]


def plan_for(model: nn.Module, example: torch.Tensor, scheme: str, density: float) -> es.Plan:
    """By rule; where a layer cannot take patterns (LeNet's windows are 5 x 5), it takes whole kernels alone."""
    graph = es.capture(model, example)
    if "pattern" in scheme and all(unfit(es.scheme("pattern"), site) for site in graph.sites().values()):
        scheme = "kernel"
    return es.uniform(graph, density, scheme)


def work(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    return shaped(cell, arguments, lambda model, example, _: plan_for(model, example, cell.scheme, cell.density))


def shaped(
    cell: Cell, arguments: argparse.Namespace, planned: Callable[[nn.Module, torch.Tensor, Data], es.Plan]
) -> dict[str, Any]:
    """The dense network trained into a plan by the cell's method, and what it came to."""
    seed_everything(cell.seed)
    data, example = load_data("mnist", arguments.data), torch.zeros(1, 1, 28, 28)
    model = build("lenet5").to(memory_format=torch.channels_last)  # half the time on CPUs
    model.load_state_dict(torch.load(Path(arguments.out) / f"dense{cell.seed}.pt", weights_only=True))
    name, settings = METHODS[cell.method]
    steps = SHAPE_EPOCHS * data.train.steps(RECIPE.batch_size)
    run = es.start(model, planned(model, example, data), get(name, **settings), example, steps=steps)
    fit(model, data, _recipe(SHAPE_EPOCHS, cell.seed), hooks=run, progress=False)
    run.finish()
    before = 100 * evaluate(model, data.holdout).accuracy
    fit(model, data, _recipe(RETRAIN_EPOCHS, cell.seed), hooks=run, progress=False)
    size = es.size(es.capture(model, example))
    return {
        "test": 100 * evaluate(model, data.test).accuracy,
        "holdout": 100 * evaluate(model, data.holdout).accuracy,
        "shaped": before,
        "density": size.density,
        "fewer_weights": size.weights / max(1, size.nonzero),
    }


def _recipe(epochs: int, seed: int) -> Recipe:
    return replace(RECIPE, epochs=epochs, seed=seed)


def train_dense(arguments: argparse.Namespace) -> dict[str, float]:
    """One dense network per seed, trained once."""
    accuracies, out = {}, Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    data = load_data("mnist", arguments.data)
    for seed in SEEDS:
        seed_everything(seed)
        model, file = build("lenet5"), out / f"dense{seed}.pt"
        if not file.exists():
            recipe = Recipe(DENSE_EPOCHS, 128, 0.05, weight_decay=1e-4, seed=seed)
            fit(model, data, recipe, checkpoint=file.with_suffix(".checkpoint"), resume=True, phase=f"dense {seed}")
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, weights_only=True))
        accuracies[str(seed)] = 100 * evaluate(model, data.test).accuracy
    return accuracies


def main() -> None:
    arguments = options(__doc__).parse_args()
    epochs = {"dense": DENSE_EPOCHS, "shape": SHAPE_EPOCHS, "retrain": RETRAIN_EPOCHS}
    settings = {"epochs": epochs, "recipe": repr(RECIPE)}
    run_cells(CELLS, work, arguments, RESULTS, settings, dense_test=train_dense(arguments))


if __name__ == "__main__":
    main()
