"""The whole way: baseline, plan, training into the plan, purification, retraining, shrinking, compiling, measuring."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from espalier.densities import Split, split_of
from espalier.errors import TrainingError
from espalier.graph import Graph, capture, shrink
from espalier.mapping import Targets
from espalier.methods import Method, get
from espalier.phases import Job, Outcome
from espalier.planning import TargetRow, planned, print_targets, target_rows
from espalier.report import achieved, latencies, print_summary, screen, size, sizes, tell
from espalier.runtime import machine
from espalier.sparsity import Plan
from espalier.store import save
from espalier.train import (
    Data,
    Drop,
    Processes,
    Recipe,
    build,
    correct,
    drop,
    evaluate,
    launch,
    load_data,
    load_weights,
    seed_everything,
)
from espalier.workspace import Workspace

_TARGETS = ("speedup", "latency_ms", "size_mb", "macs")
_SCHEMES = ("density", "nonzero", "allocation", "scheme", "scheme_options", "method_options")
_NUMBERS = ("max_drop", "epochs", "dense_epochs", "seed")


@dataclass(frozen=True)
class Result:
    """What `compress` hands back: the small module, its report, and where the files lie."""

    module: nn.Module
    report: dict[str, Any]
    out: Path

    @property
    def file(self) -> Path:
        """The compressed network: `es.load` runs it."""
        return self.out / "model.esp"


def compress(
    model: str | nn.Module,
    data: str | Data,
    *,
    out: str | Path,
    density: float | None = None,
    plan: Plan | str | Path | None = None,
    speedup: float | None = None,
    latency_ms: float | None = None,
    size_mb: float | None = None,
    macs: float | None = None,
    nonzero: float | None = None,
    allocation: Literal["error", "sensitivity", "rule", "method"] | None = None,
    scheme: str | None = None,
    method: str | Method = "magnitude",
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
    distill: float | None = None,
    precision: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    accelerator: str = "auto",
) -> Result:
    """Train `model` into a smaller, faster network and measure it.

    model: a module, a name of the zoo, or ``package.module:factory``.
    data: a `Data`, or a name such as ``digits``, ``mnist``, ``cifar10``, ``folder:PATH``; `data_root` is its folder.
    out: the folder for model.esp, plan.toml, report.json and what a resumed run needs.
    density, nonzero or plan: the kept share of weights, or how many are kept, all in `scheme` ("filter+column" by
        default); or a plan or plan file.
    speedup, latency_ms, size_mb, macs: or targets, one or several: times faster than the dense network on this engine;
        milliseconds of one sample; 10^6 bytes of weights; multiply-accumulates (below 1: a share). Once the dense
        network is trained, mapping by rule (`es.propose`) chooses scheme, block and density for every layer; with
        `scheme` given, one of size_mb and macs is split over the layers by sensitivity, all in that scheme.
    allocation: how density or nonzero are split over the layers (`densities.WAYS`): by the "error" that they leave in
        the trained weights (the default), by "sensitivity", by "rule" (one density), or by the "method"
        (primal_proximal, reweighted, structure_parameters). With nothing asked for, such a method finds what it can, by
        its own threshold.
    method: how the weights are brought into the plan: a name of METHODS or a method.
    scheme_options, method_options: keyword options of both, where they are given by name.
    max_drop: points of accuracy that may be lost, read on held-out images of the training set with their standard error
        (`phases`): retraining goes on for up to twice its epochs, and purification is undone, before more is lost.
    epochs: of shaping and retraining together. dense_epochs: of the dense network before; by default as many when it
        comes from the zoo without `weights`, else none.
    weights: a safetensors file with the dense network's weights.
    threads: of the measured latencies; by default as many as PyTorch uses.
    resume: go on with a run that was stopped. A run that is over just reports.
    distill, precision: short for those of the recipe: the share of the loss that the dense network teaches while the
        weights are shaped and retrained; "bf16-mixed" and so on.
    devices, num_nodes, strategy, accelerator: the processes that train together (`train.Processes`). All of them call
        this; the first one writes the files and measures, and the report is handed to all.

    Raises an EspalierError that says what to do; whatever was finished stays in `out`.

    >>> es.compress("lenet_digits", "digits", out="out/demo", density=0.1, epochs=10).report["compressed"]["accuracy"]
    """
    shorthand = {"distill": distill, "precision": precision}
    given = {name: value for name, value in shorthand.items() if value is not None}
    recipe = dataclasses.replace(recipe or Recipe(), **given)  # type: ignore[arg-type]
    processes = Processes(devices, num_nodes, strategy, accelerator)
    targets = Targets(speedup, latency_ms, size_mb, macs, max_drop)
    _expect_at_least(epochs=(epochs, 0), dense_epochs=(dense_epochs, 0), threads=(threads, 1))
    threads = threads or torch.get_num_threads()
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    settings = _settings(locals())
    chosen = get(method, **(method_options or {})) if isinstance(method, str) else method
    split = split_of(
        targets,
        density=density,
        nonzero=nonzero,
        plan=plan,
        scheme=scheme,
        options=scheme_options,
        allocation=allocation,
        method=chosen,
    )
    seed_everything(seed)
    loaded = load_data(data, data_root) if isinstance(data, str) else data
    network, example = _begun(model, loaded, weights), torch.zeros(1, *loaded.shape)
    graph = capture(network, example)
    mapped = plan
    if split is not None:
        mapped, chosen, density = split.plan(graph), split.method(graph, chosen), split.density(graph)
    if mapped is not None:
        mapped.resolve(graph.sites())
    work = Workspace(out, settings, resume, launch(processes) if processes.world > 1 else None)
    if dense_epochs is None:
        dense_epochs = 0 if weights is not None or not isinstance(model, str) else epochs
    first = mapped or Plan(())
    job = Job(network, loaded, first, chosen, example, work, recipe, seed, epochs, dense_epochs, max_drop, processes)
    known, predicted = None, None
    if mapped is None:
        mapped, known, predicted = _planned(job, split, targets, threads)
    mapped = _begun_with(work, mapped)
    job = dataclasses.replace(job, plan=mapped)
    work.write_text("plan.toml", mapped.to_toml())
    outcome = job.run()
    small = shrink(network.eval(), example).eval()
    report = work.team.first(lambda: _measured(job, outcome, small, density, known, threads, split, predicted))
    work.write_text("report.json", json.dumps(report, indent=1))
    if work.team.leads:
        _told(report, work.path)
    return Result(small, report, work.path)


def _expect_at_least(**counts: tuple[int | None, int]) -> None:
    """Refuse a count below its least, by its name."""
    for name, (count, least) in counts.items():
        if count is not None and count < least:
            raise TrainingError(f"{name} is {count}, expected {least} or more")


def _begun(model: str | nn.Module, data: Data, weights: str | Path | None) -> nn.Module:
    """The dense network, ours to change, with its weights where they are given."""
    network = build(model, classes=data.classes) if isinstance(model, str) else copy.deepcopy(model)
    if weights is not None:
        load_weights(network, weights)
    return network


def _told(report: dict[str, Any], path: Path) -> None:
    """The report in short, and what was asked for against what was reached."""
    print_summary(report, path)
    if "targets" in report:
        print_targets([TargetRow(**row) for row in report["targets"]["rows"]])


def _settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `compress` that a run must have in common with the one that it goes on with."""
    model, data, plan, method, weights = (asked[name] for name in ("model", "data", "plan", "method", "weights"))
    return {
        **{name: asked[name] for name in (*_SCHEMES, *_NUMBERS)},
        "targets": {name: asked[name] for name in _TARGETS if asked[name] is not None},
        "model": model if isinstance(model, str) else type(model).__qualname__,
        "data": data if isinstance(data, str) else data.name,
        "plan": plan and plan.to_toml(),
        "method": method if isinstance(method, str) else repr(method),
        "weights": weights and str(weights),
        "recipe": dataclasses.asdict(asked["recipe"]),
    }


