"""Proposal: from targets to a plan by rule, with what is reachable, what is predicted, and what was measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from espalier.errors import PlanError
from espalier.graph.capture import ExampleInputs, capture
from espalier.graph.ir import Graph
from espalier.mapping.allocate import Unreachable
from espalier.mapping.clock import Clock, engine_clock
from espalier.mapping.damage import Damage, Harms
from espalier.mapping.latency import LatencyModel, latency_model
from espalier.mapping.probe import Probe
from espalier.mapping.rules import BETA, KINDS, Choice, Rule, plan_of, told
from espalier.mapping.sensitivity import Evaluate, quick_harms
from espalier.mapping.targets import Cost, Targets
from espalier.sparsity import Plan

RECOVERY = 0.1  # the share of the one-shot drop that retraining leaves: our reading, only used to predict
MARGIN = 0.015  # so much below the asked latency a plan is aimed: early is better than late
CLOSE = 0.02  # a measured latency this close to the aimed one is not corrected any further
NEAR, PATIENCE = 0.035, 6.0  # after so many seconds this close is close enough: within 5 % of what was asked
CORRECTIONS = 5
STRIDE = 1.5  # the most by which a correction moves while measurements lie on one side of the goal
DEAD = 0.5  # of the goal: what is measured below that has lost more than it was asked to, and brackets nothing


@dataclass(frozen=True)
class Proposal:
    """A plan and all that is known about it before any training.

    dense, least, predicted: costs of the unpruned network, the lowest of each alone, and those of the plan.
    predicted_drop: points of accuracy, a rough guess; None where nothing was evaluated.
    measured_ms, measured_speedup: of the plan with the masks that the network's weights ask for now, beside the dense
        network in one run.
    """

    plan: Plan
    targets: Targets
    dense: Cost
    least: Cost
    predicted: Cost
    predicted_drop: float | None = None
    measured_ms: float | None = None
    measured_speedup: float | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def limit_ms(self) -> float | None:
        """What the table should say of plans near this one, so that they take what was asked; None without a latency.

        Where the plan was measured, the table's error on it is taken for that on its neighbours.
        """
        asked = self.targets.limits(self.dense).get("latency_ms")
        if asked is None or self.measured_ms is None:
            return asked
        return asked * self.predicted.latency_ms / self.measured_ms

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """For a table: what, asked, reachable (from .. to), predicted, measured."""
        speed = self.dense.latency_ms / self.predicted.latency_ms
        most = self.dense.latency_ms / self.least.latency_ms
        measured = {"latency_ms": _or(self.measured_ms, "{:.4g}")}
        told = {"speedup": (f"1 .. {most:.2f}x", f"{speed:.2f}x", _or(self.measured_speedup, "{:.2f}x"))}
        for kind in KINDS:
            reach = f"{self.dense[kind]:.4g} .. {self.least[kind]:.4g}"
            told[kind] = reach, f"{self.predicted[kind]:.4g}", measured.get(kind, "")
        told["max_drop"] = "", _or(self.predicted_drop, "about {:.2f} points"), ""
        asked = {name: f"{value:g}" for name, value in self.targets.told().items()}
        return [(name, asked.get(name, ""), *values) for name, values in told.items()]


def propose(
    model: nn.Module | Graph,
    example_inputs: ExampleInputs | None,
    targets: Targets,
    *,
    evaluate: Evaluate | None = None,
    harms: Harms | None = None,
    threads: int = 1,
    beta: float = BETA,
    latency: LatencyModel | None = None,
    clock: Clock = engine_clock,
    verify: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Proposal:
    """A plan for a network by rule.

    evaluate: accuracy (points) and loss of the network as it is, on held-out data; without it layers are weighed by
        their projection errors. harms: what `espalier sensitivity` measured, instead.
    threads: that the latency is meant for. beta: see `rules`. latency: a model that stands already.
    verify: compile the plan and measure it beside the dense network; the allocation is corrected by what the table
        got wrong, until the asked latency is met to -4 .. 1 % (when that takes long, to -5 .. 2 %), or five times.
    tell: is told what is reachable before time is spent, and how far it is.

    Raises PlanError for targets that are empty or out of reach (saying what is, and why), or that need `evaluate`.
    """
    if targets.empty:
        raise PlanError("ask for something: speedup=3, latency_ms=5, size_mb=2, macs=0.3 or max_drop=0.5")
    if not (math.isfinite(beta) and beta >= 0):
        raise PlanError(f"beta is {beta}: how much slower than coarse pruning a small block may be, 0 or more")
    graph = model if isinstance(model, Graph) else capture(model, example_inputs)  # type: ignore[arg-type]
    sites = graph.sites()
    if not sites:
        raise PlanError("the network has no conv or linear weight that a plan could shape")
    latency = latency or latency_model(graph, threads=threads, clock=clock, tell=tell)
    held = sum(site.weights for site in sites.values())
    others = sum(graph.tensors[name].numel() for name in graph.parameters) - held
    rule = Rule(latency, Damage(graph.tensors, latency.layers, harms), beta=beta, others=max(0, others))
    dense, least = _cost(rule.total({s: Choice(None, 1.0, "") for s in sites})), _cost(rule.least())
    limits = targets.limits(dense)
    _check_reachable(rule, limits, dense, least, tell)
    if evaluate is not None and harms is None:
        if isinstance(model, Graph):
            raise PlanError("evaluating needs the network itself: give propose the module, not its graph")
        tell("how sensitive each layer is, on the held-out data")
        harms = quick_harms(graph, model, evaluate, [s for s in sites if latency.candidates(s)])
        rule = Rule(latency, Damage(graph.tensors, latency.layers, harms), beta=beta, others=rule.others)
    if limits:
        choices = rule.choose(limits)
    else:
        choices = _by_drop(rule, targets, dense, least)
    measured: tuple[float, float] | None = None
    if verify:
        choices, measured = _verified(graph, rule, choices, limits, clock, tell)
    drop = None if harms is None else _drop(rule, choices)
    if drop is not None and targets.max_drop is not None and drop > targets.max_drop:
        tell(f"about {drop:.2f} points may be lost, where {targets.max_drop:g} are allowed: a rough guess")
    tell(f"chosen: {told(list(choices.values()))}")
    return Proposal(
        plan_of(choices),
        targets,
        dense,
        least,
        _cost(rule.total(choices)),
        drop,
        measured[1] if measured else None,
        measured[0] / measured[1] if measured else None,
        choices,
    )


def plan(
    model: nn.Module,
    evaluate: Evaluate | None,
    example_inputs: ExampleInputs,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    size_mb: float | None = None,
    macs: float | None = None,
    max_drop: float | None = None,
    threads: int = 1,
    beta: float = BETA,
    tell: Callable[[str], None] = lambda _: None,
) -> Plan:
    """A plan by rule for what is asked; `propose` also says what is reachable, predicted and measured.

    evaluate: accuracy in points and loss of the network, or `scored(batches)`; None weighs layers by their weights.

    >>> plan = es.plan(model, es.scored(batches), example, speedup=3.0)
    >>> print(es.explain(plan, "layer1.0.conv1"))
    """
    targets = Targets(speedup, latency_ms, size_mb, macs, max_drop)
    return propose(model, example_inputs, targets, evaluate=evaluate, threads=threads, beta=beta, tell=tell).plan


def _check_reachable(
    rule: Rule, limits: Mapping[str, float], dense: Cost, least: Cost, tell: Callable[[str], None]
) -> None:
    """Tell what is reachable; raise Unreachable where a limit is not."""
    tell(
        f"reachable: {dense.latency_ms:.4g} .. {least.latency_ms:.4g} ms "
        f"(1 .. {dense.latency_ms / least.latency_ms:.2f}x), "
        f"{dense.size_mb:.4g} .. {least.size_mb:.4g} MB, {dense.macs:.4g} .. {least.macs:.4g} MACs"
    )
    if short := [kind for kind, limit in limits.items() if limit < least[kind]]:
        reachable = np.array([least[kind] for kind in limits])
        why = rule.bounds() if short[0] == "latency_ms" else ""
        raise Unreachable(list(limits), np.array(list(limits.values())), reachable, why)


def _verified(
    graph: Graph,
    rule: Rule,
    choices: dict[str, Choice],
    limits: Mapping[str, float],
    clock: Clock,
    tell: Callable[[str], None],
) -> tuple[dict[str, Choice], tuple[float, float]]:
    """Choices that were measured, and (dense, plan) milliseconds in one run, both in the model's terms.

    The machine may be slower now than when the table was made, so what counts is the ratio to the dense network.
    """
    probe, asked = Probe(graph, rule.model.layers), limits.get("latency_ms")
    goal = (1 - MARGIN) * (asked or 0.0)
    aim, seen, began = asked or 0.0, list[_Seen](), time.monotonic()
    dense = probe.variant({})
    round = rule.round(limits) if limits else 0  # what is released stays so when the table turns out too cautious
    for turn in range(CORRECTIONS + 1):
        schemes = plan_of(choices).resolve(graph.sites())
        whole, cut = clock([dense, probe.variant(schemes, own=True)], rule.model.threads)
        ms = rule.model.dense_ms * cut.whole_ms / whole.whole_ms
        if asked is None:
            return choices, (rule.model.dense_ms, ms)
        seen.append(_Seen(aim, ms, choices))
        close = CLOSE if time.monotonic() - began < PATIENCE else NEAR
        if abs(ms / goal - 1) <= close or turn == CORRECTIONS:
            break
        tell(f"measured {ms:.4g} ms where {asked:.4g} were asked: the allocation is corrected")
        aim, before = _next_aim(seen, goal), choices
        try:
            choices = rule.choose({**limits, "latency_ms": aim}, round)
        except Unreachable:
            break
        if choices == before:  # something else is asked that takes more than this
            break
    nearest = min(seen, key=lambda each: abs(each.ms / goal - 1))
    return nearest.choices, (rule.model.dense_ms, nearest.ms)


@dataclass(frozen=True)
class _Seen:
    """What the allocation was given as its limit, what was measured, and the choices."""

    aim: float
    ms: float
    choices: dict[str, Choice]


def _next_aim(seen: Sequence[_Seen], goal: float) -> float:
    """Between the nearest measurements on both sides of the goal; in proportion while there is one side only.

    Pruned in one shot a network may die of too few channels: such a measurement says little, and is stepped away from.
    """
    low = max((each for each in seen if DEAD * goal <= each.ms <= goal), key=lambda each: each.ms, default=None)
    high = min((each for each in seen if each.ms > goal), key=lambda each: each.ms, default=None)
    if low is None or high is None:
        last = low or high or seen[-1]
        return last.aim * min(STRIDE, max(1 / STRIDE, goal / last.ms))
    return low.aim + (high.aim - low.aim) * (goal - low.ms) / (high.ms - low.ms)


def _by_drop(rule: Rule, targets: Targets, dense: Cost, least: Cost) -> dict[str, Choice]:
    """The fastest choice whose predicted drop is allowed, by bisection."""
    if rule.damage.harms is None or targets.max_drop is None:
        raise PlanError("max_drop alone needs held-out data to be predicted: give evaluate, or ask for a speedup too")
    slow, fast = dense.latency_ms, least.latency_ms
    best = rule.choose({"latency_ms": slow * 1.0001})
    for _ in range(12):
        middle = (slow + fast) / 2
        try:
            tried = rule.choose({"latency_ms": middle})
        except Unreachable:
            fast = middle
            continue
        if _drop(rule, tried) <= targets.max_drop:
            best, slow = tried, middle
        else:
            fast = middle
    return best


def _drop(rule: Rule, choices: Mapping[str, Choice]) -> float:
    return RECOVERY * sum(rule.damage.points(s, c.candidate, c.density) for s, c in choices.items())


def _cost(values: np.ndarray) -> Cost:
    return Cost(**dict(zip(KINDS, values.tolist())))


def _or(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
