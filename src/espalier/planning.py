"""Planning for the loop that comes with Espalier: targets against a data set, and what came of them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from espalier.errors import DataError, TrainingError
from espalier.mapping import Proposal, Sensitivity, Targets, propose
from espalier.methods import get, start
from espalier.report import screen
from espalier.sparsity import Plan
from espalier.train import Data, Recipe, Split, build, evaluate, fit, load_data, load_weights, recalibrate
from espalier.workspace import Workspace

NEAR = 0.05  # of a requested latency or size: as good as met
SHORT = Recipe(lr=0.01, warmup_epochs=0.1)  # of a trial's retraining
QUICK_IMAGES = 500  # held-out images that a plan's sensitivities are read on


def on_split(split: Split, images: int | None = None) -> Callable[[nn.Module], tuple[float, float]]:
    """Accuracy in points and loss on a split, or its first images: the `Evaluate` of mapping.

    Raises DataError where there are none.

    >>> on_split(data.holdout, 500)(model)
    (91.4, 0.31)
    """
    part = split if images is None else split.only(torch.arange(max(0, min(images, len(split)))))
    if not len(part):
        raise DataError(f"there is nothing to score on: {images} of {len(split)} held-out images; give --images 500")

    def score(model: nn.Module) -> tuple[float, float]:
        found = evaluate(model, part)
        return 100 * found.accuracy, found.loss

    return score


@functools.cache
def _dataset(name: str, root: str | None, norm: tuple[tuple[float, ...], tuple[float, ...]] | None) -> Data:
    data = load_data(name, root)
    return data.normalised_by(*norm) if norm else data


@dataclass(frozen=True)
class OneShot:
    """The score of a plan in a search: pruned by magnitude in one shot, retrained briefly, scored on held-out images.

    Everything is given by name, so that it can be sent to other processes and machines; each loads its data once.

    model: of the zoo, or package.module:factory. weights: its safetensors file. epochs: of retraining. images: of the
    training set that are used, None for all. norm: mean and deviation that the weights were trained with.
    threads: of each worker. A retraining that diverges scores 0.
    """

    model: str
    data: str
    weights: str | None = None
    data_root: str | None = None
    epochs: int = 1
    images: int | None = None
    recipe: Recipe = SHORT
    norm: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    threads: int = 1

    def __call__(self, plan: Plan) -> float:
        torch.set_num_threads(self.threads)
        data = _dataset(self.data, self.data_root, self.norm)
        network = build(self.model, classes=data.classes)
        if self.weights is not None:
            load_weights(network, self.weights)
        run = start(network, plan, get("magnitude"), torch.zeros(1, *data.shape))
        run.finish()
        train = data.train
        if self.images is not None:
            train = train.only(torch.arange(min(self.images, len(train))))
        try:
            if self.epochs:
                part = replace(data, train=train)
                fit(network, part, replace(self.recipe, epochs=self.epochs), hooks=run, progress=False)
            else:
                recalibrate(network, train)
        except TrainingError:  # it diverged: a plan to keep away from, and no reason to end the search
            return 0.0
        return 100 * evaluate(network, data.holdout).accuracy


def planned(
    work: Workspace,
    network: nn.Module,
    data: Data,
    targets: Targets,
    *,
    threads: int,
    sensitivity: str | Path | None = None,
    tell: Callable[[str], None] = print,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of a compression by rule, made once and kept, and the facts about it for the report."""

    def make() -> dict[str, Any]:
        example = torch.zeros(1, *data.shape)
        harms = None if sensitivity is None else Sensitivity.load(sensitivity).harms()
        whole = copy.deepcopy(network).eval()
        found = propose(
            whole,
            example,
            targets,
            evaluate=on_split(data.holdout, QUICK_IMAGES),
            harms=harms,
            threads=threads,
            tell=tell,
        )
        return {"toml": found.plan.to_toml(), "facts": json.dumps(facts(found))}

    state = work.phase("plan", lambda: work.team.first(make))
    return Plan.from_toml(state["toml"], "the plan of this run"), json.loads(state["facts"])


def begun(file: str | Path, asked: str, make: Callable[[], Proposal]) -> tuple[Plan, float]:
    """Where a search begins: the rule's plan for a latency, and the milliseconds that the table should say of plans.

    Both are measured, so made again they would be others, and the search another: they are made once for each thing
    that is `asked`, and kept in `file`. Raises DataError for a file that holds something else.
    """
    path = Path(file)
    held = _starts(path)
    if asked not in held:
        found = make()
        assert found.limit_ms is not None  # a latency was asked
        held[asked] = found.plan, found.limit_ms
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            rows = {name: {"limit_ms": limit, "toml": plan.to_toml()} for name, (plan, limit) in held.items()}
            part.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise DataError(f"{path}: where the search begins cannot be kept there: {error.strerror}") from error
    return held[asked]