def _begun_with(work: Workspace, plan: Plan) -> Plan:
    """The plan of the run that is gone on with, where another version of this package chose another than `plan`."""
    before = work.begun_with("plan.toml")
    if before is None or before == plan.to_toml():
        return plan
    if work.team.leads:
        tell(screen(), f"going on with the plan in {work.path / 'plan.toml'}: this version would choose another")
    return Plan.from_toml(before, str(work.path / "plan.toml"))


def _planned(
    job: Job, split: Split | None, targets: Targets, threads: int
) -> tuple[Plan, dict[str, Any] | None, float | None]:
    """The plan that only the trained dense network can tell, facts about it, and what a split should come to."""
    job.dense()
    if split is not None:
        plan, predicted = split.measured(job.work, job.network, job.data)
        return plan, None, predicted
    return *planned(job.work, job.network, job.data, targets, threads=threads), None


def _measured(
    job: Job,
    outcome: Outcome,
    small: nn.Module,
    density: float | None,
    known: dict[str, Any] | None,
    threads: int,
    split: Split | None,
    predicted: float | None,
) -> dict[str, Any]:
    """Compile, save and measure: the report. The first process alone does it."""
    original = outcome.original
    path, dense_path = job.work.path / "model.esp", job.work.path / "work" / "dense.esp"
    graph, dense_graph = capture(small, job.example), capture(original, job.example)  # once: it takes its time
    save(graph, None, path)
    save(dense_graph, None, dense_path)
    report = {
        "requested": {"density": density, "max_drop": job.max_drop},
        "dense": _facts(original, dense_graph, job, dense_path),
        "compressed": _facts(small, graph, job, path),
        "drop": {
            "holdout": dataclasses.asdict(outcome.holdout),
            "test": dataclasses.asdict(_test_drop(original, small, job)),
        },
        "phases": outcome.facts,
        "latency_ms": latencies((original, dense_graph), (small, graph), job.example, threads),
        "sites": [dataclasses.asdict(row) for row in sizes(graph)],
        "machine": {**machine(), "threads": threads},
        "seed": job.seed,
    }
    report["achieved"] = achieved(report)
    if known is not None:
        rows = target_rows(known, report)
        report["targets"] = {**known, "rows": [dataclasses.asdict(row) for row in rows]}
    if split is not None and (split.target, split.way) not in (
        ("density", "rule"),
        ("density", "error"),
    ):  # which the summary tells
        row = dataclasses.asdict(split.row(report, predicted))
        report["targets"] = {"split": dataclasses.asdict(split), "rows": [row]}
    return report


def _facts(module: nn.Module, graph: Graph, job: Job, file: Path) -> dict[str, Any]:
    accuracy = 100 * evaluate(module, job.data.test).accuracy
    return {
        "accuracy": accuracy,
        "file_bytes": file.stat().st_size,
        **dataclasses.asdict(size(graph)),
    }


def _test_drop(original: nn.Module, small: nn.Module, job: Job) -> Drop:
    return drop(*(correct(module, job.data.test) for module in (original, small)))
