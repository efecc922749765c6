"""Size model: what a weight in a scheme takes to store, flags, signs and magnitudes included."""

from __future__ import annotations

import math

from espalier.graph.ir import Site
from espalier.sparsity.scheme import Rule, Scheme
from espalier.sparsity.snaps import BestPattern, KeepLargest

BITS = 32  # of a weight or a magnitude


def size_bytes(site: Site, chosen: Scheme | None, bits: int = BITS) -> float:
    """Bytes of the weight of `site` in the scheme (None: dense), before any entropy coding.

    A pruned group costs one flag, a kept weight `bits`; a unified block one magnitude, one sign for each weight that
    lives, and one flag (arXiv 2106.08301). A pattern or N:M costs the index of the choice for each group.

    >>> size_bytes(Site("w", "linear", (8, 8)), scheme("weight", 0.5))
    136.0
    """
    kept = float(site.weights)
    if chosen is None:
        return kept * bits / 8
    flags = tied = blocks = 0.0
    for rule in chosen.rules:
        count, size = _groups(site, rule)
        if rule.snap.ties:
            blocks, tied = kept / size * (1 - rule.free), kept * (1 - rule.free)
            flags += count
            continue
        snapped = (1 - rule.free) * kept / site.weights * count
        flags += count if 0 < rule.free < 1 else 0
        if isinstance(rule.snap, BestPattern):
            flags += snapped * math.log2(len(rule.snap.patterns))
            kept -= snapped * size * (1 - len(rule.snap.patterns[0]) / rule.snap.size)
        elif isinstance(rule.snap, KeepLargest):
            flags += snapped * math.log2(math.comb(round(size), min(rule.snap.keep, round(size))))
            kept -= snapped * size * (1 - rule.snap.keep / size)
        else:
            kept *= rule.free
    return ((kept - tied) * bits + blocks * bits + tied + flags) / 8


def _groups(site: Site, rule: Rule) -> tuple[int, float]:
    count = len(rule.structure.group_sizes(site.shape, site.conv_groups))  # type: ignore[arg-type]
    return count, site.weights / count
