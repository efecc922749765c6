"""Ramps: density, rho or lambda as a function of how far a run has come (0 at its start, 1 at its end)."""

from __future__ import annotations

import math
from collections.abc import Callable

from espalier.errors import UnknownNameError

Ramp = Callable[[float], float]  # progress 0..1 -> share of the way from start to end value, 0..1

RAMPS: dict[str, Ramp] = {
    "jump": lambda t: 1.0,
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,  # fast first, then ever slower (Zhu and Gupta, arXiv 1710.01878)
    "cosine": lambda t: 0.5 * (1 - math.cos(math.pi * t)),
}


def ramp(name: str, start: float, end: float, progress: float) -> float:
    """The value between `start` and `end` that the ramp has reached; `progress` is held within 0..1.

    >>> ramp("linear", 1.0, 0.0, 0.25)
    0.75
    """
    if name not in RAMPS:
        raise UnknownNameError("ramp", name, RAMPS)
    return start + (end - start) * RAMPS[name](min(1.0, max(0.0, progress)))


def staircase(start: float, end: float, stages: int, progress: float) -> float:
    """`stages` steps from `start` to `end`, each by the same factor: rho x 10 in four stages is (1e-4, 1e-1, 4)."""
    if stages == 1:
        return end
    stage = min(stages - 1, int(min(1.0, max(0.0, progress)) * stages))
    return start * (end / start) ** (stage / (stages - 1))