def _starts(path: Path) -> dict[str, tuple[Plan, float]]:
    """What stands in the file of `begun`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name: (Plan.from_toml(row["toml"], str(path)), float(row["limit_ms"])) for name, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not what a search wrote there ({error}): remove it, or give another --out"
        ) from None


def facts(found: Proposal) -> dict[str, Any]:
    """A proposal for report.json."""
    return {
        "requested": found.targets.told(),
        "dense": asdict(found.dense),
        "reachable": asdict(found.least),
        "predicted": {
            **asdict(found.predicted),
            "speedup": found.dense.latency_ms / found.predicted.latency_ms,
            "drop": found.predicted_drop,
        },
        "random_weights": {"latency_ms": found.measured_ms, "speedup": found.measured_speedup},
    }


@dataclass(frozen=True)
class TargetRow:
    """One target at the end. reason: for the gap between requested and achieved, "" where there is none."""

    target: str
    requested: float
    predicted: float | None
    achieved: float
    met: bool
    reason: str


def target_rows(known: Mapping[str, Any], report: Mapping[str, Any]) -> list[TargetRow]:
    """Requested, predicted and achieved, with the reason for a gap.

    known: `facts` of the plan. report: of the compression.
    """
    dense, small = report["latency_ms"]["dense"]["engine"], report["latency_ms"]["compressed"]["engine"]
    got = {
        "speedup": dense / small,
        "latency_ms": small,
        "size_mb": report["compressed"]["file_bytes"] / 1e6,
        "macs": float(report["compressed"]["useful_macs"]),
        "max_drop": report["dense"]["accuracy"] - report["compressed"]["accuracy"],
    }
    predicted = {**known["predicted"], "max_drop": known["predicted"]["drop"]}
    rows = []
    for name, asked in known["requested"].items():
        wanted = asked * known["dense"]["macs"] if name == "macs" and asked < 1 else asked
        value = got[name]
        slack = 0.0 if name == "max_drop" else NEAR
        met = value >= wanted * (1 - slack) if name == "speedup" else value <= wanted * (1 + slack)
        reason = "" if met and not _far(name, value, wanted) else _reason(name, value, wanted, known, report)
        rows.append(TargetRow(name, wanted, predicted.get(name), value, met, reason))
    return rows


def _far(name: str, value: float, wanted: float) -> bool:
    """More than asked by so much that it wants a word."""
    return (value / wanted if name == "speedup" else wanted / max(value, 1e-9)) > 1 + 2 * NEAR and name != "max_drop"


def _reason(name: str, value: float, wanted: float, known: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    if name == "max_drop":
        return "see the notes on accuracy"
    planned_density = known["predicted"]["macs"] / known["dense"]["macs"]
    got_density = report["compressed"]["useful_macs"] / report["dense"]["macs"]
    better = value > wanted if name == "speedup" else value < wanted
    if better:
        fewer = got_density < 0.95 * planned_density
        return "purification and unused paths removed more than the plan asked for" if fewer else "the plan's last step"
    drift = report["latency_ms"]["dense"]["engine"] / known["dense"]["latency_ms"]
    if name == "latency_ms" and drift > 1 + 2 * NEAR:
        return f"the machine is busier than when it was planned: the dense network takes {drift:.2f} times as long now"
    if name == "size_mb":
        return "the stored file holds names, norms and the graph beside the weights"
    if name == "macs":
        return "the schemes keep whole groups, and layers were spared: see plan.toml"
    seen = known["random_weights"]["speedup"]
    if seen is not None and name == "speedup" and seen < wanted * (1 - NEAR):
        return f"no plan of the table came closer: with random weights it was {seen:.2f}x"
    return "the trained masks run slower than random ones of the same plan, or the machine was busy"


def print_targets(rows: list[TargetRow], console: Console | None = None) -> None:
    """Requested, predicted, achieved, and why."""
    table = Table(title="targets")
    for heading in ("target", "requested", "predicted", "achieved", "reason"):
        table.add_column(heading, justify="left" if heading in ("target", "reason") else "right")
    for row in rows:
        told = [_number(row.requested), _number(row.predicted), _number(row.achieved)]
        table.add_row(row.target, *told, row.reason if row.met else f"[yellow]missed:[/] {row.reason}")
    (console or screen()).print(table)


def print_proposal(found: Proposal, console: Console | None = None) -> None:
    """What was asked, what is reachable, what is predicted, what was measured with random weights."""
    table = Table(title="plan by rule (latency of the engine; measured: random weights)")
    for heading in ("target", "requested", "reachable", "predicted", "measured"):
        table.add_column(heading, justify="left" if heading == "target" else "right")
    for row in found.rows():
        table.add_row(*row)
    (console or screen()).print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
