"""The whole way: baseline, plan, training into the plan, purification, retraining, shrinking, compiling, measuring."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import PlanError
from espalier.graph import capture, shrink
from espalier.mapping import uniform
from espalier.methods import Method, Run, get, purify, start
from espalier.report import achieved, latencies, print_summary, size, sizes
from espalier.runtime import machine
from espalier.sparsity import Plan
from espalier.store import save
from espalier.train import Data, Recipe, build, evaluate, fit, load_data, load_weights, seed_everything
from espalier.workspace import Workspace

SHAPING = 0.5  # of the epochs; the rest retrains, half before purification and half after
FINE_TUNING = 0.4  # of the recipe's learning rate, once the dense network is trained


@dataclass(frozen=True)
class Result:
    """What `compress` hands back: the small module, its report, and where the files lie."""

    module: nn.Module
    report: dict[str, Any]
    out: Path

    @property
    def file(self) -> Path:
        return self.out / "model.esp"


def compress(
    model: str | nn.Module,
    data: str | Data,
    *,
    out: str | Path,
    density: float | None = None,
    plan: Plan | str | Path | None = None,
    scheme: str = "filter+column",
    method: str | Method = "admm",
    scheme_options: dict[str, Any] | None = None,
    method_options: dict[str, Any] | None = None,
    max_drop: float = 1.0,
    epochs: int = 30,
    dense_epochs: int | None = None,
    weights: str | Path | None = None,
    recipe: Recipe | None = None,
    data_root: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    resume: bool = False,
) -> Result:
    """Train `model` into a smaller, faster network and measure it.

    model: a module, a name of the zoo, or ``package.module:factory``.
    data: a `Data`, or a name such as ``digits``, ``mnist``, ``cifar10``, ``folder:PATH``; `data_root` is its folder.
    out: the folder for model.esp, plan.toml, report.json and what a resumed run needs.
    density or plan: the kept share of weights (the `scheme` is then mapped by rule), or a plan or plan file.
    method: how the weights are brought into the plan: a name of METHODS or a method.
    scheme_options, method_options: keyword options of both, where they are given by name.
    max_drop: points of accuracy that may be lost; purification spends at most half of what shaping left of them.
    epochs: of shaping and retraining together. dense_epochs: of the dense network before; by default as many when it
        comes from the zoo without `weights`, else none.
    weights: a safetensors file with the dense network's weights.
    threads: of the measured latencies; by default as many as PyTorch uses.
    resume: go on with a run that was stopped. A run that is over just reports.

    Raises an EspalierError that says what to do; whatever was finished stays in `out`.

    >>> es.compress("lenet_digits", "digits", out="out/demo", density=0.1, epochs=10).report["compressed"]["accuracy"]
    """
    recipe = recipe or Recipe()
    settings = {
        "model": model if isinstance(model, str) else type(model).__qualname__,
        "data": data if isinstance(data, str) else data.name,
        "density": density,
        "plan": plan.to_toml() if isinstance(plan, Plan) else plan and Plan.load(plan).to_toml(),
        "scheme": scheme,
        "method": method if isinstance(method, str) else repr(method),
        "scheme_options": scheme_options,
        "method_options": method_options,
        "max_drop": max_drop,
        "epochs": epochs,
        "dense_epochs": dense_epochs,
        "weights": weights and str(weights),
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
    }
    if (density is None) == (plan is None):
        raise PlanError("say either density (--density 0.1) or plan (--plan FILE), and not both")
    seed_everything(seed)
    loaded = load_data(data, data_root) if isinstance(data, str) else data
    network = build(model, classes=loaded.classes) if isinstance(model, str) else copy.deepcopy(model)
    chosen = get(method, **(method_options or {})) if isinstance(method, str) else method
    if weights is not None:
        load_weights(network, weights)
    example = torch.zeros(1, *loaded.shape)
    graph = capture(network, example)
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    mapped = plan if isinstance(plan, Plan) else uniform(graph, density or 1.0, scheme, **(scheme_options or {}))
    mapped.resolve(graph.sites())
    work = Workspace(out, settings, resume)
    work.write_text("plan.toml", mapped.to_toml())
    if dense_epochs is None:
        dense_epochs = 0 if weights is not None or not isinstance(model, str) else epochs
    job = _Job(network, loaded, mapped, chosen, example, work, recipe, seed, epochs, dense_epochs, max_drop)
    return _finish(job, job.run(), density, threads)


@dataclass(frozen=True)
class _Job:
    network: nn.Module
    data: Data
    plan: Plan
    method: Method
    example: Tensor
    work: Workspace
    recipe: Recipe
    seed: int
    epochs: int
    dense_epochs: int
    max_drop: float

    def run(self) -> dict[str, Any]:
        """Every phase in turn; the network ends shaped and retrained. Returns what the phases reported."""
        dense = self.work.phase("dense", self._dense)
        self.network.load_state_dict(dense["model"])
        original = copy.deepcopy(self.network)
        shaping = max(1, math.ceil(self.epochs * SHAPING))
        recovery = math.ceil((self.epochs - shaping) / 2)
        steps = shaping * self.data.train.steps(self.recipe.batch_size)
        run = start(self.network, self.plan, self.method, self.example, steps=steps)
        shaped = self.work.phase("shape", lambda: self._shape(run, shaping))
        self._restore(run, shaped)
        self._restore(run, self.work.phase("recover", lambda: self._retrain("recover", run, recovery)))
        left = self.max_drop - (dense["score"] - self._score())
        pure = self.work.phase("purify", lambda: self._purify(run, left / 2))
        self._restore(run, pure)
        final = self.work.phase("retrain", lambda: self._retrain("retrain", run, self.epochs - shaping - recovery))
        self._restore(run, final)
        return {"original": original, "shaped": shaped["score"], "purified": pure["score"], "purify": pure["report"]}

    def _restore(self, run: Run, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        run.load_state_dict(state["run"])

    def _fit(self, phase: str, epochs: int, lr_factor: float, run: Run | None) -> None:
        if epochs < 1:
            return
        recipe = dataclasses.replace(self.recipe, epochs=epochs, lr=self.recipe.lr * lr_factor, seed=self.seed)
        checkpoint = self.work.checkpoint(phase)
        fit(self.network, self.data, recipe, hooks=run, checkpoint=checkpoint, resume=checkpoint.exists(), phase=phase)

    def _score(self) -> float:
        return 100 * evaluate(self.network, self.data.holdout).accuracy

    def _state(self, run: Run | None = None, **extra: Any) -> dict[str, Any]:
        return {
            "model": self.network.state_dict(),
            "run": run.state_dict() if run else {},
            "score": self._score(),
            **extra,
        }

    def _dense(self) -> dict[str, Any]:
        self._fit("dense", self.dense_epochs, 1.0, None)
        return self._state()

    def _shape(self, run: Run, epochs: int) -> dict[str, Any]:
        self._fit("shape", epochs, FINE_TUNING, run)
        run.finish()
        return self._state(run)

    def _purify(self, run: Run, budget: float) -> dict[str, Any]:
        """Spend `budget` points; where shaping has spent them all already, remove nothing more."""
        report = dataclasses.asdict(purify(run, self._score, budget)) if budget > 0 else {}
        return self._state(run, report=report)

    def _retrain(self, phase: str, run: Run, epochs: int) -> dict[str, Any]:
        """In the frozen plan; before purification, so that its thresholds are set by a network that works."""
        self._fit(phase, epochs, FINE_TUNING, run)
        return self._state(run)


def _finish(job: _Job, phases: dict[str, Any], density: float | None, threads: int | None) -> Result:
    """Shrink, compile, save and measure; write report.json and print the table."""
    original: nn.Module = phases.pop("original").eval()
    small = shrink(job.network.eval(), job.example).eval()
    path, dense_path = job.work.path / "model.esp", job.work.path / "work" / "dense.esp"
    save(small, job.example, path)
    save(original, job.example, dense_path)
    report = {
        "requested": {"density": density, "max_drop": job.max_drop},
        "dense": _facts(original, job, dense_path),
        "compressed": _facts(small, job, path),
        "phases": phases,
        "latency_ms": latencies(original, small, job.example, threads or torch.get_num_threads()),
        "sites": [dataclasses.asdict(row) for row in sizes(capture(small, job.example))],
        "machine": {**machine(), "threads": threads or torch.get_num_threads()},
        "seed": job.seed,
    }
    report["achieved"] = achieved(report)
    job.work.write_text("report.json", json.dumps(report, indent=1))
    print_summary(report, job.work.path)
    return Result(small, report, job.work.path)


def _facts(module: nn.Module, job: _Job, file: Path) -> dict[str, Any]:
    accuracy = 100 * evaluate(module, job.data.test).accuracy
    return {
        "accuracy": accuracy,
        "file_bytes": file.stat().st_size,
        **dataclasses.asdict(size(capture(module, job.example))),
    }
