"""Memory: one arena for all activations, reused as soon as nobody reads them any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A buffer that lives from step `first_step` to step `last_step`, both included."""

    name: str
    size_bytes: int
    first_step: int
    last_step: int

    def meets(self, other: Interval) -> bool:
        """Are both alive at some step?"""
        return self.first_step <= other.last_step and other.first_step <= self.last_step


@dataclass(frozen=True)
class Arena:
    """Where every buffer lies, and how large the whole is, in bytes."""

    offsets: Mapping[str, int]
    size_bytes: int


def allocate(intervals: Sequence[Interval], align: int = 64) -> Arena:
    """Places for buffers such that no two that live at the same time overlap; large ones first, each in the best gap.

    Raises ValueError for a name that stands twice or a size below zero.
    """
    if len({i.name for i in intervals}) != len(intervals) or any(i.size_bytes < 0 for i in intervals):
        raise ValueError("intervals need unique names and sizes from 0")
    placed: list[tuple[int, int, Interval]] = []
    for interval in sorted(intervals, key=lambda i: (-i.size_bytes, i.first_step)):
        size = -(-interval.size_bytes // align) * align
        busy = sorted((start, end) for start, end, other in placed if other.meets(interval))
        best, gap, cursor = None, None, 0
        for start, end in busy:
            room = start - cursor
            if room >= size and (gap is None or room < gap):
                best, gap = cursor, room
            cursor = max(cursor, end)
        start = cursor if best is None else best
        placed.append((start, start + size, interval))
    return Arena({i.name: start for start, _, i in placed}, max((end for _, end, _ in placed), default=0))


def lower_bound(intervals: Sequence[Interval]) -> int:
    """The most bytes that live at one step: no arena can be smaller."""
    steps = range(max((i.last_step for i in intervals), default=-1) + 1)
    return max((sum(i.size_bytes for i in intervals if i.first_step <= s <= i.last_step) for s in steps), default=0)
