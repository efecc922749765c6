"""LeNet-5 on MNIST: how few weights reach 99.0 %, when single weights go after filters, columns and unused paths.

    python benchmarks/lenet5_far.py --data FOLDER       # goes on where it was stopped; 25 minutes on one core

Begins with `lenet5.py` (ADMM on filters and columns, purification, unused path removal), whose small network is then
pruned weight by weight along a ramp, to one threshold for all layers, and retrained; and once more, for less. All
layers count. The held-out tenth of the training set says when to stop; the test set is only reported.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lenet5 import BATCH, PHASES, PLAN, Benchmark
from torch import nn

import espalier as es
from espalier.methods import get
from espalier.train import Data, Recipe, evaluate, fit, load_data
from espalier.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "lenet5_far.json"
SHAPE = Recipe(epochs=20, batch_size=BATCH, lr=0.03, weight_decay=5e-5, schedule="constant", warmup_epochs=0)
RETRAIN = Recipe(epochs=40, batch_size=BATCH, lr=0.03, weight_decay=5e-5)


def one_threshold(model: nn.Module, example: torch.Tensor, kept: int) -> es.Plan:
    """Single weights: in every layer as many as are among the `kept` largest of the whole network."""
    graph = es.capture(model, example)
    weights = {site: graph.tensors[site].detach() for site in graph.sites()}
    every = torch.cat([w.abs().flatten() for w in weights.values()])
    threshold = every.sort(descending=True).values[min(kept, len(every)) - 1]
    shares = {site: int((w.abs() >= threshold).sum()) / w.numel() for site, w in weights.items()}
    return es.Plan.of({site: es.scheme("weight", share) for site, share in shares.items()})


def step(model: nn.Module, example: torch.Tensor, data: Data, kept: int, work: Workspace, seed: int) -> float:
    """Prune `model` in place to `kept` weights and retrain it; returns the seconds it took."""

    def shaped() -> dict[str, Any]:
        start, checkpoint = time.perf_counter(), work.checkpoint(f"shape{kept}")
        run = es.start(model, one_threshold(model, example, kept), get("magnitude", ramp="cubic", until=0.9), example,
                       steps=SHAPE.epochs * data.train.steps(BATCH))  # fmt: skip
        recipe = replace(SHAPE, seed=seed)
        fit(model, data, recipe, hooks=run, checkpoint=checkpoint, resume=True, phase=f"shape {kept}")
        run.finish()
        checkpoint = work.checkpoint(f"retrain{kept}")
        recipe = replace(RETRAIN, seed=seed)
        fit(model, data, recipe, hooks=run, checkpoint=checkpoint, resume=True, phase=f"retrain {kept}")
        checkpoint.unlink(missing_ok=True)
        return {"model": model.state_dict(), "seconds": time.perf_counter() - start}

    state = work.phase(f"far{kept}", shaped)
    model.load_state_dict(state["model"])
    return float(state["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of MNIST's idx files")
    parser.add_argument("--out", default="out/lenet5", help="where what is finished is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", default="1855,1435,1200", help="weights to go down to, one after another")
    arguments = parser.parse_args()
    settings = {"seed": arguments.seed, "plan": PLAN.to_toml(), "max_drop": 0.6, "phases": str(PHASES)}
    work, data = Workspace(arguments.out, settings, resume=True), load_data("mnist", arguments.data)
    first = Benchmark(data, work, arguments.seed)
    rows = first.go(0.6)
    model = es.shrink(first.model.eval(), first.example)
    shifted = replace(data, train=replace(data.train, crop=1))  # by a pixel at most: small networks see more images so
    for kept in map(int, arguments.kept.split(",")):
        seconds = step(model, first.example, shifted, kept, work, arguments.seed)
        size = es.size(es.capture(es.shrink(model.eval(), first.example), first.example))
        row = {
            "title": f"single weights, {kept} kept",
            "test_accuracy": 100 * evaluate(model, data.test).accuracy,
            "holdout_accuracy": 100 * evaluate(model, data.holdout).accuracy,
            "nonzero": size.nonzero,
            "fewer_weights": first.total / size.nonzero,
            "seconds": seconds,
        }
        rows.append(row)
        print(f"{row['title']:45s} test {row['test_accuracy']:.2f} %  {row['fewer_weights']:.1f}x", flush=True)
        claim = "LeNet-5 / MNIST, all layers counted, 99.0 % or more"
        report = {"claim": claim, "rows": rows, "seed": arguments.seed, "machine": es.machine()}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
