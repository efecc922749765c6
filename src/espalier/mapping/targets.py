"""Targets: what the user asks of a network, several things at once, in the units that they are asked in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from espalier.errors import PlanError
from espalier.graph.ir import Site
from espalier.sparsity import Scheme

VALUE_BYTES = 4  # fp32


@dataclass(frozen=True)
class Cost:
    """What a network costs in a plan.

    latency_ms: of one sample. size_mb: of its weights as stored, 10^6 bytes. macs: useful multiply-accumulates.
    """

    latency_ms: float
    size_mb: float
    macs: float

    def __getitem__(self, name: str) -> float:
        return {"latency_ms": self.latency_ms, "size_mb": self.size_mb, "macs": self.macs}[name]


@dataclass(frozen=True)
class Targets:
    """What is asked for; None where nothing is.

    speedup: times faster than the dense network on the same engine. latency_ms: of one sample, at most. size_mb: of the
    stored weights, 10^6 bytes, at most. macs: useful multiply-accumulates, at most; below 1 a share of the dense ones.
    max_drop: points of accuracy that may be lost.

    Raises PlanError for a target that is not a positive number.

    >>> Targets(speedup=3, macs=0.2).limits(Cost(30.0, 100.0, 4e9))
    {'latency_ms': 10.0, 'macs': 800000000.0}
    """

    speedup: float | None = None
    latency_ms: float | None = None
    size_mb: float | None = None
    macs: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = "0 or more" if name == "max_drop" else "above 0"
            bad = value is not None and not (
                math.isfinite(value) and (value > 0 or (name == "max_drop" and value == 0))
            )
            if bad:
                raise PlanError(f"the target {name} is {value}, expected a number {least}")
        if self.speedup is not None and self.speedup < 1:
            raise PlanError(f"a speedup of {self.speedup:g} would be slower than dense: ask for 1 or more")

    def limits(self, dense: Cost) -> dict[str, float]:
        """The most that each cost may be, for those that are limited."""
        asked = {
            "latency_ms": [self.latency_ms, dense.latency_ms / self.speedup if self.speedup else None],
            "size_mb": [self.size_mb],
            "macs": [self.macs * dense.macs if self.macs is not None and self.macs < 1 else self.macs],
        }
        given = {name: [v for v in values if v is not None] for name, values in asked.items()}
        return {name: float(min(values)) for name, values in given.items() if values}

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return all(value is None for value in asdict(self).values())

    def told(self) -> dict[str, float]:
        """What is asked for, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def size_mb(sites: Mapping[str, Site], schemes: Mapping[str, Scheme], others: int) -> float:
    """Stored size of a network in a plan: its non-zero weights, and for every group whether it lives.

    others: parameters that no site holds. The position of the living groups costs their entropy.
    """
    total = float(VALUE_BYTES * others)
    for name, site in sites.items():
        chosen = schemes.get(name)
        total += site_bytes(site, None if chosen is None else chosen, chosen.density if chosen else 1.0)
    return total / 1e6


def site_bytes(site: Site, chosen: Scheme | None, density: float) -> float:
    """Stored bytes of one site."""
    values = VALUE_BYTES * site.weights * density
    if chosen is None or density >= 1:
        return float(values)
    made = [(rule.structure, rule.free) for rule in chosen.rules]
    bits = sum(_groups(site, structure.blocks, structure.pattern) * _entropy(free) for structure, free in made)
    return values + bits / 8


def _groups(site: Site, blocks: Mapping[str, int], pattern: str) -> float:
    """How many groups a structure makes of the site, edges rounded down: enough for a size."""
    right = pattern.split("->")[1]
    inside = right[right.rindex("(") + 1 : right.rindex(")")] if right.rstrip().endswith(")") else right.split()[-1]
    rows, inputs = site.shape[0] // site.conv_groups, site.shape[1]
    window = [1, 1, *site.shape[2:]][-2:]
    axes = {"g": site.conv_groups, "o": rows, "i": inputs, "y": window[0], "x": window[1]}
    axes["k"] = inputs * window[0] * window[1]
    size = math.prod({**axes, **blocks}.get(letter, 1) for letter in inside.split())
    return site.weights / max(1, size)


def _entropy(p: float) -> float:
    return 0.0 if p <= 0 or p >= 1 else -p * math.log2(p) - (1 - p) * math.log2(1 - p)
