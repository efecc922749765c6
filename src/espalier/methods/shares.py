"""Shares: how many groups every rule is to leave alive, by its own density or by one threshold for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from espalier.methods.targets import Target

HALVINGS = 40


def shares(targets: Sequence[Target], norms: Mapping[str, Tensor], density: float | None) -> dict[str, float | None]:
    """lane -> the share of its groups that lives; None where nothing says it, so that the method finds it.

    A rule with a density keeps to it. The others share one threshold on their norms, such that all targets together
    keep `density` of their weights: layers whose norms differ most lose most. norms: lane -> ``[groups]``, in relation
    to the root mean square in the layer; lanes are named by ``Lane.key("")``.

    >>> lanes = targets(capture(nn.Linear(4, 2), x), {"weight": scheme("weight")})[0]
    >>> shares([lanes], {"weight/0": torch.arange(8.0)}, 0.5)
    {'weight/0': 0.5}
    """
    lanes = [lane for target in targets for lane in target.lanes()]
    made: dict[str, float | None] = {lane.key(""): None if lane.open else lane.rule.free for lane in lanes}
    open_lanes = [lane for lane in lanes if lane.open]
    if density is None or not open_lanes:
        return made
    ordered = {lane.key(""): norms[lane.key("")].detach().float().cpu().sort().values for lane in open_lanes}
    low, high = 0.0, max(float(values[-1]) for values in ordered.values())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _kept(targets, {**made, **_alive(ordered, middle)}) > density:
            low = middle
        else:
            high = middle
    return {**made, **_alive(ordered, high)}


def _alive(ordered: Mapping[str, Tensor], threshold: float) -> dict[str, float]:
    """The share of every lane above the threshold: one group at least."""
    return {
        key: max(1, len(values) - int(torch.searchsorted(values, threshold))) / len(values)
        for key, values in ordered.items()
    }


def _kept(targets: Sequence[Target], made: Mapping[str, float | None]) -> float:
    """The share of all weights that lives, were the rules of a target independent."""
    kept = total = 0.0
    for target in targets:
        part = float(target.weight.numel())
        total += part
        for lane in target.lanes():
            if lane.prunes:
                part *= made[lane.key("")] or 1.0
        kept += part
    return kept / max(1.0, total)
