"""Latency model: milliseconds of a network from a table of its layers, measured with the real engine.

    latency(plan) = sum over layers of t(layer shape, scheme, block, density, threads) + other steps + overhead per step

The table is built on demand for the shapes at hand (see `probe` for how), kept by machine, engine and compiler (see
`cache`), and interpolated so that less weights never take longer. Source: arXiv 2111.11581, whose latency model is such
a table; measuring inside the network is our reading.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from espalier.errors import PlanError, UnknownNameError
from espalier.graph.ir import Graph
from espalier.mapping import cache
from espalier.mapping.candidates import CHANNELS, GRID, Candidate, ladder
from espalier.mapping.clock import Clock, Profile, engine_clock
from espalier.mapping.layers import Layer, layers
from espalier.mapping.probe import Probe
from espalier.runtime.cache import Shelf
from espalier.sparsity import CATALOG, Scheme

Rows = dict[str, float]
PROGRAMS = 200_000_000  # weights that are held at once by variants of a network that take turns
DENSE_EVERY = 3  # slots, see `_batches`: what the dense network takes is a median of several


@dataclass(frozen=True)
class Curve:
    """Milliseconds over density, rising: straight between the measured points, level beyond them."""

    densities: np.ndarray
    ms: np.ndarray

    def __call__(self, density: float) -> float:
        return float(np.interp(density, self.densities, self.ms))


@dataclass(frozen=True)
class LatencyModel:
    """What a network takes, by layer.

    layers: site -> layer. dense: site -> milliseconds unpruned. curves: (site, label of a candidate) -> curve.
    rest_ms: the steps that belong to no site. overhead_ms: of the whole call beyond its steps. steps: how many
    there are.
    """

    layers: Mapping[str, Layer]
    dense: Mapping[str, float]
    curves: Mapping[tuple[str, str], Curve]
    rest_ms: float
    overhead_ms: float
    steps: int
    threads: int
    points: int = field(default=0, compare=False)

    @property
    def fixed_ms(self) -> float:
        """What no plan changes: other steps and overhead."""
        return self.rest_ms + self.overhead_ms

    @property
    def dense_ms(self) -> float:
        """The unpruned network."""
        return self.predict({})

    def candidates(self, site: str) -> tuple[str, ...]:
        """The labels that were measured at a site, smallest blocks first."""
        return tuple(label for name, label in self.curves if name == site)

    def layer_ms(self, site: str, label: str | None, density: float = 1.0) -> float:
        """One layer in a candidate (None: dense). Raises UnknownNameError for one that was not measured there."""
        if label is None:
            return self.dense[site]
        if (site, label) not in self.curves:
            raise UnknownNameError(f"measured scheme of {site}", label, self.candidates(site))
        return self.curves[site, label](density)

    def predict(self, schemes: Mapping[str, Scheme]) -> float:
        """Milliseconds of the network in a resolved plan (site -> scheme; sites left out are dense)."""
        total = self.fixed_ms
        for site in self.layers:
            chosen = schemes.get(site)
            total += self.layer_ms(site, None if chosen is None else label_of(chosen), chosen.density if chosen else 1)
        return total


@dataclass(frozen=True)
class CheckRow:
    """One plan: what the model says, and what the whole network took."""

    plan: str
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Signed share of the measurement: 0.05 is five per cent too much."""
        return self.predicted_ms / self.measured_ms - 1


