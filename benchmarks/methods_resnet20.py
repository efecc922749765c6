"""Methods and schemes on ResNet-20 / CIFAR-10 from published weights, beside one-shot magnitude and Torch-Pruning.

    python benchmarks/methods_resnet20.py --data FOLDER --weights cifar10_resnet20_distiller.safetensors --workers 4

Every cell ends with the same useful multiply-accumulates (those whose weight is not zero, after unused paths are
removed): 1 / factor of the dense network's. All train for equally many epochs on the same images in the same order
with one recipe; what it is was chosen on the held-out tenth of the training set. Stopped, it goes on where it was.

Rivals: "one-shot" cuts by magnitude and spends every epoch on retraining. "torch-pruning" is that package's group
norm with global ranking: "group_norm" cuts first and spends every epoch on retraining, "group_sl" spends half of them
on its sparse learning.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from cells import options, run_cells
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import espalier as es
from espalier.errors import EspalierError
from espalier.methods import get
from espalier.train import Data, Recipe, build, evaluate, fit, load_data, load_weights, recalibrate, seed_everything

RESULTS = Path(__file__).parent / "results" / "methods_resnet20.json"
NORM = ((0.5,) * 3, (0.5,) * 3)  # of the published weights
METHODS: dict[str, tuple[str, dict[str, Any]]] = {"ramp": ("magnitude", {"ramp": "cubic"})} | {
    name: (name, {}) for name in es.METHODS if name != "magnitude"
}
RIVALS = ("one-shot", "group_norm", "group_sl")
STEPS = 400  # of Torch-Pruning on its way, as in its own benchmark
SCHEMES = ("filter", "filter+column", "column", "block_punched", "pattern+kernel", "weight")


@dataclass(frozen=True)
class Cell:
    method: str
    scheme: str
    factor: int
    seed: int = 0


CELLS = [
    *(Cell(method, "filter", factor) for factor in (4, 2, 8, 16) for method in RIVALS),
    *(Cell("one-shot", "block_punched", factor) for factor in (4, 2, 8, 16)),
    *(Cell(method, "block_punched", 4) for method in METHODS),
    *(Cell("admm", scheme, 4) for scheme in SCHEMES if scheme != "block_punched"),
    *(Cell(method, "block_punched", factor) for factor in (2, 8, 16) for method in ("ramp", "admm", "reweighted")),
]


def useful_macs(model: nn.Module, example: Tensor) -> int:
    return es.size(es.capture(es.shrink(copy.deepcopy(model).eval(), example), example)).useful_macs


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convs and linear layers: what `useful_macs` counts, in milliseconds."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(example)
    return counter.get_total_flops() // 2


def plan_for(model: nn.Module, example: Tensor, scheme: str, wanted: float) -> es.Plan:
    """The plan by rule whose projection of the dense network leaves `wanted` useful multiply-accumulates."""
    graph, low, high, best = es.capture(model, example), 0.0, 1.0, None
    for _ in range(9):
        density = (low + high) / 2
        try:
            plan = es.uniform(graph, density, scheme)
        except EspalierError:
            low = density  # the spared layers alone hold more
            continue
        trial = copy.deepcopy(model)
        es.start(trial, plan, "magnitude", example).finish()
        if useful_macs(trial, example) <= wanted:
            low, best = density, plan
        else:
            high = density
    if best is None:
        raise ValueError(f"{scheme} cannot leave {wanted:.3g} multiply-accumulates")
    return best


@dataclass
class Trainer:
    """The epochs that every cell has, and the recipe that all share."""

    data: Data
    recipe: Recipe
    seed: int

    def train(self, model: nn.Module, epochs: int, lr: float, hooks: Any = None) -> None:
        fit(model, self.data, replace(self.recipe, epochs=epochs, lr=lr, seed=self.seed), hooks=hooks, progress=False)

    def score(self, model: nn.Module) -> dict[str, float]:
        return {
            "test": 100 * evaluate(model, self.data.test).accuracy,
            "holdout": 100 * evaluate(model, self.data.holdout).accuracy,
        }


def ours(cell: Cell, model: nn.Module, example: Tensor, wanted: float, trainer: Trainer, epochs: int) -> nn.Module:
    plan = plan_for(model, example, cell.scheme, wanted)
    if cell.method == "one-shot":
        run = es.start(model, plan, "magnitude", example)
        run.finish()
        recalibrate(model, trainer.data.train)
        trainer.train(model, epochs, trainer.recipe.lr, run)
        return model
    name, settings = METHODS[cell.method]
    shaping = epochs // 2
    steps = shaping * trainer.data.train.steps(trainer.recipe.batch_size)
    run = es.start(model, plan, get(name, **settings), example, steps=steps)
    trainer.train(model, shaping, trainer.recipe.lr, run)
    run.finish()
    recalibrate(model, trainer.data.train)
    trainer.train(model, epochs - shaping, trainer.recipe.lr, run)
    return model


def theirs(cell: Cell, model: nn.Module, example: Tensor, wanted: float, trainer: Trainer, epochs: int) -> nn.Module:
    """Torch-Pruning at the settings of its own CIFAR benchmark: global ranking, at most 90 % of a layer, group norm."""
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    settings: dict[str, Any] = dict(
        importance=importance,
        global_pruning=True,
        iterative_steps=STEPS,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
    )
    learning = epochs // 2 if cell.method == "group_sl" else 0
    pruner = torch_pruning.pruner.GroupNormPruner(model, example, reg=5e-4, **settings)
    if learning:
        handles = _regularised(model, pruner)
        trainer.train(model, learning, trainer.recipe.lr)
        handles()
    for _ in range(STEPS):
        if macs(model, example) <= wanted:
            break
        pruner.step()
    else:
        raise ValueError(f"torch-pruning cannot leave {wanted:.3g} multiply-accumulates")
    recalibrate(model, trainer.data.train)
    trainer.train(model, epochs - learning, trainer.recipe.lr)
    return model


def _regularised(model: nn.Module, pruner: Any) -> Callable[[], None]:
    """Before every step of an optimizer the pruner adds to the gradients; returns what ends it."""
    pruner.update_regularizer()
    handle = register_optimizer_step_pre_hook(lambda *_: pruner.regularize(model))
    return handle.remove


def work(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    seed_everything(cell.seed)
    data = load_data("cifar10", arguments.data).normalised_by(*NORM)
    model, example = build("resnet20", shortcut="B"), torch.zeros(1, 3, 32, 32)
    load_weights(model, arguments.weights)
    dense = useful_macs(model, example)
    trainer = Trainer(data, Recipe(batch_size=128, lr=arguments.lr, precision=arguments.precision), cell.seed)
    way = theirs if cell.method in ("group_norm", "group_sl") else ours
    model = way(cell, model, example, dense / cell.factor, trainer, arguments.epochs)
    size = es.size(es.capture(es.shrink(model.eval(), example), example))
    return {**trainer.score(model), "macs": size.useful_macs, "dense_macs": dense, "weights": size.nonzero}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--weights", default="cifar10_resnet20_distiller.safetensors")
    parser.add_argument("--epochs", type=int, default=4, help="of each cell")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--precision", default="bf16-mixed")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("epochs", "lr", "precision")}
    run_cells(CELLS, work, arguments, RESULTS, {**settings, "torch_pruning": torch_pruning.__version__})


if __name__ == "__main__":
    main()
