"""One density for the whole network, split over the layers in three ways: LeNet-5 on MNIST, magnitude along its ramp.

    python benchmarks/allocation.py --data FOLDER [--workers 4]

Networks, epochs and recipe are those of `methods_lenet5.py`, whose dense networks are trained first where they are not
in --out yet. The ways are those of `espalier compress --allocation`. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods_lenet5 as grid
import torch
from cells import options, run_cells
from torch import nn

import espalier as es
from espalier.planning import QUICK_IMAGES, on_split
from espalier.train import Data

RESULTS = Path(__file__).parent / "results" / "allocation.json"
WAYS = ("rule", "error", "sensitivity")
SCHEMES = ("filter+column", "block_punched", "weight")
DENSITIES = (0.05, 0.025)


@dataclass(frozen=True)
class Cell:
    way: str
    scheme: str
    density: float
    seed: int = 0


CELLS = [Cell(way, scheme, density) for scheme in SCHEMES for density in DENSITIES for way in WAYS]


def work(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    def planned(model: nn.Module, example: torch.Tensor, data: Data) -> es.Plan:
        graph, score = es.capture(model.eval(), example), on_split(data.holdout, QUICK_IMAGES)
        if cell.way == "rule":
            return es.uniform(graph, cell.density, cell.scheme)
        loss = (lambda: score(model)[1]) if cell.way == "sensitivity" else None
        return es.allocate(graph, loss, cell.density, cell.scheme).plan

    trained = grid.Cell("magnitude, ramp", cell.scheme, cell.density, cell.seed)
    return grid.shaped(trained, arguments, planned)


def main() -> None:
    arguments = options(__doc__).parse_args()
    epochs = {"dense": grid.DENSE_EPOCHS, "shape": grid.SHAPE_EPOCHS, "retrain": grid.RETRAIN_EPOCHS}
    settings = {"epochs": epochs, "recipe": repr(grid.RECIPE)}
    run_cells(CELLS, work, arguments, RESULTS, settings, dense_test=grid.train_dense(arguments))


if __name__ == "__main__":
    main()
