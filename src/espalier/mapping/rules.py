"""Mapping by rule: regularity and block size for every layer from the latency table, densities under a target.

The decision list, in order; what it decided stands with every layer in the plan, and `explain` says it:

1. `SPARING`: a layer that no scheme makes faster stays dense. The layer that makes the network's output, those that
   read its input, tiny ones and depthwise convs stay dense while the target can do without. A depthwise conv then
   loses whole channels, which go from what feeds and what reads it too.
2. Regularity by type of layer: 3 x 3 and other windows: patterns or punched blocks; 1 x 1 and linear: block columns
   or punched blocks (`candidates.ladder`).
3. Block size: the *smallest* whose latency at the wanted density is within `beta` of coarse structured pruning (whole
   rows or columns), since small blocks keep accuracy.
4. Density: a global allocation under the target (`allocate`), by what each layer loses for each millisecond; not below
   `FLOOR`, and where that does not suffice not below `LOWEST`.

Source: arXiv 2111.11581 (rule-based mapping). Sparing, `beta`'s default and the allocation are our reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from espalier.errors import UnknownNameError
from espalier.mapping.allocate import Options, Unreachable, allocate
from espalier.mapping.candidates import Candidate, find
from espalier.mapping.damage import Damage
from espalier.mapping.latency import LatencyModel
from espalier.mapping.layers import Layer
from espalier.mapping.targets import site_bytes
from espalier.sparsity import Entry, Plan

BETA = 0.2
FLOOR = 0.05  # the lowest density given to a layer, while the target can do with it
LOWEST = 0.025  # and in the last round of releasing
RELEASED = 0.25  # a spared one that had to be released keeps this
NARROWED = 0.1  # and a depthwise one this: what no scheme but this makes faster
TINY = 0.01  # of the network's latency, and of its weights
DENSITIES = tuple(float(d) for d in np.geomspace(1.0, LOWEST, 50)[1:])
KINDS = ("latency_ms", "size_mb", "macs")


@dataclass(frozen=True)
class Spare:
    """A reason to leave a layer dense.

    release: the round in which it is given up when the target is not reached. floor: the density then kept at least.
    """

    name: str
    says: str
    applies: Callable[[Layer, LatencyModel], bool]
    release: int | None
    floor: float = RELEASED


def _tiny(layer: Layer, model: LatencyModel) -> bool:
    weights = sum(each.site.weights for each in model.layers.values())
    small = layer.site.weights < TINY * weights
    return small and model.dense[layer.site.name] < TINY * model.dense_ms


def _slow(layer: Layer, model: LatencyModel) -> bool:
    name = layer.site.name
    return all(model.layer_ms(name, c, FLOOR) >= model.dense[name] for c in model.candidates(name))


SPARING = (
    Spare("depthwise", "they have little to prune", lambda l, _: l.site.depthwise, 3, NARROWED),
    Spare("no gain", "no scheme makes it faster than dense", _slow, None),
    Spare("last", "the network's answers are sensitive", lambda l, _: l.answers, 2),
    Spare("first", "what reads the network's input is sensitive", lambda l, _: l.reads_input, 2),
    Spare("tiny", f"under {TINY:.0%} of the latency and of the weights", _tiny, 1),
)
ROUNDS = range(5)  # of releasing


@dataclass(frozen=True)
class Choice:
    """What the rule made of one site. candidate is None for dense; why: in words."""

    candidate: Candidate | None
    density: float
    why: str


class Rule:
    """The decision list for one network.

    >>> rule = Rule(model, Damage(graph.tensors, model.layers))
    >>> plan = plan_of(rule.choose({"latency_ms": 5.0}))
    """

    def __init__(self, model: LatencyModel, damage: Damage, *, beta: float = BETA, others: int = 0) -> None:
        """others: parameters of the network that no site holds, for its size."""
        self.model, self.damage, self.beta, self.others = model, damage, beta, others
        self._found: dict[int, dict[str, tuple[list[tuple[Candidate | None, float]], Options]]] = {}  # by round

    def spared(self, round: int = 0) -> dict[str, Spare]:
        """site -> why it stays dense, in a round of releasing (0: the first)."""
        found: dict[str, Spare] = {}
        for name, layer in self.model.layers.items():
            for spare in SPARING:
                if spare.applies(layer, self.model) and (spare.release is None or spare.release > round):
                    found.setdefault(name, spare)
        return found

    def block(self, site: str, density: float) -> Candidate:
        """Rule 3: the smallest block within `beta` of the fastest coarse scheme at this density."""
        fitting = [find(c) for c in self.model.candidates(site)]
        possible = [c for c in fitting if density <= c.ceiling + 1e-9]
        coarse = min(self._ms(site, c, density) for c in possible if c.coarse)
        return next(c for c in possible if self._ms(site, c, density) <= (1 + self.beta) * coarse)

    def costs(self, site: str, candidate: Candidate | None, density: float) -> list[float]:
        """Of one site in an option, in the order of KINDS."""
        where = self.model.layers[site].site
        ms = self.model.layer_ms(site, candidate.label if candidate else None, density)
        size = site_bytes(where, candidate.at(density) if candidate else None, density) / 1e6
        return [ms, size, density * where.macs]

    @property
    def fixed(self) -> np.ndarray:
        """Costs that no plan changes."""
        return np.array([self.model.fixed_ms, 4 * self.others / 1e6, 0.0])

    def total(self, choices: Mapping[str, Choice]) -> np.ndarray:
        """The network's costs in some choices, in the order of KINDS."""
        return self.fixed + np.sum([self.costs(s, c.candidate, c.density) for s, c in choices.items()], axis=0)

    def least(self) -> np.ndarray:
        """The lowest that each cost can be had, everything released."""
        options = self._options(len(ROUNDS) - 1)
        return self.fixed + np.sum([each.costs.min(0) for _, each in options.values()], axis=0)

    def bounds(self) -> str:
        """What the lowest latency is made of, in words: why it is not lower.

        >>> rule.bounds()
        '8.1 ms at least: 4.2 depthwise convs, 0.6 other steps and the call, 3.3 layers at their lowest density'
        """
        parts = {"depthwise convs": 0.0, "layers that no scheme makes faster": 0.0}
        parts |= {"other steps and the call": self.model.fixed_ms, "layers at their lowest density": 0.0}
        spared = self.spared(len(ROUNDS) - 1)
        for site, (_, options) in self._options(len(ROUNDS) - 1).items():
            held = "layers that no scheme makes faster" if site in spared else "layers at their lowest density"
            depthwise = self.model.layers[site].site.depthwise
            parts["depthwise convs" if depthwise else held] += float(options.costs[:, 0].min())
        told = ", ".join(f"{ms:.3g} {what}" for what, ms in parts.items() if ms > 0)
        return f"{sum(parts.values()):.3g} ms at least: {told}"

    def round(self, limits: Mapping[str, float]) -> int:
        """The first round of releasing in which the limits hold. Raises Unreachable."""
        return self._chosen(limits, 0)[0]

    def choose(self, limits: Mapping[str, float], round: int = 0) -> dict[str, Choice]:
        """A choice for every site, such that the limits (by name of KINDS) hold. Raises Unreachable.

        round: of releasing, to begin with.
        """
        return self._chosen(limits, round)[1]

    # -- inside ------------------------------------------------------------------------------------

    def _chosen(self, limits: Mapping[str, float], first: int) -> tuple[int, dict[str, Choice]]:
        """The round, and the choices."""
        at = [KINDS.index(kind) for kind in limits]
        bounds = np.array([limits[KINDS[k]] for k in at])
        for round in ROUNDS[first:]:
            options = self._options(round)
            table = {s: Options(each.costs[:, at], each.damage) for s, (_, each) in options.items()}
            try:
                picked = allocate(table, [KINDS[k] for k in at], self.fixed[at], bounds)
            except Unreachable:
                if round == ROUNDS[-1]:
                    raise
                continue
            spared, before = self.spared(round), self.spared(0)
            return round, {
                site: self._choice(site, *options[site][0][index], spared.get(site), before.get(site))
                for site, index in picked.items()
            }
        raise AssertionError("the last round raises or returns")

    def _ms(self, site: str, candidate: Candidate, density: float) -> float:
        return self.model.layer_ms(site, candidate.label, density)

    def _options(self, round: int) -> dict[str, tuple[list[tuple[Candidate | None, float]], Options]]:
        """What every site may become, dense first; found once."""
        if round not in self._found:
            self._found[round] = self._options_of(round)
        return self._found[round]

    def _options_of(self, round: int) -> dict[str, tuple[list[tuple[Candidate | None, float]], Options]]:
        spared, released = self.spared(round), self.spared(0)
        table = {}
        for site in self.model.layers:
            options: list[tuple[Candidate | None, float]] = [(None, 1.0)]
            if site not in spared:
                lowest = LOWEST if round == ROUNDS[-1] else FLOOR
                floor = released[site].floor if site in released else lowest
                options += [(self.block(site, d), d) for d in DENSITIES if d >= floor - 1e-9]
            costs = np.array([self.costs(site, *option) for option in options])
            damage = np.array([self.damage(site, *option) for option in options])
            table[site] = options, Options(costs, damage)
        return table

    def _choice(
        self, site: str, candidate: Candidate | None, density: float, spared: Spare | None, before: Spare | None
    ) -> Choice:
        if spared is not None:
            return Choice(None, 1.0, f"{spared.name}: {spared.says}")
        dense = self.model.dense[site]
        if candidate is None:
            return Choice(None, 1.0, f"density: its {dense:.4g} ms were not worth what pruning it would lose")
        coarse = [find(c) for c in self.model.candidates(site) if find(c).coarse]
        best = min(coarse, key=lambda c: self._ms(site, c, density))
        kind = "1 x 1 or linear" if self.model.layers[site].pointwise else "window"
        ours, theirs = self._ms(site, candidate, density), self._ms(site, best, density)
        if self.model.layers[site].site.depthwise:
            why = f"channels go, from what feeds and what reads them too ({ours:.4g} ms; dense {dense:.4g})"
        else:
            why = (
                f"{kind}: {candidate.label} is the smallest block within {self.beta:.0%} of {best.label} at density "
                f"{density:.3g} ({ours:.4g} against {theirs:.4g} ms; dense {dense:.4g})"
            )
        why += f"; density by allocation, relative error {self.damage.error(site, candidate, density):.3g}"
        if before is not None:
            why += f"; spared at first ({before.name}), then released"
        return Choice(candidate, density, why)


