"""Allocation: one target for the whole network, split over its layers by a quick sensitivity.

min sum_d sensitivity_d(density_d)   subject to   sum_d cost_d(density_d) <= target

A decision d is a site, or all sites whose filters are coupled (by residual adds): they get one density, so that whole
channels go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from espalier.errors import PlanError, UnknownNameError
from espalier.graph import Graph, couplings
from espalier.graph.ir import Site
from espalier.methods.targets import cuttable, freeze, targets
from espalier.sparsity import Entry, Plan, Scheme, ceiling, scheme, size_bytes, unfit

DENSITIES = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.06, 0.03)
LEVELS = 96  # between density 1 and the lowest that was measured
COSTS: dict[str, Callable[[Site, Scheme | None, float], float]] = {
    "density": lambda site, chosen, density: density * site.weights,
    "weights": lambda site, chosen, density: density * site.weights,
    "macs": lambda site, chosen, density: density * site.macs,
    "bytes": lambda site, chosen, density: size_bytes(site, chosen),
}


@dataclass(frozen=True)
class Allocation:
    """A plan, what was asked for and what the plan will cost (both in the unit of `kind`), and the measured curves.

    sensitivity: first site of each decision -> (density, added loss) pairs, from dense downwards.
    """

    plan: Plan
    kind: str
    requested: float
    predicted: float
    sensitivity: dict[str, tuple[tuple[float, float], ...]]


def allocate(
    graph: Graph,
    loss: Callable[[], float],
    target: float,
    name: str = "filter+column",
    kind: str = "density",
    densities: Sequence[float] = DENSITIES,
    **options: Any,
) -> Allocation:
    """The plan with scheme `name` that adds least loss, layer by layer, and costs at most `target`.

    graph: of the network as it is; its weights are put back after each trial. loss: held-out loss of the network as
    it is; a few batches will do (it is called about ``len(densities)`` times a layer). kind: "density" (share of all
    weights), "weights", "macs" or "bytes" (flags, signs and magnitudes included); for these a target of at most 1 is a
    share of the dense network. Layers that cannot take the scheme and depthwise convs stay dense; those that make the
    network's outputs lose no filters.

    The knapsack is solved by a Lagrange multiplier over `LEVELS` densities, between which the measured losses are
    interpolated in log density. Our reading: added losses of layers add up; and a curve never gets flatter downwards
    in log density, since a loss that levels off says that the layer is broken, not that it is cheap.

    Raises PlanError when the target cannot be reached, with what can; UnknownNameError for a kind or scheme.

    >>> made = allocate(capture(model, x), lambda: held_out_loss(model), 0.3, "block_punched", m=8, n=4)
    >>> run = start(model, made.plan, "admm", x, steps=1000)
    """
    if kind not in COSTS:
        raise UnknownNameError("kind of target", kind, COSTS)
    sites, may = graph.sites(), cuttable(graph)
    names = {site: name if site in may else _without_filters(name) for site in sites}
    fits = {s: _fitted(names[s], facts, options) for s, facts in sites.items()}
    decisions = _decisions(graph, [s for s in sites if fits[s]])
    dense_cost = sum(COSTS[kind](facts, None, 1.0) for facts in sites.values())
    wanted = target * dense_cost if kind == "density" or target <= 1 else target
    base = loss()
    curves, levels = {}, {}
    for members in decisions:
        at = lambda density, members=members: {s: _scheme(names[s], density, options) for s in members}  # noqa: E731
        measured = [(d, _tried(graph, at(d), loss) - base) for d in sorted(densities, reverse=True)]
        points = _convex(measured)
        curves[members[0]] = tuple(points)
        levels[members] = [
            (d, _between(points, d), sum(_cost(kind, sites[s], names[s], d, options) for s in members))
            for d in (min(densities) ** (k / (LEVELS - 1)) for k in range(LEVELS))
        ]
    fixed = sum(COSTS[kind](sites[s], None, 1.0) for s in sites if not fits[s])
    chosen = _knapsack(levels, wanted - fixed, kind, dense_cost, fixed)
    entries, predicted = [], fixed
    for members, (density, _, cost) in chosen.items():
        entries += [Entry(s, _scheme(names[s], density, options) if density < 1 else None) for s in members]
        predicted += cost
    entries += [Entry(s, None) for s in sites if not fits[s]]
    order = {site: k for k, site in enumerate(sites)}
    plan = Plan(tuple(sorted(entries, key=lambda entry: order[entry.match])))
    unit = dense_cost if kind == "density" else 1.0
    return Allocation(plan, kind, wanted / unit, predicted / unit, curves)


Level = tuple[float, float, float]  # density, added loss, cost


def _knapsack(
    levels: dict[tuple[str, ...], list[Level]], budget: float, kind: str, dense: float, fixed: float
) -> dict[tuple[str, ...], Level]:
    """The level of each decision with the least ``added loss + multiplier * cost`` that keeps within the budget."""

    def best(multiplier: float) -> dict[tuple[str, ...], Level]:
        return {d: min(rows, key=lambda row: row[1] + multiplier * row[2] / dense) for d, rows in levels.items()}

    def cost(made: dict[tuple[str, ...], Level]) -> float:
        return sum(row[2] for row in made.values())

    least = {d: min(rows, key=lambda row: row[2]) for d, rows in levels.items()}
    if cost(least) > budget:
        reachable = (cost(least) + fixed) / (dense if kind == "density" else 1.0)
        raise PlanError(f"a target of {kind} below {reachable:.4g} cannot be reached with this scheme: ask for more")
    low, high = -30.0, 30.0  # log of the multiplier
    for _ in range(60):
        middle = (low + high) / 2
        if cost(best(math.exp(middle))) > budget:
            low = middle
        else:
            high = middle
    made = best(math.exp(high))
    return made if cost(made) <= budget else least


def _tried(graph: Graph, schemes: dict[str, Scheme], loss: Callable[[], float]) -> float:
    """The loss with the sites projected, which are then put back."""
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        try:
            made = targets(graph, schemes)
            for target, frozen in zip(made, freeze(made).values()):
                before[target.site] = target.weight.detach().clone()
                target.weight.copy_(frozen.apply(target.weight))
            return loss()
        finally:
            for site, weight in before.items():
                graph.tensors[site].copy_(weight)


def _decisions(graph: Graph, sites: list[str]) -> list[tuple[str, ...]]:
    """Sites whose filters are coupled, together; in the order of the network."""
    found, first = couplings(graph), dict[int, int]()
    parts: list[list[str]] = []
    for site in sites:
        roots = {found.find(label) for label in found.labels[f"{site}@0"].tolist()} - set(found.frozen)
        known = sorted({first[root] for root in roots if root in first})
        home = known[0] if known else len(parts)
        if not known:
            parts.append([])
        for other in known[1:]:  # this site joins several
            parts[home] += parts[other]
            parts[other] = []
            first = {root: home if part == other else part for root, part in first.items()}
        parts[home].append(site)
        first |= dict.fromkeys(roots, home)
    return [tuple(part) for part in parts if part]


def _fitted(name: str, site: Site, options: dict[str, Any]) -> bool:
    return not site.depthwise and unfit(_scheme(name, 0.1, options), site) is None


def _scheme(name: str, density: float, options: dict[str, Any]) -> Scheme:
    open_ended = scheme(name, **options)
    fixed = all(rule.free == 0 or rule.snap.ties for rule in open_ended.rules)
    return open_ended if fixed else scheme(name, min(density, ceiling(open_ended)), **options)


def _cost(kind: str, site: Site, name: str, density: float, options: dict[str, Any]) -> float:
    chosen = None if density >= 1 else _scheme(name, density, options)
    return COSTS[kind](site, chosen, 1.0 if chosen is None else chosen.density)


def _convex(measured: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The curve from (1, 0) through what was measured, its slope in log density never falling."""
    points, slope = [(1.0, 0.0)], 0.0
    for density, added in measured:
        before, loss = points[-1]
        run = math.log(before / density)
        slope = max(slope, (added - loss) / run)
        points.append((density, loss + slope * run))
    return points


def _between(points: Sequence[tuple[float, float]], density: float) -> float:
    for (d1, l1), (d2, l2) in pairwise(points):
        if density >= d2 - 1e-12:
            share = (math.log(d1) - math.log(density)) / (math.log(d1) - math.log(d2))
            return l1 + (l2 - l1) * min(1.0, max(0.0, share))
    return points[-1][1]


def _without_filters(name: str) -> str:
    return "+".join(part for part in name.split("+") if part != "filter") or "column"
