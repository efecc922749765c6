"""Uniform mapping: one scheme for a whole network from one density, without training or measuring."""

from __future__ import annotations

import math
from typing import Any

from espalier.errors import PlanError, SchemeError
from espalier.graph.ir import Graph, Site
from espalier.mapping.layers import layers
from espalier.sparsity import CATALOG, Entry, Plan, Scheme, scheme, unfit

SMALL_SHARE = 0.01  # a layer with less of the network's weights is spared: it gains little and hurts much


def uniform(graph: Graph, density: float, name: str = "filter+column", **options: Any) -> Plan:
    """One scheme everywhere such that the network keeps `density` of its conv and linear weights.

    Spared: depthwise convs, layers that cannot take the scheme (both stay dense), layers that read the network's input
    and layers with under 1 % of the weights (both keep the square root of `density`). The layer that makes the
    network's output never loses filters: they are the answers; its filter rules become column rules. The remaining
    layers get the one density that makes the total come out.

    Raises PlanError when the spared layers alone hold more than `density` allows, naming what is reachable.
    """
    if not 0 < density <= 1:
        raise SchemeError(f"density must lie above 0 and at most 1, got {density}")
    sites = graph.sites()
    if not sites:
        raise PlanError("the network has no conv or linear weight that a scheme could shape")
    trial = scheme(name, **options) if _fixed(name) else scheme(name, min(density, _own(name, options)), **options)
    found = layers(graph)
    names = {s: _without_filters(name) if found[s].answers else name for s in sites}
    dense = {s for s, site in sites.items() if site.depthwise or unfit(trial, site)}
    total = sum(site.weights for site in sites.values())
    gentle = {
        s
        for s, site in sites.items()
        if s not in dense and (site.weights < SMALL_SHARE * total or found[s].reads_input)
    }
    if _fixed(name):
        chosen: dict[str, Scheme | None] = {s: None if s in dense else trial for s in sites}
    else:
        shared = _solve(sites, dense, gentle, density)
        if shared < density / 2:  # sparing the small layers would starve the others: spare none
            gentle, shared = set(), _solve(sites, dense, set(), density)
        if shared <= 0:
            least = sum(sites[s].weights for s in dense) / total
            raise PlanError(
                f"density {density:.4g} cannot be reached with {name}: the layers that cannot take it hold {least:.4g} "
                f"of all weights. Ask for more than {least:.4g}, or give a plan that names every layer"
            )
        chosen = {
            s: None if s in dense else _at(names[s], math.sqrt(density) if s in gentle else shared, options)
            for s in sites
        }
    return Plan(tuple(Entry(site, made) for site, made in chosen.items()))


def _at(name: str, density: float, options: dict[str, Any]) -> Scheme:
    rows = name.split("+")
    known = {o for row in rows for o in CATALOG[row].options} | {
        f"{row}.{o}" for row in rows for o in CATALOG[row].options
    }
    return scheme(name, min(density, _own(name, options)), **{k: v for k, v in options.items() if k in known})


def _solve(sites: dict[str, Site], dense: set[str], gentle: set[str], density: float) -> float:
    """The density of the other layers that makes the whole network keep `density`; not above 0 where none can."""
    total = sum(site.weights for site in sites.values())
    spent = sum(sites[s].weights for s in dense) + math.sqrt(density) * sum(sites[s].weights for s in gentle)
    rest = total - sum(sites[s].weights for s in dense | gentle)
    return min(1.0, (density * total - spent) / rest) if rest else (density if dense else 0.0)


def _fixed(name: str) -> bool:
    return all(part in CATALOG and CATALOG[part].own is not None for part in name.split("+"))


def _own(name: str, options: dict[str, Any]) -> float:
    """The largest density that the scheme's parts leave possible."""
    own = 1.0
    for part in name.split("+"):
        if part in CATALOG and (fixed := CATALOG[part].own) is not None:
            own *= fixed({**CATALOG[part].options, **options})
    return own


def _without_filters(name: str) -> str:
    parts = [part for part in name.split("+") if part != "filter"]
    return "+".join(parts) or "column"
