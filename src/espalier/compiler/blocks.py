"""Which format a weight is stored in: the height of its row-blocks, chosen by looking at the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np

from espalier.compiler.formats import Arrangement, RowBlocks, arrange, pack, packed

# What one column of a block costs, in the time of one vector load: the height's arithmetic against its loads.
# Measured with benchmarks of the kernels on AVX-512; other instruction sets order the heights in the same way.
CONV_COST: Mapping[int, float] = {1: 1.0, 2: 1.3, 4: 2.1, 8: 3.6}
LINEAR_COST: Mapping[int, float] = {1: 1.0, 4: 1.6, 8: 2.1, 16: 2.9}
# A block's own work (bias, activation, stores) in columns' worth, per row.
_ROW_COST = {"conv": 2.0, "linear": 1.0}
_DENSE_FROM = 0.75  # above this density no format gains by skipping


@dataclass(frozen=True)
class Choice:
    """Row-blocks of a weight with the format's name and the reason for it.

    work: the estimated time as a share of that of the dense format.
    """

    blocks: RowBlocks
    format: str
    reason: str
    work: float = 1.0


# (matrix, op) -> the name of a format, one of `formats`, or the very blocks; None to leave it to the estimate.
Chooser = Callable[[np.ndarray, str], str | Choice | None]
_chooser: ContextVar[Chooser | None] = ContextVar("chooser", default=None)


@contextmanager
def choosing(chooser: Chooser | None) -> Iterator[None]:
    """While it lasts, `chooser` decides for all that this thread compiles: whoever can measure is above this room."""
    before = _chooser.set(chooser)
    try:
        yield
    finally:
        _chooser.reset(before)


def formats(matrix: np.ndarray, op: str) -> tuple[str, ...]:
    """The formats that `matrix` can be stored in: dense, and blocks of every height that is not too tall.

    >>> formats(np.eye(4, dtype=np.float32), "conv")
    ('dense/4', 'blocks/1', 'blocks/2', 'blocks/4')
    """
    costs = CONV_COST if op == "conv" else LINEAR_COST
    heights = [h for h in costs if h == 1 or h < 2 * matrix.shape[0]]
    return (f"dense/{max(heights)}", *[f"blocks/{h}" for h in heights])


def stored(matrix: np.ndarray, name: str, reason: str) -> Choice:
    """`matrix` in the format of that name."""
    kind, height = name.split("/")
    blocks = dense(matrix, int(height)) if kind == "dense" else pack(matrix, int(height))
    return Choice(blocks, name, reason)


def choose(matrix: np.ndarray, op: str) -> Choice:
    """Row-blocks of `matrix` [rows, columns] in the format that was chosen for it, or that should run fastest.

    op: "conv" (cost is arithmetic) or "linear" (cost is reading the weights).
    """
    chooser = _chooser.get()
    name = chooser(matrix, op) if chooser else None
    if name is None:
        return _estimated(matrix, op)
    if isinstance(name, Choice):
        return name
    density = np.count_nonzero(matrix) / max(1, matrix.size)
    return stored(matrix, name, f"density {density:.2f}, fastest of those measured here")


def _estimated(matrix: np.ndarray, op: str) -> Choice:
    """By the costs above."""
    costs = CONV_COST if op == "conv" else LINEAR_COST
    rows = matrix.shape[0]
    heights = [h for h in costs if h == 1 or h < 2 * rows]
    density = np.count_nonzero(matrix) / max(1, matrix.size)
    if density >= _DENSE_FROM:
        height = max(heights)
        return Choice(dense(matrix, height), f"dense/{height}", f"density {density:.2f}: skipping would not pay")
    tried = {each.height: each for each in arrange(matrix, heights)}
    estimates = {h: _cost(each, costs[h], _ROW_COST[op]) for h, each in tried.items()}
    dense_height = max(heights)
    dense_cost = _dense_cost(matrix.shape, dense_height, costs[dense_height], _ROW_COST[op])
    best = min(estimates, key=lambda h: (estimates[h], -h))
    if dense_cost < estimates[best]:
        worse = estimates[best] / dense_cost
        reason = f"density {density:.2f}, but rows share too few columns: blocks/{best} would take {worse:.1f}x as long"
        return Choice(dense(matrix, dense_height), f"dense/{dense_height}", reason)
    blocks = packed(matrix, tried[best])
    filled = np.count_nonzero(blocks.values) / max(1, blocks.values.size)
    gain = dense_cost / max(estimates[best], 1e-9)
    reason = f"density {density:.2f}, blocks {filled:.0%} full, {gain:.1f}x less work than dense"
    return Choice(blocks, f"blocks/{best}", reason, estimates[best] / max(dense_cost, 1e-9))


# Share of the arithmetic peak that dense kernels reach when all lanes count: with 1, 2 or 3 vectors along pixels (the
# fewer, the more loads of weights for a product), and with vectors along rows.
_ALONG_PIXELS, _ALONG_ROWS = (0.55, 0.8, 0.85), 0.92
_TURN = 30  # what turning the sums of vectors along rows costs, in columns
LANES_HEIGHT = 32  # of the blocks whose vectors run along the rows
_LANES_PIXELS = 256  # of a plane that they take


def choose_conv(matrices: list[np.ndarray], height: int, width: int, row_stride: int) -> Choice:
    """Row-blocks of a conv with one matrix per conv group that makes planes of `height` x `width` pixels.

    row_stride: floats from row to row of these planes. A dense weight over planes too small to fill vectors is stored
    in blocks whose vectors run along the rows instead.
    """
    if len(matrices) > 1:
        return choose_groups(matrices, "conv")
    choice = choose(matrices[0], "conv")
    if not choice.format.startswith("dense") or not _along_rows(matrices[0].shape, height, width, row_stride):
        return choice
    blocks = dense(matrices[0], LANES_HEIGHT)
    return Choice(blocks, f"dense/{LANES_HEIGHT}", f"{choice.reason}; vectors along rows")


def choose_dense_groups(matrices: list[np.ndarray], height: int, width: int) -> Choice:
    """Dense row-blocks of a block-diagonal matrix with these blocks, over `height` x `width` pixels without margins."""
    lanes = _along_rows(matrices[0].shape, height, width, width)
    block = LANES_HEIGHT if lanes else max(h for h in CONV_COST if h == 1 or h < 2 * len(matrices[0]))
    blocks = _joined([dense(m, block) for m in matrices])
    return Choice(blocks, f"winograd/{block}", "3 x 3 at stride 1: tiles of 4 x 4 pixels in 36 products")


def _along_rows(shape: tuple[int, ...], height: int, width: int, row_stride: int) -> bool:
    """Whether dense blocks of a matrix [rows, columns] run faster with vectors along their rows than along pixels."""
    rows, columns = shape
    if rows < LANES_HEIGHT or height * width > _LANES_PIXELS:
        return False
    run = (height - 1) * row_stride + width
    vectors, at_once = min((-(-run // 16), -(-run // 16)), (height * -(-width // 16), -(-width // 16)))
    along_pixels = _ALONG_PIXELS[min(at_once, 3) - 1] * height * width / (16 * vectors)
    filled = rows / (-(-rows // LANES_HEIGHT) * LANES_HEIGHT)
    return _ALONG_ROWS * filled * columns / (columns + _TURN) > along_pixels


def choose_groups(matrices: list[np.ndarray], op: str) -> Choice:
    """Row-blocks of a block-diagonal matrix with these blocks: a conv with several conv_groups."""
    if all(m.shape[0] == 1 for m in matrices):
        return _single_rows(matrices)
    stack = np.concatenate(matrices)  # one height for all groups: chosen as if they shared their columns
    height = choose(stack, op).blocks.height
    height = min(height, 1 << int(math.log2(max(1, matrices[0].shape[0]))))
    full = np.count_nonzero(stack) >= _DENSE_FROM * stack.size
    parts = [dense(m, height) if full else pack(m, height) for m in matrices]
    density = np.count_nonzero(stack) / max(1, stack.size)
    name = f"grouped {'dense' if full else 'blocks'}/{height}"
    return Choice(_joined(parts), name, f"{len(matrices)} conv groups, density {density:.2f}")


def _cost(arrangement: Arrangement, column: float, row: float) -> float:
    return arrangement.entries * column + arrangement.blocks * arrangement.height * row


def _dense_cost(shape: tuple[int, ...], height: int, column: float, row: float) -> float:
    count = -(-shape[0] // height)
    return count * (shape[1] * column + height * row)


def dense(matrix: np.ndarray, height: int) -> RowBlocks:
    """Row-blocks of `matrix` [rows, columns]: all columns in every one, rows in their order, the last one padded."""
    rows, columns = matrix.shape
    count = -(-rows // height)
    padded = np.zeros((count * height, columns), np.float32)
    padded[:rows] = matrix
    order = np.full(count * height, -1, np.int32)
    order[:rows] = np.arange(rows)
    return RowBlocks(
        rows=rows,
        columns_total=columns,
        height=height,
        row_order=order,
        offsets=(np.arange(count + 1) * columns).astype(np.int32),
        columns=np.tile(np.arange(columns, dtype=np.int32), count),
        values=np.ascontiguousarray(padded.reshape(count, height, columns).transpose(0, 2, 1)).reshape(-1, height),
    )


def _single_rows(matrices: list[np.ndarray]) -> Choice:
    """A depthwise weight: one row per group, its zeros left out."""
    table = np.concatenate(matrices)  # [channels, taps]
    rows, columns = np.nonzero(table)
    counts = np.bincount(rows, minlength=len(table))
    blocks = RowBlocks(
        rows=len(table),
        columns_total=table.size,
        height=1,
        row_order=np.arange(len(table), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        columns=(rows * table.shape[1] + columns).astype(np.int32),
        values=table[rows, columns].astype(np.float32).reshape(-1, 1),
    )
    density = len(rows) / max(1, table.size)
    return Choice(blocks, "depthwise/1", f"one window per channel, density {density:.2f}")


def _joined(parts: list[RowBlocks]) -> RowBlocks:
    orders, offsets, columns = [], [np.zeros(1, np.int64)], []
    rows = width = total = 0
    for part in parts:
        orders.append(np.where(part.row_order >= 0, part.row_order + rows, -1))
        offsets.append(part.offsets[1:].astype(np.int64) + total)
        columns.append(part.columns.astype(np.int64) + width)
        rows, width, total = rows + part.rows, width + part.columns_total, total + len(part.columns)
    return RowBlocks(
        rows=rows,
        columns_total=width,
        height=parts[0].height,
        row_order=np.concatenate(orders).astype(np.int32),
        offsets=np.concatenate(offsets).astype(np.int32),
        columns=np.concatenate(columns).astype(np.int32),
        values=np.concatenate([p.values for p in parts]),
    )
