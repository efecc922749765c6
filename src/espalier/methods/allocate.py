"""Allocation: one target for the whole network, split over its layers by a quick sensitivity.

min sum_d s_d * error_d(choice_d)   subject to   sum_d cost_d(choice_d) <= target

error_d is the relative projection error ||w - project(w)||^2 / ||w||^2, equally in every layer, and s_d how much loss
such an error costs there among the others, to the power `TRUST`. A decision d is a site, or all sites whose filters are
coupled (by residual adds): they get one density, so that whole channels go. A choice is a density, and under a size
target also the shape and the share of unified blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import mean, median
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from espalier.errors import MethodError, PlanError, UnknownNameError
from espalier.graph import Graph, couplings
from espalier.graph.ir import Site
from espalier.methods.targets import freeze, targets
from espalier.methods.templates import Template, templates
from espalier.sparsity import Entry, Plan, Scheme, size_bytes, unfit

DENSITIES = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.06, 0.03)
LOWEST = 1e-3
LEVELS = 96  # between density 1 and the lowest that was measured
BLOCKS = ((1, 4), (1, 8), (2, 4), (4, 4))  # rows x columns of unified blocks that are tried
LEFT_ALONE = (0.5, 0.0)  # the shares of them that are tried
HOPELESS = 1e6  # the added loss of a network whose loss is not finite any more
# The power of a layer's sensitivity in what it adds. On ResNet-20 at 3x, retrained for one short epoch, plans that sum
# measured losses (1) were 4.6 points worse than plans that sum errors (0), and the square root 2.8: what a layer loses
# alone and before retraining says little about what the network loses after it.
TRUST = 0.15
COSTS: dict[str, Callable[[Site, Scheme | None], float]] = {
    "density": lambda site, chosen: site.weights * _kept(chosen),
    "weights": lambda site, chosen: site.weights * _kept(chosen),
    "macs": lambda site, chosen: site.macs * _kept(chosen),
    "bytes": size_bytes,
}


class Sensed(NamedTuple):
    """What a decision does alone at a density: the loss that it adds, and its projection error."""

    density: float
    loss: float
    error: float


Sensitivity = Mapping[str, Sequence[Sensed]]  # first site of each decision -> from dense downwards


@dataclass(frozen=True)
class Allocation:
    """A plan, what was asked for and what the plan will cost (both in the unit of `kind`), and what was measured."""

    plan: Plan
    kind: str
    requested: float
    predicted: float
    sensitivity: dict[str, tuple[Sensed, ...]]


def allocate(
    graph: Graph,
    loss: Callable[[], float] | None,
    target: float,
    name: str = "filter+column",
    kind: str = "density",
    densities: Sequence[float] | None = None,
    sensitivity: Sensitivity | None = None,
    **options: Any,
) -> Allocation:
    """The plan with scheme `name` that leaves least error, layer by layer, and costs at most `target`.

    graph: of the network as it is; its weights are put back after each trial. loss: held-out loss of the network as
    it is; a few batches will do (it is called about ``len(densities)`` times a layer). None: errors count alike in
    every layer, and nothing is run. densities: that are measured; default: `DENSITIES`, and on to a quarter of the
    target. kind: "density" (share of all weights), "weights", "macs" or "bytes" (flags, signs and magnitudes
    included); for these a target of at most 1 is a share of the dense network. Layers that cannot take the scheme and
    depthwise convs stay dense; those that make the network's outputs lose no filters.

    sensitivity: that of an earlier allocation of this network in this scheme, for another target: nothing is measured
    again.

    With kind "bytes" and "unify" in the scheme, every layer also gets the shape of its unified blocks out of `BLOCKS`
    and the share of them left alone out of `LEFT_ALONE`, or none of them, unless options say which.

    The knapsack is solved by a Lagrange multiplier over `LEVELS` densities, between which the measured errors are
    interpolated in log density. Our reading: what layers add sums up, as does what pruning and unifying one do; and a
    curve never gets flatter downwards in log density, since an error that levels off says that the layer is broken, not
    that it is cheap.

    Raises PlanError when the target cannot be reached, with what can; UnknownNameError for a kind or scheme;
    MethodError where the network's loss is not finite.

    >>> made = allocate(capture(model, x), lambda: held_out_loss(model), 0.3, "block_punched", m=8, n=4)
    >>> run = start(model, made.plan, "admm", x, steps=1000)
    """
    if kind not in COSTS:
        raise UnknownNameError("kind of target", kind, COSTS)
    if not (math.isfinite(target) and target > 0):
        raise PlanError(f"the target of {kind} is {target}, expected a number above 0")
    sites, fitting = graph.sites(), templates(graph, name, options)
    dense = {site: COSTS[kind](facts, None) for site, facts in sites.items()}
    total = sum(dense.values())
    wanted = target * total if kind == "density" or target <= 1 else target
    measured = _down_to(wanted / total / 4) if densities is None else densities
    base = 0.0 if loss is None else loss()
    if not math.isfinite(base):
        raise MethodError(f"the network's held-out loss is {base}: nothing can be measured on it. Train it first")

    decisions = {members[0]: members for members in _decisions(graph, list(fitting))}
    pruned = {s: found.without("unify") for s, found in fitting.items()}
    ladders = {first: _ladder([pruned[s] for s in members], measured) for first, members in decisions.items()}
    curves = {
        first: _known(sensitivity, first)
        if sensitivity is not None
        else _sensed(graph, {s: pruned[s] for s in members}, ladders[first], lambda: loss() - base if loss else 0.0)
        for first, members in decisions.items()
    }
    choices = _choices(graph, fitting, decisions, ladders, curves, kind)
    fixed = sum(cost for s, cost in dense.items() if s not in fitting)
    chosen = _knapsack(choices, wanted - fixed, kind, total, fixed)
    entries = {s: made for choice in chosen for s, made in choice.schemes.items()}
    plan = Plan(tuple(Entry(s, entries.get(s)) for s in sites))
    unit = total if kind == "density" else 1.0
    predicted = fixed + sum(choice.cost for choice in chosen)
    return Allocation(plan, kind, wanted / unit, predicted / unit, curves)


def open_plan(graph: Graph, name: str = "filter+column", **options: Any) -> Plan:
    """Scheme `name` without a density wherever it fits: for methods that find the densities themselves.

    As in `allocate` depthwise convs stay dense, and the layers that make the network's outputs lose no filters.

    >>> run = start(model, open_plan(capture(model, x), "column"), "primal_proximal", x, steps=1000)
    """
    fitting = templates(graph, name, options)
    if not fitting:
        raise PlanError(f"no layer of the network can take {name}: choose another scheme")
    return Plan(tuple(Entry(s, fitting[s].at(None) if s in fitting else None) for s in graph.sites()))


def _at(here: Mapping[str, Template], density: float) -> dict[str, Scheme | None]:
    return {s: found.at(density) for s, found in here.items()}


@dataclass(frozen=True)
class _Ladder:
    """The densities to measure, and those to choose among, from dense downwards."""

    measured: Sequence[float]
    levels: Sequence[float]


def _ladder(here: Sequence[Template], densities: Sequence[float]) -> _Ladder:
    top, loose = min(found.top for found in here), any(found.loose for found in here)
    below = sorted((d for d in densities if d < top), reverse=True) if loose else []
    if not below:
        return _Ladder([top], [1.0, top]) if top < 1 else _Ladder([], [1.0])
    levels = [top * (below[-1] / top) ** (k / (LEVELS - 1)) for k in range(LEVELS)]
    return _Ladder([top, *below], [1.0, *levels]) if top < 1 else _Ladder(below, levels)


def _down_to(density: float) -> list[float]:
    """The usual densities, and below them each half the one before."""
    found = list(DENSITIES)
    while found[-1] > max(density, LOWEST):
        found.append(found[-1] / 2)
    return found


def _sensed(
    graph: Graph, here: Mapping[str, Template], ladder: _Ladder, added: Callable[[], float]
) -> tuple[Sensed, ...]:
    """A decision at the densities of its ladder."""
    points = [Sensed(1.0, 0.0, 0.0)]
    for density in ladder.measured:
        error, loss = _tried(graph, _at(here, density), added)
        points.append(Sensed(density, loss if math.isfinite(loss) else HOPELESS, error))
    return tuple(points)


class Cost(Protocol):
    """What an error in a layer was measured to cost in loss."""

    @property
    def error(self) -> float: ...
    @property
    def loss(self) -> float: ...


def weighed(costs: Mapping[str, Sequence[Cost]]) -> dict[str, float]:
    """site -> (loss for an error / that of the site in the middle) ** TRUST, for those where loss was seen."""
    slopes = {
        s: mean([max(0.0, at.loss) / at.error for at in each if at.error > 0] or [0.0]) for s, each in costs.items()
    }
    measured = {site: slope for site, slope in slopes.items() if slope > 0}
    middle = median(measured.values()) if measured else 1.0
    return {site: (slope / middle) ** TRUST for site, slope in measured.items()}


def _variants(here: Mapping[str, Template], graph: Graph, kind: str) -> Iterator[tuple[Mapping[str, Template], float]]:
    """The sites of a decision without unified blocks and with them, and the error of these."""
    if not any("unify" in found.name.split("+") for found in here.values()):
        yield here, 0.0
        return
    sites, tried = graph.sites(), [here]
    by_hand = any(option in ("r", "c", "free") or "unify." in option for t in here.values() for option in t.options)
    if kind == "bytes" and not by_hand:
        yield {s: found.without("unify") for s, found in here.items()}, 0.0
        tried = [{s: t.tied(block, free) for s, t in here.items()} for block, free in product(BLOCKS, LEFT_ALONE)]
    for variant in tried:
        schemes = _at(variant, 1.0)
        if all(made is not None and unfit(made, sites[s]) is None for s, made in schemes.items()):
            yield variant, _tried(graph, schemes, lambda: 0.0)[0]


@dataclass(frozen=True)
class _Choice:
    """What a decision may come to: its weighed error, its cost, and the scheme of every site."""

    error: float
    cost: float
    schemes: Mapping[str, Scheme | None]


def _choices(
    graph: Graph,
    fitting: Mapping[str, Template],
    decisions: Mapping[str, Sequence[str]],
    ladders: Mapping[str, _Ladder],
    curves: Sensitivity,
    kind: str,
) -> list[list[_Choice]]:
    """For each decision what it may come to."""
    sites, weights, found = graph.sites(), weighed(curves), []
    for first, members in decisions.items():
        weight, convex = weights.get(first, 1.0), _convex(curves[first])
        found.append(
            [
                _Choice(weight * (_between(convex, d) + more), sum(COSTS[kind](sites[s], at[s]) for s in members), at)
                for variant, more in _variants({s: fitting[s] for s in members}, graph, kind)
                for d in ladders[first].levels
                if (at := _at(variant, d))
            ]
        )
    return found


def _knapsack(
    choices: Sequence[Sequence[_Choice]], budget: float, kind: str, dense: float, fixed: float
) -> list[_Choice]:
    """For each decision the choice with the least ``error + multiplier * cost`` that keeps within the budget."""

    def best(multiplier: float) -> list[_Choice]:
        return [min(rows, key=lambda row: row.error + multiplier * row.cost / dense) for rows in choices]

    def cost(made: Sequence[_Choice]) -> float:
        return sum(row.cost for row in made)

    least = [min(rows, key=lambda row: row.cost) for rows in choices]
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


def _tried(graph: Graph, schemes: Mapping[str, Scheme | None], added: Callable[[], float]) -> tuple[float, float]:
    """The error of projecting the sites, summed, and what `added` is meanwhile; then they are put back."""
    before: dict[str, Tensor] = {}
    error = 0.0
    with torch.no_grad():
        try:
            made = targets(graph, {s: chosen for s, chosen in schemes.items() if chosen is not None})
            for target, frozen in zip(made, freeze(made).values()):
                w = before[target.site] = target.weight.detach().clone()
                target.weight.copy_(frozen.apply(target.weight))
                error += float((w - target.weight).float().square().sum() / w.float().square().sum().clamp(min=1e-30))
            return error, added()
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


def _kept(chosen: Scheme | None) -> float:
    return 1.0 if chosen is None else chosen.density


def _known(sensitivity: Sensitivity, site: str) -> tuple[Sensed, ...]:
    if site not in sensitivity:
        raise PlanError(f"the sensitivity does not know {site}: it is of another network or scheme; leave it out")
    return tuple(sensitivity[site])


def _convex(points: Sequence[Sensed]) -> list[tuple[float, float]]:
    """(density, error) from dense downwards, the slope in log density never falling."""
    made, slope = [(1.0, 0.0)], 0.0
    for (before, error), at in zip(made, points[1:]):  # `made` grows meanwhile
        run = math.log(before / at.density)
        slope = max(slope, (at.error - error) / run)
        made.append((at.density, error + slope * run))
    return made


def _between(points: Sequence[tuple[float, float]], density: float) -> float:
    for (d1, e1), (d2, e2) in pairwise(points):
        if density >= d2 - 1e-12:
            return e1 + (e2 - e1) * min(1.0, max(0.0, math.log(d1 / density) / math.log(d1 / d2)))
    return points[-1][1]
