"""Memory: one arena for all activations, reused as soon as nobody reads them any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from espalier.compiler.program import Step


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
    """Places for buffers such that no two that live at the same time overlap, in the smallest of some greedy arenas.

    Each is placed into the tightest gap among those already there that live at the same time, in each order of ORDERS;
    the smallest arena wins. The problem is NP-hard (dynamic storage allocation); `lower_bound` says how far off it is.
    Raises ValueError for a name that stands twice, a size below zero, or a life that ends before it begins.

    >>> allocate([Interval("a", 64, 0, 1), Interval("b", 64, 1, 2), Interval("c", 64, 2, 3)]).size_bytes
    128
    """
    if len({i.name for i in intervals}) != len(intervals):
        raise ValueError("intervals need unique names")
    for i in intervals:
        if i.size_bytes < 0 or i.last_step < i.first_step:
            raise ValueError(
                f"buffer {i.name!r} cannot be: {i.size_bytes} bytes, steps {i.first_step} to {i.last_step}"
            )
    arenas, least = [], lower_bound(intervals)
    for order in ORDERS:
        arenas.append(_placed(sorted(intervals, key=order), align))
        if arenas[-1].size_bytes <= least:
            break
    return min(arenas, key=lambda arena: arena.size_bytes)


def in_place(steps: Sequence[Step], sizes: Mapping[str, int]) -> dict[str, str]:
    """storage -> the storage that it may share: sums with a residual that nobody reads any more are written over it.

    The steps that write the first must be the only readers of the second from then on, at the same places. sizes: of
    each storage, in bytes.
    """
    uses: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for name in {o.storage for o in (step.out, step.a, step.b) if o.storage}:
            uses.setdefault(name, []).append(number)
    renamed: dict[str, str] = {}
    for step in steps:
        own, other = step.out.storage, step.b.storage
        if step.op not in IN_PLACE or not own or not other or own in renamed or own == other:
            continue
        later = [steps[number] for number in uses[other] if number >= uses[own][0]]
        if sizes[own] == sizes[other] and all(_over_residual(s, own, other) for s in later):
            renamed[own] = renamed.get(other, other)
    return renamed


IN_PLACE = ("conv", "winograd_out")  # they read a residual where they write, and before


def _over_residual(step: Step, own: str, other: str) -> bool:
    """Whether the step reads `other` only as a residual, where it writes `own`."""
    x, y = step.out, step.b
    same = (x.offset, x.sizes, x.strides) == (y.offset, y.sizes, y.strides)
    return (x.storage, y.storage) == (own, other) and step.a.storage != other and step.op in IN_PLACE and same


# Which buffer is placed first. Mostly the first order is best already.
ORDERS: tuple[Callable[[Interval], tuple[int, ...]], ...] = (
    lambda i: (-i.size_bytes, i.first_step),
    lambda i: (-i.size_bytes * (i.last_step - i.first_step + 1), i.first_step),
    lambda i: (i.first_step - i.last_step, -i.size_bytes),
    lambda i: (i.first_step, -i.size_bytes),
)


def _placed(intervals: Sequence[Interval], align: int) -> Arena:
    """One after another, each in the tightest gap."""
    placed: list[tuple[int, int, Interval]] = []
    for interval in intervals:
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
    """The most bytes that live at one step: no arena can be smaller. (They only grow where a buffer begins.)"""
    steps = {i.first_step for i in intervals}
    return max((sum(i.size_bytes for i in intervals if i.first_step <= s <= i.last_step) for s in steps), default=0)
