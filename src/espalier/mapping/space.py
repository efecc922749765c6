"""Space: what a search may choose from: (scheme, block, density) for every layer, and what a choice costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from espalier.errors import UnknownNameError
from espalier.mapping.candidates import find
from espalier.mapping.damage import Damage
from espalier.mapping.latency import LatencyModel, label_of
from espalier.mapping.rules import DENSITIES
from espalier.mapping.trials import Trial
from espalier.sparsity import Entry, Plan, Scheme


@dataclass(frozen=True)
class Option:
    """One choice for one layer; label None is dense. loses: its damage (see `damage`); None where nothing is known."""

    label: str | None
    density: float
    ms: float
    loses: float | None = None

    @property
    def damage(self) -> float:
        """What it loses; where nothing is known, its share of the weights."""
        return 1 - self.density if self.loses is None else self.loses

    def scheme(self) -> Scheme | None:
        """The scheme of this choice; None for dense."""
        return None if self.label is None else find(self.label).at(self.density)


@dataclass(frozen=True)
class Space:
    """sites: in the network's order; options: for each its choices, dense first. fixed_ms: what no choice changes."""

    sites: tuple[str, ...]
    options: tuple[tuple[Option, ...], ...]
    fixed_ms: float

    @property
    def name(self) -> str:
        """A digest of what can be chosen, not of how long it takes: trials belong to a space by it."""
        text = repr([(s, [(o.label, round(o.density, 6)) for o in each]) for s, each in zip(self.sites, self.options)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def latency_ms(self, picked: Sequence[int]) -> float:
        """The network's latency by the table."""
        return self.fixed_ms + sum(each[k].ms for each, k in zip(self.options, picked))

    def timed(self, trials: Iterable[Trial]) -> list[Trial]:
        """Trials of this space with the latencies of its table: they may have been made with another one."""
        return [replace(trial, latency_ms=self.latency_ms(trial.picked)) for trial in trials]

    def plan(self, picked: Sequence[int]) -> Plan:
        """The plan of a choice, an option's index for every site."""
        why = "search: part of the best trial found"
        return Plan(tuple(Entry(s, each[k].scheme(), why=why) for s, each, k in zip(self.sites, self.options, picked)))

    def nearest(self, schemes: Mapping[str, Scheme], limit_ms: float | None = None) -> list[int]:
        """The choice that comes closest to a resolved plan: same scheme where there is one, nearest density.

        limit_ms: what rounding added above it is taken back, by the smallest steps in density.
        """
        picked = []
        for site, each in zip(self.sites, self.options):
            wanted = schemes.get(site)
            same = [k for k, o in enumerate(each) if wanted is not None and o.label == label_of(wanted)]
            if wanted is None or not same:
                picked.append(0)
            else:
                target = wanted.density
                picked.append(min(same, key=lambda k: abs(each[k].density - target)))
        while limit_ms is not None and self.latency_ms(picked) > limit_ms:
            steps = [(self._lower(s, k), s) for s, k in enumerate(picked)]
            possible = [(self.options[s][picked[s]].density - self.options[s][k].density, s, k) for k, s in steps if k]
            if not possible:
                break
            _, at, lower = min(possible)
            picked[at] = lower
        return picked

    def fitted(self, picked: Sequence[int], limit_ms: float) -> tuple[int, ...]:
        """The choice with its schemes, brought to a latency: the densities of all layers go down step by step until it
        keeps to the limit, and up while it leaves room.

        So choices of schemes and of how densities relate are compared at one latency.
        """
        fit, limit_ms = list(picked), limit_ms * (1 - 1e-9)  # sums in another order round otherwise
        for step, down in ((self._lower, True), (self._higher, False)):
            total, moved = self.latency_ms(fit), True
            while moved:
                moved = False
                for site, k in enumerate(fit):
                    other = step(site, k)
                    after = total + self.options[site][other].ms - self.options[site][k].ms
                    if other and (total > limit_ms if down else after <= limit_ms):
                        fit[site], total, moved = other, after, True
        return tuple(fit)

    def _lower(self, site: int, k: int) -> int:
        """The option of the same scheme with the next lower density, 0 where there is none."""
        each, now = self.options[site], self.options[site][k]
        below = [j for j, o in enumerate(each) if o.label == now.label and o.density < now.density and o.ms < now.ms]
        return max(below, key=lambda j: each[j].density, default=0)

    def _higher(self, site: int, k: int) -> int:
        """The option of the same scheme with the next higher density, 0 where there is none."""
        each, now = self.options[site], self.options[site][k]
        above = [j for j, o in enumerate(each) if o.label == now.label and o.density > now.density]
        return min(above, key=lambda j: each[j].density, default=0)


def space_of(
    model: LatencyModel,
    damage: Damage | None = None,
    *,
    densities: Sequence[float] = DENSITIES,
    schemes: Sequence[str] | None = None,
) -> Space:
    """Every candidate that the latency model knows, at several densities: also those that are slower than dense, since
    what can be chosen must not depend on a measurement (trials belong to it).

    damage: of the network's weights, where a policy should begin with what loses least. densities: all that the rule
    may give by default. schemes: labels to keep to. Raises UnknownNameError for one that no ladder has.
    """
    for label in schemes or ():
        if label not in {known for _, known in model.curves}:
            raise UnknownNameError("measured scheme", label, {known for _, known in model.curves})
    options = []
    for site in model.layers:
        each = [Option(None, 1.0, model.dense[site])]
        for label in model.candidates(site):
            if schemes is None or label in schemes:
                top = find(label).ceiling
                for density in sorted({min(d, top) for d in densities}, reverse=True):
                    lost = None if damage is None else damage(site, find(label), density)
                    each.append(Option(label, density, model.layer_ms(site, label, density), lost))
        options.append(tuple(each))
    return Space(tuple(model.layers), tuple(options), model.fixed_ms)
