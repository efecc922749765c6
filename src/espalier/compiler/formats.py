"""Formats: how a sparse weight is stored. Row-blocks: runs of rows that share one set of columns.

Made by looking at the weights alone, so a network that anyone pruned with anything packs well: rows with equal column
sets are brought together (the order is kept beside them, and undone for free by writing each row where it belongs),
and a block multiplies every activation that it loads with all its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Time of one column of a block of that height, in loads of an activation: one load serves all rows.
COST: Mapping[int, float] = {1: 1.5, 2: 2.0, 4: 3.0, 8: 5.0, 16: 9.5}
HEIGHTS = tuple(COST)


@dataclass(frozen=True)
class RowBlocks:
    """A matrix ``[rows, columns_total]`` as blocks of `height` rows.

    row_order: int32 ``[blocks * height]``: which row stands where; -1 is padding.
    offsets: int32 ``[blocks + 1]``: block b has the entries offsets[b] .. offsets[b + 1] of `columns` and `values`.
    columns: int32 ``[entries]``. values: float32 ``[entries, height]``.
    """

    rows: int
    columns_total: int
    height: int
    row_order: np.ndarray
    offsets: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @property
    def blocks(self) -> int:
        return len(self.offsets) - 1

    @property
    def stored(self) -> int:
        """Numbers stored, zeros inside blocks included."""
        return self.values.size

    @property
    def cost(self) -> float:
        """Estimated time, in loads of an activation."""
        return len(self.columns) * COST[self.height] + 2.0 * self.blocks


def pack(matrix: np.ndarray, height: int | None = None) -> RowBlocks:
    """The row-blocks of a float32 ``[rows, columns]`` matrix; without `height`, the one with the least estimated cost.

    ``unpack(pack(w)) == w`` to the bit. Raises ValueError for a height that there is no kernel for.

    >>> pack(np.array([[1, 0], [0, 2], [3, 0]], np.float32), 2).row_order
    array([ 0,  2,  1, -1], dtype=int32)
    """
    if matrix.ndim != 2:
        raise ValueError(f"a matrix has two dimensions, got shape {matrix.shape}")
    if height is not None and height not in COST:
        raise ValueError(f"no kernel has blocks of {height} rows; there are {', '.join(map(str, HEIGHTS))}")
    matrix = np.ascontiguousarray(matrix, np.float32)
    support = matrix != 0
    sets = _column_sets(support)
    if height is not None:
        return _packed(matrix, support, sets, height)
    possible = [h for h in HEIGHTS if h == 1 or h < 2 * len(matrix)]
    return min((_packed(matrix, support, sets, h) for h in possible), key=lambda blocks: blocks.cost)


def unpack(blocks: RowBlocks) -> np.ndarray:
    """The float32 ``[rows, columns_total]`` matrix that was packed."""
    matrix = np.zeros((blocks.rows + 1, blocks.columns_total), np.float32)  # the last row takes the padding
    block = np.repeat(np.arange(blocks.blocks), np.diff(blocks.offsets))
    order = blocks.row_order.reshape(-1, blocks.height)[block]
    matrix[order, blocks.columns[:, None]] = blocks.values
    return matrix[:-1]


def explain(blocks: RowBlocks) -> str:
    """Why the matrix is stored like this, in a few words."""
    nonzero = int(np.count_nonzero(blocks.values))
    whole = blocks.rows * blocks.columns_total
    padding = 1 - nonzero / blocks.stored if blocks.stored else 0.0
    kept = len(np.unique(blocks.columns))
    return (
        f"{blocks.blocks} blocks of {blocks.height} rows, density {nonzero / max(1, whole):.3f}, "
        f"{kept} of {blocks.columns_total} columns read, {100 * padding:.0f} % zeros stored"
    )


def _column_sets(support: np.ndarray) -> np.ndarray:
    """For each row the number of its column set; similar sets get near numbers."""
    if support.shape[1] == 0:
        return np.zeros(len(support), np.int64)
    bits = np.packbits(support, axis=1)
    _, sets = np.unique(bits.view(f"S{bits.shape[1]}").ravel(), return_inverse=True)  # all of one length
    return sets.ravel()


def _packed(matrix: np.ndarray, support: np.ndarray, sets: np.ndarray, height: int) -> RowBlocks:
    rows, columns = matrix.shape
    order = _order(sets, height)
    padding = -len(order) % height
    order = np.concatenate([order, np.full(padding, -1, order.dtype)]).astype(np.int32)
    wide = np.concatenate([support, np.zeros((1, columns), bool)])[order].reshape(-1, height, columns)
    union = wide.any(1)
    block, column = np.nonzero(union)
    values = np.concatenate([matrix, np.zeros((1, columns), np.float32)])[
        order.reshape(-1, height)[block], column[:, None]
    ]
    offsets = np.concatenate([[0], np.cumsum(union.sum(1))]).astype(np.int32)
    return RowBlocks(rows, columns, height, order, offsets, column.astype(np.int32), np.ascontiguousarray(values))


def _order(sets: np.ndarray, height: int) -> np.ndarray:
    """Rows in an order that fills whole blocks from equal column sets first, then blocks from what is left over."""
    order = np.argsort(sets, kind="stable")
    ordered = sets[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(ordered)])
    place = np.arange(len(ordered)) - np.repeat(starts, sizes)
    whole = place < np.repeat(sizes - sizes % height, sizes)
    return np.concatenate([order[whole], order[~whole]])
