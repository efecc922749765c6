"""Memory: no two living buffers overlap, and networks need little more than what lives at once."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.compiler.memory import Interval, allocate, in_place, lower_bound
from espalier.compiler.program import Operand, Step


def check_arena(intervals: list[Interval], offsets: dict[str, int], size: int) -> None:
    for k, a in enumerate(intervals):
        assert offsets[a.name] % 64 == 0 and offsets[a.name] + a.size_bytes <= size
        for b in intervals[:k]:
            apart = (
                offsets[a.name] + a.size_bytes <= offsets[b.name] or offsets[b.name] + b.size_bytes <= offsets[a.name]
            )
            assert apart or not a.meets(b) or not a.size_bytes or not b.size_bytes, f"{a} and {b} overlap"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 20), st.integers(0, 6)), max_size=25))
def test_no_two_living_buffers_overlap(rows: list[tuple[int, int, int]]) -> None:
    intervals = [Interval(str(k), size, first, first + length) for k, (size, first, length) in enumerate(rows)]
    arena = allocate(intervals)
    check_arena(intervals, dict(arena.offsets), arena.size_bytes)
    assert arena.size_bytes >= lower_bound(intervals)


def test_a_chain_needs_two_buffers_and_overlaps_are_found() -> None:
    chain = [Interval(str(k), 1024, k, k + 1) for k in range(10)]
    assert allocate(chain).size_bytes == 2048
    with pytest.raises(AssertionError, match="overlap"):
        check_arena(chain, dict.fromkeys(map(str, range(10)), 0), 2048)
    with pytest.raises(ValueError, match="unique"):
        allocate([chain[0], chain[0]])
    for wrong in (Interval("a", -1, 0, 1), Interval("a", 1, 1, 0)):
        with pytest.raises(ValueError, match="'a' cannot be"):
            allocate([wrong])


def network(seed: int) -> list[Interval]:
    """Buffers of a chain of layers with shortcuts, each halving the size now and then."""
    rng, size, buffers = random.Random(seed), 1 << 20, []
    for step in range(40):
        buffers.append(Interval(f"v{step}", size * rng.choice([1, 1, 2, 4]), step, step + rng.choice([1, 1, 1, 2, 3])))
        size //= 2 if rng.random() < 0.1 else 1
    return buffers


def test_networks_need_little_more_than_what_lives_at_once() -> None:
    shares = [allocate(network(seed)).size_bytes / lower_bound(network(seed)) for seed in range(100)]
    assert max(shares) < 1.2 and sum(shares) / len(shares) < 1.01


def _conv(number: int, a: str, out: str, residual: str = "", op: str = "conv", shift: int = 0) -> Step:
    sizes, strides = (1, 4, 1, 8), (0, 8, 8, 1)
    b = Operand("arena", 0, shift, sizes, strides, residual) if residual else Operand()
    x, y = (Operand("arena", 0, 0, sizes, strides, name) for name in (a, out))
    return Step(f"step {number}", op, y, x, b)


SIZES = dict.fromkeys("abcdef", 128)


def test_a_residual_that_nobody_reads_later_is_overwritten() -> None:
    steps = [_conv(0, "a", "b"), _conv(1, "b", "c", "a"), _conv(2, "c", "d"), _conv(3, "d", "e", "c")]
    assert in_place(steps, SIZES) == {"c": "a", "e": "a"}


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([_conv(0, "b", "c", "a"), _conv(1, "a", "d")], "it is read later"),
        ([_conv(0, "a", "c", "a")], "the window reads it too"),
        ([_conv(0, "b", "c", "a", shift=8)], "it lies elsewhere in its storage"),
        ([_conv(0, "b", "c", "a", op="linear")], "the kernel may write before it reads"),
        ([_conv(0, "b", "f", "a")], "another size"),
    ],
)
def test_residuals_that_must_stay(steps, why) -> None:
    assert in_place(steps, {**SIZES, "f": 256}) == {}, why
