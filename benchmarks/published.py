"""Published figures of others, and what Espalier comes to at the same compression: CIFAR-10 and CIFAR-100.

    python benchmarks/published.py --data FOLDER --weights FOLDER [--only 'resnet56*'] [--epochs 60]

--weights: the folder of the published weights (safetensors); a network without any is trained first, which wants a GPU.
What is asked for is split over the layers by projection error. Each row is shaped, then retrained in its plan, taught
by the dense network. Checkpoints lie in --out: stopped at any moment, it goes on from there. Rows that nobody has run
yet are open on the page. The recipe is that of `benchmarks/mapping.py`; nothing is chosen on the test set.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cells import options, run_cells
from methods_resnet20 import allocated, plan_for, useful_macs
from pretrained import IMAGENET
from training import Training

import espalier as es
from espalier.train import Recipe, build, evaluate, load_data, load_weights, seed_everything
from espalier.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "published.json"
RECIPE = Recipe(lr=0.02, weight_decay=1e-4, distill=0.5, precision="bf16-mixed")
DENSE = replace(RECIPE, lr=0.1, weight_decay=5e-4, distill=0.0)
DENSE_EPOCHS = 160
SPLIT = "by error"  # of what is asked for, over the layers


@dataclass(frozen=True)
class Row:
    """A published figure: `top1` per cent (None where only ours are compared) at `factor` times fewer `of`."""

    network: str
    data: str
    factor: float
    of: str
    scheme: str
    top1: float | None
    source: str
    method: str = "magnitude"
    weights: str = ""


R56 = "cifar10_resnet56.safetensors"
TORCH_PRUNING, PSP, PRM, MICRO = "Torch-Pruning", "arXiv 1906.05180", "arXiv 1905.00136", "arXiv 2106.08301"
ROWS = {
    "resnet56/2.11x MACs": Row("resnet56", "cifar10", 2.11, "macs", "block_punched", 93.77, TORCH_PRUNING, weights=R56),
    "resnet56/2.57x MACs": Row("resnet56", "cifar10", 2.57, "macs", "block_punched", 93.64, TORCH_PRUNING, weights=R56),
    "resnet56/76 % of columns": Row("resnet56", "cifar10", 1 / 0.237, "weights", "column", 93.45, PSP, weights=R56),
    "resnet56/80 % of columns": Row("resnet56", "cifar10", 5.0, "weights", "column", 93.0, PSP, weights=R56),
    "resnet18/60x": Row("resnet18_cifar", "cifar10", 60.0, "weights", "filter+column", 93.2, PRM, "admm"),
    "vgg16/pruned": Row("vgg16_cifar", "cifar10", 10.0, "weights", "micro_block", None, MICRO),
    "vgg16/pruned and unified": Row("vgg16_cifar", "cifar10", 10.0, "weights", "micro_block+unify", None, MICRO),
    "densenet40/pruned": Row("densenet40", "cifar100", 4.0, "weights", "micro_block", None, MICRO),
    "densenet40/pruned and unified": Row("densenet40", "cifar100", 4.0, "weights", "micro_block+unify", None, MICRO),
}


@dataclass(frozen=True)
class Cell:
    name: str


def work(cell: Cell, a: argparse.Namespace) -> dict[str, Any]:
    row = ROWS[cell.name]
    data = load_data(row.data, a.data).normalised_by(*IMAGENET)
    example = torch.zeros(1, *data.shape)
    folder = "".join(letter if letter.isalnum() else "_" for letter in cell.name)
    settings = {"row": asdict(row), "recipe": asdict(RECIPE), "epochs": a.epochs, "split": SPLIT}
    seed_everything(0)
    training = Training(
        build(row.network, classes=data.classes), data, Workspace(Path(a.out) / folder, settings, resume=True)
    )
    if row.weights:
        load_weights(training.model, Path(a.weights) / row.weights)
    else:
        training.phase("dense", lambda: training.fit("dense", replace(DENSE, epochs=DENSE_EPOCHS)))
    model, training.teacher = training.model, copy.deepcopy(training.model).eval()
    graph = es.capture(model, example)
    dense_macs = useful_macs(model, example)
    if row.of == "macs":
        plan = plan_for(model, example, dense_macs / row.factor, allocated(row.scheme, None))
    else:
        plan = es.allocate(graph, None, 1 / row.factor, row.scheme).plan
    shaping = max(1, a.epochs // 2)
    steps = shaping * data.train.steps(RECIPE.batch_size)
    run = es.start(model, plan, row.method, example, steps=steps)
    training.into_plan(run, RECIPE, shaping, a.epochs - shaping)
    size = es.size(es.capture(model, example))
    return {
        "split": SPLIT,
        "dense_test": 100 * evaluate(training.teacher, data.test).accuracy,
        "test": 100 * evaluate(model, data.test).accuracy,
        "fewer_macs": dense_macs / useful_macs(model, example),
        "fewer_weights": size.weights / max(1, size.nonzero),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--weights", default="weights", help="folder of the published weights")
    parser.add_argument("--epochs", type=int, default=15, help="of each row, half of them for shaping")
    arguments = parser.parse_args()
    settings = {"epochs": arguments.epochs, "recipe": repr(RECIPE), "dense_epochs": DENSE_EPOCHS}
    claims = {name: asdict(row) for name, row in ROWS.items()}
    run_cells([Cell(name) for name in ROWS], work, arguments, RESULTS, settings, claims=claims)


if __name__ == "__main__":
    main()