def latency_model(
    graph: Graph,
    *,
    threads: int = 1,
    candidates: Callable[[Layer], Sequence[Candidate]] = ladder,
    clock: Clock = engine_clock,
    shelf: Shelf | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> LatencyModel:
    """The latency model of a network; what the cache lacks is measured now (ResNet-50 from nothing: about a
    minute).

    candidates: which schemes each layer is measured in. clock: who measures. tell: is told how far it is.
    Raises PlanError for less than one thread.

    >>> model = es.latency_model(es.capture(network, example), threads=1)
    >>> model.predict(es.Plan.uniform("block_punched", 0.2).resolve(graph.sites())) < model.dense_ms
    True
    """
    if threads < 1:
        raise PlanError(f"a latency is meant for 1 thread or more, got {threads}")
    shelf = shelf or cache.shelf(threads)
    found = layers(graph)
    ladders = {site: tuple(candidates(layer)) for site, layer in found.items()}
    rows = shelf.read()
    network = _network_key(graph, found)
    probe = Probe(graph, found)
    slots = _missing(found, ladders, rows)
    if not slots and f"{network} | rest" not in rows:
        slots = [_slot(found, ladders, 0, GRID[2:3])]
    seen: defaultdict[str, list[float]] = defaultdict(list)
    batches = _batches(slots, max(1, PROGRAMS // max(1, sum(layer.site.weights for layer in found.values()))))
    began = time.monotonic()
    for number, batch in enumerate(batches):
        left = f", about {(time.monotonic() - began) / number * (len(batches) - number):.0f} s left" if number else ""
        tell(f"measuring layers on the engine: {number + 1} of {len(batches)}{left}")
        profiles = clock([probe.variant({s: c.at(d) for s, (c, d) in wanted.items()}) for wanted in batch], threads)
        measured = _rows(probe, network, batch, profiles, seen)
        shelf.add(measured)
        rows = {**rows, **measured}
    return _model(found, ladders, rows, network, threads, probe.narrowing())


def check(
    model: LatencyModel,
    graph: Graph,
    plans: Mapping[str, Mapping[str, Scheme]],
    *,
    clock: Clock = engine_clock,
) -> list[CheckRow]:
    """The model against whole-network measurements of resolved plans (random weights, in turns, in one run).

    Plans that take channels from depthwise convs are masked as the network's own weights ask for, as when they were
    verified: masks of random weights would take them from the little that their neighbours keep.
    """
    probe = Probe(graph, model.layers)
    narrow = {name for name, layer in model.layers.items() if layer.site.depthwise}
    variants = [probe.variant(schemes, own=bool(narrow & set(schemes))) for schemes in plans.values()]
    profiles = clock(variants, model.threads)
    return [
        CheckRow(name, model.predict(schemes), profile.whole_ms)
        for (name, schemes), profile in zip(plans.items(), profiles)
    ]


def mean_error(rows: Sequence[CheckRow]) -> float:
    """The mean of the errors' sizes, 0.05 for five per cent."""
    return statistics.fmean(abs(row.error) for row in rows)


def label_of(chosen: Scheme) -> str:
    """The label of the candidate that a scheme is, defaults filled in."""
    options: dict[str, Any] = {}
    for part in chosen.name.split("+"):
        options |= CATALOG[part].options
    return Candidate(chosen.name, {**options, **chosen.options}).label


def rising(values: np.ndarray) -> np.ndarray:
    """The nearest non-decreasing sequence (pool adjacent violators).

    >>> rising(np.array([1.0, 3.0, 2.0]))
    array([1. , 2.5, 2.5])
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in blocks]) if blocks else values


# -- the table ------------------------------------------------------------------------------------

Wanted = dict[str, tuple[Candidate, float]]  # one variant of the network: site -> candidate and density


def densities(candidate: Candidate) -> tuple[float, ...]:
    """The densities at which a candidate is measured, highest first."""
    top = candidate.ceiling
    return (*((top,) if top < 1 else ()), *(d for d in GRID if d < top))


def _slot(found: Mapping[str, Layer], ladders: Mapping[str, Sequence[Candidate]], k: int, grid: Any) -> list[Wanted]:
    """Every layer in candidate `k` of its ladder, or its last one; one variant for each density of `grid`."""
    wanted = {s: ladders[s][min(k, len(ladders[s]) - 1)] for s in found if ladders[s]}
    return [{s: (c, min(density, c.ceiling)) for s, c in wanted.items()} for density in grid]


def _missing(
    found: Mapping[str, Layer], ladders: Mapping[str, Sequence[Candidate]], rows: Mapping[str, float]
) -> list[list[Wanted]]:
    """For each rung of the ladders the variants that measure what `rows` lack."""
    slots = []
    for k in range(max((len(each) for each in ladders.values()), default=0)):
        slots.append([w for w in _slot(found, ladders, k, GRID) if any(_key(found[s], *w[s]) not in rows for s in w)])
    return [slot for slot in slots if slot]


def _batches(slots: Sequence[Sequence[Wanted]], held: int) -> list[list[Wanted]]:
    """What is measured in turns, at most `held` variants at once; the dense network joins every `DENSE_EVERY` slots."""
    batches: list[list[Wanted]] = []
    for number, slot in enumerate(slots):
        variants = [*([{}] if number % DENSE_EVERY == 0 else []), *slot]
        batches += [variants[k : k + held] for k in range(0, len(variants), held)]
    return batches


def _rows(
    probe: Probe,
    network: str,
    batch: Sequence[Wanted],
    profiles: Sequence[Profile],
    seen: defaultdict[str, list[float]],
) -> Rows:
    """Table rows of a batch, the medians of what was `seen` so far: of equal layers, and of what every batch holds."""
    # Steps and whole calls are measured apart, and lower quartiles do not add up: what a call took is shared out over
    # its steps, except for its own overhead, which is taken from the program where least is left over.
    overhead = max(0.0, min(profile.whole_ms - sum(profile.steps.values()) for profile in profiles))
    for wanted, profile in zip(batch, profiles):
        spent, other = probe.attribute(profile)
        longer = (profile.whole_ms - overhead) / (sum(profile.steps.values()) or 1.0)
        for site, ms in spent.items():
            seen[_key(probe.layers[site], *wanted.get(site, (None, 1.0)))].append(ms * longer)
        seen[f"{network} | rest"].append(other * longer)
        seen[f"{network} | steps"].append(float(len(profile.steps)))
    seen[f"{network} | overhead"].append(overhead)
    return {key: statistics.median(values) for key, values in seen.items()}


def _key(layer: Layer, candidate: Candidate | None, density: float) -> str:
    return f"{layer.key} | {candidate.label if candidate else 'dense'} | {density:g}"


def _network_key(graph: Graph, found: Mapping[str, Layer]) -> str:
    """The network's shape in one word: its ops in order, and the shapes of their results."""
    text = repr([(n.op, [graph.values[o].shape for o in n.outputs]) for n in graph.nodes])
    text += repr([layer.key for layer in found.values()])
    return "network " + hashlib.sha256(text.encode()).hexdigest()[:16]


def _model(
    found: Mapping[str, Layer],
    ladders: Mapping[str, Sequence[Candidate]],
    rows: Mapping[str, float],
    network: str,
    threads: int,
    narrowing: Sequence[str],
) -> LatencyModel:
    dense = {site: rows.get(_key(layer, None, 1.0), 0.0) for site, layer in found.items()}
    curves = {}
    for site, each in ladders.items():
        for candidate in each:
            points = [(d, rows[_key(found[site], candidate, d)]) for d in densities(candidate)][::-1]
            if candidate.ceiling == 1:
                points += _towards_dense(points, dense[site])
            at, ms = np.array(points).T
            curves[site, candidate.label] = Curve(at, rising(ms))
    for site in narrowing:  # each channel is a conv of its own: time goes in proportion to how many there are
        curves[site, CHANNELS.label] = Curve(np.array([0.0, 1.0]), np.array([0.0, dense[site]]))
    return LatencyModel(
        found,
        dense,
        curves,
        rows.get(f"{network} | rest", 0.0),
        rows.get(f"{network} | overhead", 0.0),
        int(rows.get(f"{network} | steps", 0)),
        threads,
        sum(1 for key in rows if not key.startswith("network")),
    )


def _towards_dense(points: Sequence[tuple[float, float]], dense_ms: float) -> list[tuple[float, float]]:
    """What comes above the measured points: time goes on rising with density as it did, and ends at that of dense.

    From where the line would rise above it, the compiler stores the layer dense.
    """
    (before, faster), (last, slower) = points[-2:]
    slope = (slower - faster) / (last - before)
    meets = last + (dense_ms - slower) / slope if slope > 0 and dense_ms > slower else 1.0
    return [*([(meets, dense_ms)] if meets < 1 else []), (1.0, dense_ms)]
