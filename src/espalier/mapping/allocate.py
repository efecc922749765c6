"""Allocate: one option for every site, such that several costs stay below their limits and little is damaged.

    argmin sum_s damage(s, o_s)   subject to   sum_s cost_k(s, o_s) + fixed_k <= limit_k   for every k

Solved greedily from the undamaged end: the next step is always the one that removes most of what is still too much
for its damage, and steps that turn out unnecessary are taken back. On the convex hull of the options that is the
Lagrangian solution, where the multipliers are the shares of each limit that are still missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from espalier.errors import PlanError

_TINY = 1e-12


@dataclass(frozen=True)
class Options:
    """What a site may become. costs: ``[options, kinds]``; damage: ``[options]``, the first option hurting least."""

    costs: np.ndarray
    damage: np.ndarray


class Unreachable(PlanError):
    """No choice of options stays below the limits.

    least: what can be had of each cost. why: what stands in the way, in words.
    """

    def __init__(self, kinds: Sequence[str], limits: np.ndarray, least: np.ndarray, why: str = "") -> None:
        self.least = dict(zip(kinds, least.tolist()))
        told = [f"{k}: asked {a:.4g}, reachable {b:.4g}" for k, a, b in zip(kinds, limits, least) if b > a]
        each = "each can be met alone, but not all of them at once: loosen one"
        super().__init__("the target is out of reach: " + "; ".join(told or [each]) + (f" ({why})" if why else ""))


def allocate(
    options: Mapping[str, Options], kinds: Sequence[str], fixed: np.ndarray, limits: np.ndarray
) -> dict[str, int]:
    """The option of every site, as an index into its options.

    fixed, limits: ``[kinds]``: what no choice changes, and the most that each cost may be. Raises Unreachable.

    >>> table = {"a": Options(np.array([[4.0], [1.0]]), np.array([0.0, 1.0]))}
    >>> allocate(table, ["latency_ms"], np.zeros(1), np.array([2.0]))
    {'a': 1}
    """
    sites = list(options)
    if not sites or not len(kinds):
        return dict.fromkeys(sites, 0)
    owner = np.repeat(np.arange(len(sites)), [len(options[s].damage) for s in sites])
    first = np.searchsorted(owner, np.arange(len(sites)))
    costs = np.concatenate([options[s].costs for s in sites])
    damage = np.concatenate([options[s].damage for s in sites])
    chosen = first.copy()
    while True:
        total = fixed + costs[chosen].sum(0)
        if (total <= limits * (1 + 1e-9)).all():
            break
        after = total - costs[chosen][owner] + costs
        gain = _excess(total, limits) - _excess(after, limits)
        price = np.maximum(damage - damage[chosen][owner], _TINY)
        worth = np.where(gain > _TINY, gain / price, -1.0)
        best = int(worth.argmax())
        if worth[best] <= 0:
            raise Unreachable(kinds, limits, _least(fixed, costs, first))
        chosen[owner[best]] = best
    _take_back(chosen, owner, costs, damage, fixed, limits)
    return {site: int(chosen[k] - first[k]) for k, site in enumerate(sites)}


def _take_back(
    chosen: np.ndarray, owner: np.ndarray, costs: np.ndarray, damage: np.ndarray, fixed: np.ndarray, limits: np.ndarray
) -> None:
    """Undo what the limits leave room for, most damage first (in place)."""
    while True:
        total = fixed + costs[chosen].sum(0)
        fits = (total - costs[chosen][owner] + costs <= limits).all(1)
        saved = np.where(fits, damage[chosen][owner] - damage, 0.0)
        best = int(saved.argmax())
        if saved[best] <= _TINY:
            return
        chosen[owner[best]] = best


def _excess(total: np.ndarray, limits: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, total / limits - 1).sum(-1)


def _least(fixed: np.ndarray, costs: np.ndarray, first: np.ndarray) -> np.ndarray:
    return fixed + np.minimum.reduceat(costs, first, axis=0).sum(0)
