"""Space: what a search may choose from: (scheme, block, density) for every layer, and what a choice costs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from espalier.errors import UnknownNameError
from espalier.mapping.candidates import find
from espalier.mapping.latency import LatencyModel, label_of
from espalier.mapping.trials import Trial
from espalier.sparsity import Entry, Plan, Scheme

DENSITIES = (0.7, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.07, 0.05)


@dataclass(frozen=True)
class Option:
    """One choice for one layer; label None is dense."""

    label: str | None
    density: float
    ms: float

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

    def _lower(self, site: int, k: int) -> int:
        """The option of the same scheme with the next lower density, 0 where there is none."""
        each, now = self.options[site], self.options[site][k]
        below = [j for j, o in enumerate(each) if o.label == now.label and o.density < now.density and o.ms < now.ms]
        return max(below, key=lambda j: each[j].density, default=0)


def space_of(
    model: LatencyModel, *, densities: Sequence[float] = DENSITIES, schemes: Sequence[str] | None = None
) -> Space:
    """Every candidate that the latency model knows, at several densities: also those that are slower than dense, since
    what can be chosen must not depend on a measurement (trials belong to it).

    schemes: labels to keep to. Raises UnknownNameError for one that no ladder has.
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
                    each.append(Option(label, density, model.layer_ms(site, label, density)))
        options.append(tuple(each))
    return Space(tuple(model.layers), tuple(options), model.fixed_ms)
