"""Size model: what a weight in a scheme takes to store, flags, signs and magnitudes included."""

from __future__ import annotations

import math
from functools import cache

import torch

from espalier.graph.ir import Site
from espalier.sparsity.scheme import Rule, Scheme
from espalier.sparsity.snaps import BestPattern, KeepLargest, Snap
from espalier.sparsity.structures import Structure

BITS = 32  # of a weight or a magnitude


def size_bytes(site: Site, chosen: Scheme | None, bits: int = BITS) -> float:
    """Bytes of the weight of `site` in the scheme (None: dense), before any entropy coding.

    A pruned group costs one flag, a kept weight `bits`; a unified block one magnitude, one sign for each weight that
    lives, and one flag (arXiv 2106.08301). A pattern or N:M costs the index of the choice for each group. How many
    blocks hold a weight that lives is what chance makes of it, were the pruned groups drawn at random.

    >>> size_bytes(Site("w", "linear", (8, 8)), scheme("weight", 0.5))
    136.0
    """
    kept = float(site.weights)
    if chosen is None:
        return kept * bits / 8
    flags = tied = blocks = 0.0
    for r, rule in enumerate(chosen.rules):
        count, size = _groups(site, rule)
        if rule.snap.ties:
            living = math.prod(_held(site, rule, other) for other in chosen.rules[:r])
            blocks, tied = count * living * (1 - rule.free), kept * (1 - rule.free)
            flags += count
            continue
        snapped = (1 - rule.free) * kept / site.weights * count
        flags += count if 0 < rule.free < 1 else 0
        if isinstance(rule.snap, BestPattern):
            flags += snapped * math.log2(len(rule.snap.patterns))
        elif isinstance(rule.snap, KeepLargest):
            flags += snapped * math.log2(math.comb(round(size), min(rule.snap.keep, round(size))))
        kept -= (1 - rule.free) * kept * (1 - _left(rule.snap, size))
    return ((kept - tied) * bits + blocks * bits + tied + flags) / 8


def _groups(site: Site, rule: Rule) -> tuple[int, float]:
    count = len(rule.structure.group_sizes(site.shape, site.conv_groups))  # type: ignore[arg-type]
    return count, site.weights / count


def _left(snap: Snap, size: float) -> float:
    """The share of a snapped group's weights that stays."""
    if isinstance(snap, BestPattern):
        return len(snap.patterns[0]) / snap.size
    return snap.keep / size if isinstance(snap, KeepLargest) else 0.0


def _held(site: Site, ties: Rule, other: Rule) -> float:
    """The share of tied blocks in which another rule leaves a weight alive."""
    left = _left(other.snap, _groups(site, other)[1])
    if left:  # in single weights
        return float(1 - ((1 - other.free) * (1 - left)) ** _groups(site, ties)[1])
    keys = [(s.pattern, tuple(s.blocks.items())) for s in (ties.structure, other.structure)]
    return float(1 - (1 - other.free) ** _touched(*keys, torch.Size(site.shape), site.conv_groups))


_Key = tuple[str, tuple[tuple[str, int], ...]]


@cache
def _touched(ties: _Key, other: _Key, shape: torch.Size, conv_groups: int) -> float:
    """How many groups of the other structure a tied block lies in, in the mean."""
    blocks, groups = (Structure(pattern, dict(sizes)) for pattern, sizes in (ties, other))
    numbers = torch.arange(1, 1 + len(groups.group_sizes(shape, conv_groups)))
    rows = blocks.groups(groups.spread(numbers, shape, conv_groups), conv_groups).sort(1).values
    new = torch.cat([rows[:, :1] > 0, rows[:, 1:] > rows[:, :-1]], 1)  # 0 is padding
    return float(new.sum(1).float().mean())
