"""Formats: unpack(pack(w)) == w, at the edges of every block height."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.compiler.formats import HEIGHTS, RowBlocks, explain, pack, unpack


def matrix(rows: int, columns: int, density: float, block: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    alive = np.repeat(rng.random((-(-rows // block), columns)) < density, block, 0)[:rows]
    return (rng.standard_normal((rows, columns)) * alive).astype(np.float32)


def check_packed(w: np.ndarray, blocks: RowBlocks) -> None:
    assert np.array_equal(unpack(blocks), w)
    assert sorted(blocks.row_order[blocks.row_order >= 0].tolist()) == list(range(len(w)))
    assert blocks.values.shape == (len(blocks.columns), blocks.height)
    assert blocks.offsets[0] == 0 and blocks.offsets[-1] == len(blocks.columns)


@pytest.mark.parametrize("height", [*HEIGHTS, None])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_packing_at_the_edges_of_a_block(height: int | None, density: float, off: int) -> None:
    w = matrix(max(1, 2 * (height or 8) + off), 37, density, 4, 3)
    check_packed(w, pack(w, height))
    w[:] = 0
    w[-1, 5] = 2.0  # one survivor
    check_packed(w, pack(w, height))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.floats(0, 1), st.integers(1, 9), st.integers(0, 999))
def test_packing_any_matrix(rows: int, columns: int, density: float, block: int, seed: int) -> None:
    w = matrix(rows, columns, density, block, seed)
    check_packed(w, pack(w))


def test_equal_rows_are_brought_together() -> None:
    w = matrix(64, 200, 0.1, 8, 0)
    shuffled = w[np.random.default_rng(1).permutation(64)]
    blocks = pack(shuffled)
    assert blocks.height == 8 and blocks.stored == np.count_nonzero(w)
    assert "8 rows" in explain(blocks)


def test_unstructured_weights_are_not_padded() -> None:
    w = matrix(64, 400, 0.05, 1, 0)
    assert pack(w).height == 1


@pytest.mark.parametrize("height", [4, 8])
def test_groups_that_fill_no_block_stay_whole(height: int) -> None:
    w = matrix(30 * height, 200, 0.1, height, 0)
    cut = w[np.arange(len(w)) % height > 0]  # one row of each group was removed
    blocks = pack(cut[np.random.default_rng(1).permutation(len(cut))])
    assert blocks.height == height and blocks.stored == np.count_nonzero(w[::height]) * height


def test_nearly_equal_rows_are_brought_together() -> None:
    w = matrix(256, 400, 0.1, 8, 0)
    w *= np.random.default_rng(1).random(w.shape) > 0.02
    blocks = pack(w[np.random.default_rng(2).permutation(256)])
    assert blocks.height == 8 and blocks.stored < 1.05 * np.count_nonzero(w)


def test_rows_of_zeros_fill_the_holes() -> None:
    w = matrix(64, 200, 0.1, 8, 0)
    w[5::8] = 0
    blocks = pack(w)
    assert (blocks.height, blocks.blocks) == (8, 8) and not np.any(blocks.row_order < 0)
    check_packed(w, blocks)


def test_the_height_is_the_cheapest() -> None:
    for block, density in [(1, 0.1), (2, 0.1), (4, 0.3), (8, 0.05), (16, 0.2), (1, 1.0)]:
        w = matrix(67, 300, density, block, 4)
        assert pack(w).cost == min(pack(w, height).cost for height in HEIGHTS)
    assert "blocks of 2 would cost 1.35x" in explain(pack(matrix(64, 300, 0.1, 4, 0)))


def test_zeros_of_either_sign_are_zeros() -> None:
    w = np.array([[-0.0, 1], [np.nan, np.inf]], np.float32)
    assert np.array_equal(unpack(pack(w, 1)), w, equal_nan=True) and pack(w, 1).stored == 3
    for shape in [(0, 3), (3, 0), (0, 0)]:
        assert unpack(pack(np.zeros(shape, np.float32))).shape == shape


@pytest.mark.parametrize(("block", "density"), [(8, 0.1), (4, 0.1), (1, 0.1), (1, 1.1)])
def test_a_whole_resnet50_packs_in_two_seconds(block: int, density: float) -> None:
    shapes, inputs = [(64, 147), (1000, 2048)], 64
    for planes, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(count):
            shapes += [(planes, inputs), (planes, planes * 9), (planes * 4, planes)]
            inputs = planes * 4
    weights = [matrix(rows, columns, density, block, 0) for rows, columns in shapes]

    def seconds(work: Callable[[np.ndarray], object]) -> float:
        start = time.thread_time()  # others may use the machine too
        for w in weights:
            work(w)
        return time.thread_time() - start

    slow_machine = 3 * seconds(lambda w: np.argsort(w, axis=None, kind="stable"))
    assert seconds(pack) < max(2.0, slow_machine)


def test_what_cannot_be_packed_is_said() -> None:
    with pytest.raises(ValueError, match="no kernel has blocks of 3 rows"):
        pack(np.zeros((3, 3), np.float32), 3)
    with pytest.raises(ValueError, match="two dimensions"):
        pack(np.zeros(3, np.float32))


def test_a_packing_that_loses_a_weight_is_found() -> None:
    w = matrix(9, 9, 0.5, 1, 0)
    blocks = pack(w)
    blocks.values[0, 0] += 1
    with pytest.raises(AssertionError):
        check_packed(w, blocks)
