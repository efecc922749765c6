"""Templates: schemes whose density is still open, for every site that can take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from espalier.graph import Graph
from espalier.methods.targets import cuttable
from espalier.sparsity import CATALOG, Scheme, ceiling, scheme, unfit


@dataclass(frozen=True)
class Template:
    """A scheme but for its density: its name, and the options that belong to its parts."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loose(self) -> bool:
        """Its density can be chosen."""
        parts = [part for part in self.name.split("+") if part]
        return any(CATALOG[part].own is None and f"{part}.density" not in self.options for part in parts)

    @property
    def top(self) -> float:
        """The highest density below dense that it can have."""
        return ceiling(scheme(self.name, **self.options)) if self.name else 1.0

    def at(self, density: float | None) -> Scheme | None:
        """At a density, or at the nearest that it can have; None for dense."""
        if not self.name:
            return None
        made = scheme(self.name, **self.options)
        if density is not None and density >= 1 and not any(rule.snap.ties for rule in made.rules):
            return None
        return made if density is None or not self.loose else scheme(self.name, min(density, self.top), **self.options)

    def tied(self, block: tuple[int, int], free: float) -> Template:
        """Its ties in blocks of (rows, columns), the share `free` of them left alone."""
        return Template(self.name, {**self.options, "unify.r": block[0], "unify.c": block[1], "unify.free": free})

    def without(self, part: str, instead: str = "") -> Template:
        """Without one part and its options, or `instead` where nothing else is left."""
        name = "+".join(p for p in self.name.split("+") if p != part) or instead
        known = [o for p in name.split("+") if p for o in (*CATALOG[p].options, "density")]
        kept = {k: v for k, v in self.options.items() if "." not in k and k in known}
        return Template(name, kept | {k: v for k, v in self.options.items() if k.partition(".")[0] in name.split("+")})


def templates(graph: Graph, name: str, options: Mapping[str, Any]) -> dict[str, Template]:
    """The scheme of every site that can take it."""
    may, made = cuttable(graph), {}
    for site, facts in graph.sites().items():
        found = Template(name, options)
        trial = found.at(0.1)  # a wrong name or option is told here
        if site not in may and "filter" in name.split("+"):
            found = found.without("filter", "column")
            trial = found.at(0.1)
        trained = isinstance(graph.tensors[site], nn.Parameter)
        if trial is not None and trained and not facts.depthwise and unfit(trial, facts) is None:
            made[site] = found
    return made
