"""Methods and schemes on ResNet-20 / CIFAR-10 from published weights, beside one-shot magnitude and Torch-Pruning.

    python benchmarks/methods_resnet20.py --data FOLDER --weights cifar10_resnet20_distiller.safetensors --workers 4

Every cell ends with the same useful multiply-accumulates (those whose weight is not zero, after unused paths are
removed): 1 / factor of the dense network's. All train for equally many epochs on the same images in the same order
with one recipe, taught by the dense network; what it is was chosen on the held-out tenth of the training set. Stopped,
it goes on where it was.

Ours split the target over the layers by `es.allocate`, from held-out losses. Rivals: "one-shot" cuts by magnitude, all
layers to one density, and spends every epoch on retraining. "group_norm" and "group_sl" are Torch-Pruning's group norm
with global ranking: the first cuts at once and spends every epoch on retraining, the second half of them on its sparse
learning. "one-shot, allocated" stands between: that rival in our plan.
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
from espalier.methods import Allocation, get
from espalier.train import (
    Data,
    Recipe,
    Split,
    build,
    evaluate,
    fit,
    load_data,
    load_weights,
    recalibrate,
    seed_everything,
)

RESULTS = Path(__file__).parent / "results" / "methods_resnet20.json"
NORM = ((0.5,) * 3, (0.5,) * 3)  # of the published weights
METHODS: dict[str, tuple[str, dict[str, Any]]] = {"ramp": ("magnitude", {"ramp": "cubic"})} | {
    name: (name, {}) for name in es.METHODS if name != "magnitude"
}
TORCH_PRUNING = ("group_norm", "group_sl")
RIVALS = ("one-shot", *TORCH_PRUNING)
STEPS = 400  # of Torch-Pruning on its way, as in its own benchmark
SENSED = 500  # held-out images that the allocation reads its losses on


@dataclass(frozen=True)
class Cell:
    method: str
    scheme: str
    factor: int
    seed: int = 0


FACTORS = (4, 8, 16, 2)
CELLS = [  # what decides first
    *(Cell("ramp", scheme, factor) for factor in FACTORS for scheme in ("block_punched", "weight")),
    *(Cell("group_norm", "filter", factor) for factor in FACTORS),
    *(Cell("one-shot", scheme, factor) for factor in FACTORS for scheme in ("block_punched", "weight")),
    *(Cell(method, "block_punched", 4) for method in METHODS if method != "ramp"),
    *(Cell("group_sl", "filter", factor) for factor in FACTORS),
    *(Cell("ramp", scheme, 4) for scheme in ("pattern+kernel", "filter+column", "column", "filter")),
    *(Cell("one-shot, allocated", scheme, factor) for factor in FACTORS for scheme in ("block_punched", "weight")),
    *(Cell(method, "block_punched", factor) for factor in (8, 16, 2) for method in ("reweighted", "primal_proximal")),
    *(Cell("one-shot", "filter", factor) for factor in FACTORS),
]


def useful_macs(model: nn.Module, example: Tensor) -> int:
    return es.size(es.capture(es.shrink(copy.deepcopy(model).eval(), example), example)).useful_macs


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convs and linear layers: what `useful_macs` counts, in milliseconds."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(example)
    return counter.get_total_flops() // 2


def plan_for(
    model: nn.Module, example: Tensor, wanted: float, make: Callable[[es.Graph, float], es.Plan], steps: int = 9
) -> es.Plan:
    """The plan that `make` gives for a share, whose projection of the dense network leaves `wanted` useful
    multiply-accumulates: the largest share that does, found by bisection."""
    graph, low, high, best = es.capture(model, example), 0.0, 1.0, None
    for _ in range(steps):
        share = (low + high) / 2
        try:
            plan = make(graph, share)
        except EspalierError:
            low = share  # what is spared alone holds more
            continue
        trial = copy.deepcopy(model)
        es.start(trial, plan, "magnitude", example).finish()
        if useful_macs(trial, example) <= wanted:
            low, best = share, plan
        else:
            high = share
    if best is None:
        raise ValueError(f"{wanted:.3g} multiply-accumulates cannot be left so")
    return best


def few_of(data: Data) -> Split:
    """Held-out images to read losses on."""
    return data.holdout.only(torch.arange(min(SENSED, len(data.holdout))))


def even(scheme: str) -> Callable[[es.Graph, float], es.Plan]:
    """For `plan_for`: all layers to one density."""
    return lambda graph, share: es.uniform(graph, share, scheme)


def allocated(scheme: str, loss: Callable[[], float] | None) -> Callable[[es.Graph, float], es.Plan]:
    """For `plan_for`: split over the layers by their sensitivities, which are measured once."""
    known: list[Allocation] = []

    def make(graph: es.Graph, share: float) -> es.Plan:
        sensitivity = known[0].sensitivity if known else None
        made = es.allocate(graph, loss, share, scheme, kind="macs", sensitivity=sensitivity)
        known.append(made)
        return made.plan

    return make


@dataclass
class Trainer:
    """The epochs that every cell has, and the recipe that all share."""

    data: Data
    recipe: Recipe
    seed: int
    teacher: nn.Module

    def train(self, model: nn.Module, epochs: int, hooks: Any = None) -> None:
        recipe = replace(self.recipe, epochs=epochs, seed=self.seed)
        fit(model, self.data, recipe, hooks=hooks, teacher=self.teacher, progress=False)

    def score(self, model: nn.Module) -> dict[str, float]:
        return {
            "test": 100 * evaluate(model, self.data.test).accuracy,
            "holdout": 100 * evaluate(model, self.data.holdout).accuracy,
        }


def ours(cell: Cell, model: nn.Module, example: Tensor, wanted: float, trainer: Trainer, epochs: int) -> nn.Module:
    if cell.method == "one-shot":
        make = even(cell.scheme)
    else:
        few = few_of(trainer.data)
        make = allocated(cell.scheme, lambda: evaluate(model, few).loss)
    plan = plan_for(model, example, wanted, make)
    if cell.method not in METHODS:
        run = es.start(model, plan, "magnitude", example)
        run.finish()
        recalibrate(model, trainer.data.train)
        trainer.train(model, epochs, run)
        return model
    name, settings = METHODS[cell.method]
    shaping = epochs // 2
    steps = shaping * trainer.data.train.steps(trainer.recipe.batch_size)
    run = es.start(model, plan, get(name, **settings), example, steps=steps)
    trainer.train(model, shaping, run)
    run.finish()
    recalibrate(model, trainer.data.train)
    trainer.train(model, epochs - shaping, run)
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
        trainer.train(model, learning)
        handles()
    for _ in range(STEPS):
        if macs(model, example) <= wanted:
            break
        pruner.step()
    else:
        raise ValueError(f"torch-pruning cannot leave {wanted:.3g} multiply-accumulates")
    recalibrate(model, trainer.data.train)
    trainer.train(model, epochs - learning)
    return model


def _regularised(model: nn.Module, pruner: Any) -> Callable[[], None]:
    """Before every step of an optimizer the pruner adds to the gradients; returns what ends it."""
    pruner.update_regularizer()
    handle = register_optimizer_step_pre_hook(lambda *_: pruner.regularize(model))
    return handle.remove


def work(cell: Cell, a: argparse.Namespace) -> dict[str, Any]:
    seed_everything(cell.seed)
    data = load_data("cifar10", a.data).normalised_by(*NORM)
    model, example = build("resnet20", shortcut="B"), torch.zeros(1, 3, 32, 32)
    load_weights(model, a.weights)
    dense = useful_macs(model, example)
    recipe = Recipe(batch_size=128, lr=a.lr, weight_decay=a.weight_decay, distill=a.distill, precision=a.precision)
    trainer = Trainer(data, recipe, cell.seed, copy.deepcopy(model).eval())
    way = theirs if cell.method in TORCH_PRUNING else ours
    model = way(cell, model, example, dense / cell.factor, trainer, a.epochs)
    size = es.size(es.capture(es.shrink(model.eval(), example), example))
    return {**trainer.score(model), "macs": size.useful_macs, "dense_macs": dense, "weights": size.nonzero}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--weights", default="cifar10_resnet20_distiller.safetensors")
    parser.add_argument("--epochs", type=int, default=4, help="of each cell")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--distill", type=float, default=0.5, help="share of the loss that the dense network teaches")
    parser.add_argument("--precision", default="bf16-mixed")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("epochs", "lr", "weight_decay", "distill", "precision")}
    run_cells(CELLS, work, arguments, RESULTS, {**settings, "torch_pruning": torch_pruning.__version__})


if __name__ == "__main__":
    main()