def plan_of(choices: Mapping[str, Choice]) -> Plan:
    """The plan of some choices, with the reasons."""
    made = [Entry(site, c.candidate.at(c.density) if c.candidate else None, why=c.why) for site, c in choices.items()]
    return Plan(tuple(made))


def explain(plan: Plan, site: str) -> str:
    """Why a site (or its module) has its scheme: what the decision list said, which also stands in the plan's file.

    Raises UnknownNameError for a site that no entry names.

    >>> print(es.explain(plan, "layer1.0.conv1"))  # doctest: +ELLIPSIS
    layer1.0.conv1.weight: block_punched m=4 n=1, density 0.21. window: ... is the smallest block within 20% of ...
    """
    entry = next((e for e in reversed(plan.entries) if e.matches(site) or e.matches(f"{site}.weight")), None)
    if entry is None:
        raise UnknownNameError("site of the plan", site, [e.match for e in plan.entries])
    if entry.scheme is None:
        what = "dense"
    else:
        options = "".join(f" {key}={value}" for key, value in entry.scheme.options.items())
        what = f"{entry.scheme.name}{options}, density {entry.scheme.density:.3g}"
    return f"{entry.match}: {what}. {entry.why or 'The plan gives no reason: it was made by hand or by one scheme'}"


def told(choices: Sequence[Choice]) -> str:
    """How many layers got what, in a line."""
    counts: dict[str, int] = {}
    for choice in choices:
        label = choice.candidate.label if choice.candidate else "dense"
        counts[label] = counts.get(label, 0) + 1
    return ", ".join(f"{count} x {label}" for label, count in counts.items())
