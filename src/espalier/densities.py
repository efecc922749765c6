"""Densities: one target for the whole network, or none, and who splits it over the layers (WAYS)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from espalier.errors import PlanError, UnknownNameError
from espalier.graph import Graph, capture
from espalier.mapping import Targets, uniform
from espalier.methods import METHODS, Method, allocate, open_plan
from espalier.planning import QUICK_IMAGES, TargetRow, on_split
from espalier.sparsity import Plan
from espalier.train import Data
from espalier.workspace import Workspace

SCHEME = "filter+column"  # where none is named
WAYS = {
    "rule": "one density for all layers; small ones, and those that read the input, are spared",
    "error": "by how much of each layer's trained weights a density takes away",
    "sensitivity": "by that, and by what the held-out loss grows when a layer of the trained network alone is cut",
    "method": "the method finds the densities while it trains",
}
_CLOSE = 0.02  # as good as met: groups are whole
_GAPS = {
    "density": "whole groups, and layers that cannot take the scheme",
    "weights": "whole groups, and layers that cannot take the scheme",
    "macs": "whole groups, and layers that cannot take the scheme",
    "bytes": "the file holds norms, names and the graph beside the weights",
}


@dataclass(frozen=True)
class Split:
    """One target for the whole network, and the way it is split over the layers.

    target: "density" (share of conv and linear weights), "weights" (how many), "macs" (whose weight is not zero),
        "bytes" (as stored), or None where the method is to find what it can.
    amount: of it; of weights, MACs and bytes up to 1 is a share of the dense network.
    """

    target: str | None
    amount: float
    way: str
    scheme: str = SCHEME
    options: Mapping[str, Any] = field(default_factory=dict)

    def density(self, graph: Graph) -> float | None:
        """The share of weights that is asked for, where weights are."""
        if self.target not in ("density", "weights"):
            return None
        total = sum(site.weights for site in graph.sites().values())
        return self.amount if self.target == "density" or self.amount <= 1 else self.amount / total

    def plan(self, graph: Graph) -> Plan | None:
        """The plan, where it can be made before the dense network is trained.

        Raises PlanError where what is asked for cannot be reached.
        """
        density = self.density(graph)
        if self.way == "method":
            return open_plan(graph, self.scheme, **self.options)
        made = None if density is None else uniform(graph, density, self.scheme, **self.options)
        return made if self.way == "rule" else None

    def method(self, graph: Graph, method: Method) -> Method:
        """The method; where it is to find the densities, with the one that all sites of the plan are to have together.

        Raises PlanError where the other layers alone hold more than is asked for.
        """
        density, sites = self.density(graph), graph.sites()
        if self.way != "method" or density is None:
            return method
        planned = open_plan(graph, self.scheme, **self.options).resolve(sites)
        total, held = (sum(sites[s].weights for s in names) for names in (sites, planned))
        share = (density * total - (total - held)) / held
        if share <= 0:
            raise PlanError(
                f"density {density:.4g} cannot be reached with {self.scheme}: the layers that cannot take it hold "
                f"{(total - held) / total:.4g} of all weights. Ask for more, or choose another scheme"
            )
        return replace(method, density=share)  # type: ignore[type-var]

    def measured(self, work: Workspace, network: nn.Module, data: Data) -> tuple[Plan, float]:
        """The plan by errors, or by sensitivity on held-out images, and what it should cost; made once and kept."""

        def make() -> dict[str, Any]:
            whole = copy.deepcopy(network).eval()
            score, graph = on_split(data.holdout, QUICK_IMAGES), capture(whole, torch.zeros(1, *data.shape))
            kind, loss = self.target or "density", (lambda: score(whole)[1]) if self.way == "sensitivity" else None
            made = allocate(graph, loss, self.amount, self.scheme, kind, **self.options)
            curves = {site: list(map(list, points)) for site, points in made.sensitivity.items()}
            return {"toml": made.plan.to_toml(), "predicted": made.predicted, "sensitivity": json.dumps(curves)}

        state = work.phase("allocation", lambda: work.team.first(make))
        return Plan.from_toml(state["toml"], "the plan of this run"), float(state["predicted"])

    def row(self, report: Mapping[str, Any], predicted: float | None) -> TargetRow:
        """Requested, predicted and achieved, with the reason for a gap."""
        dense, small, kind = report["dense"], report["compressed"], self.target or "density"
        got, whole = (
            {
                "density": part["nonzero"] / max(1, dense["weights"]),
                "weights": part["nonzero"],
                "macs": part["useful_macs"],
                "bytes": part["file_bytes"],
            }[kind]
            for part in (small, dense)
        )
        if self.target is None:
            return TargetRow("density", got, predicted, got, True, "found by the method: nothing was asked for")
        wanted = self.amount * (whole if kind != "density" and self.amount <= 1 else 1)
        met = got <= wanted * (1 + _CLOSE)
        return TargetRow(kind, wanted, predicted, got, met, f"split by {self.way}" if met else _GAPS[kind])


def split_of(
    targets: Targets,
    *,
    density: float | None,
    nonzero: float | None,
    plan: object,
    scheme: str | None,
    options: Mapping[str, Any] | None,
    allocation: str | None,
    method: Method,
) -> Split | None:
    """What is asked for as a split; None where a plan says it all, or mapping chooses schemes too.

    Raises PlanError for nothing or too much at once, UnknownNameError for an allocation that is not in WAYS.
    """
    if allocation is not None and allocation not in WAYS:
        raise UnknownNameError("allocation", allocation, WAYS)
    if nonzero is not None and not 0 < nonzero < math.inf:
        raise PlanError(f"nonzero is {nonzero:g}: how many weights stay, or up to 1 the share of them")
    latency = targets.speedup is not None or targets.latency_ms is not None
    size = None if targets.size_mb is None else 1e6 * targets.size_mb
    counts = {"density": density, "weights": nonzero, "macs": targets.macs, "bytes": size}
    given = {name: value for name, value in counts.items() if value is not None}
    ours = scheme is not None or allocation is not None or bool({"density", "weights"} & set(given))
    if plan is not None:
        if given or latency or allocation:
            raise PlanError(_ONE)
        return None
    if latency and ours:
        raise PlanError(
            f"a target of latency chooses schemes and densities: leave --scheme and --allocation out; {_ONE}"
        )
    if latency or (given and not ours):
        return None
    if len(given) > 1:
        raise PlanError(f"with a scheme or an allocation it must be one target, got {', '.join(given)}; {_ONE}")
    finds = is_dataclass(method) and any(f.name == "density" for f in fields(method))
    if not given and not (finds and allocation in (None, "method")):
        raise PlanError(f"{_ONE}; or nothing, with a method that finds densities itself ({', '.join(finders())})")
    target, amount = next(iter(given.items()), (None, 1.0))
    way = allocation or ("method" if target is None else "error" if target in ("density", "weights") else "sensitivity")
    if way == "method" and not finds:
        raise PlanError(f"--allocation method needs one that finds densities itself: {', '.join(finders())}")
    if way not in ("error", "sensitivity") and target in ("macs", "bytes"):
        raise PlanError(f"{target} are split over the layers by error or sensitivity: leave --allocation {way} out")
    return Split(target, amount, way, scheme or SCHEME, dict(options or {}))


def finders() -> list[str]:
    """The methods that find densities themselves."""
    return [name for name, made in METHODS.items() if any(f.name == "density" for f in fields(made))]  # type: ignore[arg-type]


_ONE = (
    "say either density (--density 0.1), or how many weights stay (--nonzero), plan (--plan FILE) or targets "
    "(--speedup 3, --latency-ms, --size-mb, --macs; together if you like)"
)
