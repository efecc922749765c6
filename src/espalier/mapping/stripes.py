"""Stripes: a large random weight is one stripe of rows, again and again.

A table depends on shapes only, and making a hundred million random weights, masking and packing them takes seconds,
once for each scheme and density. One stripe is made, masked and packed instead; its blocks are then put behind one
another as often as the layer has stripes, each in a place of its own in memory, which is what its time depends on.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from espalier.compiler.blocks import Choice, choose, choosing
from espalier.compiler.formats import RowBlocks
from espalier.graph.ir import Site

LARGE = 4_000_000  # weights from which on a layer is made of stripes
_LEAST = 500_000  # weights of a stripe
_COUNTS = (64, 32, 16, 8, 4, 2)
_TALLEST = 16  # rows that blocks or schemes may join: a stripe holds whole ones


def stripes(site: Site) -> int:
    """How many equal stripes the weight of a site is made of; 1 for one that is small, or cannot be split.

    >>> stripes(Site("fc", "linear", (4096, 9216)))
    64
    """
    rows = site.shape[0]
    if site.weights < LARGE or site.conv_groups > 1:
        return 1
    fit = (n for n in _COUNTS if rows % (n * _TALLEST) == 0 and site.weights >= n * _LEAST)
    return next(fit, 1)


def repeated(stripe: Tensor, count: int) -> Tensor:
    """``[rows * count, ...]``: the rows of `stripe` again and again."""
    return stripe if count == 1 else stripe.repeat(count, *[1] * (stripe.ndim - 1))


def packed_once(matrix: np.ndarray, op: str) -> Choice | None:
    """A chooser of formats (see `compiler.blocks`): the blocks of a matrix that is made of stripes, from one of them.

    None for every other matrix: for a network's own weights that is seen at once.
    """
    if matrix.size < LARGE // 4:  # shrinking may have made it smaller
        return None
    count = next((n for n in _COUNTS if len(matrix) % n == 0 and _equal(matrix, n)), 1)
    if count == 1:
        return None
    with choosing(None):
        choice = choose(matrix[: len(matrix) // count], op)
    return Choice(_again(choice.blocks, count), choice.format, choice.reason, choice.work)


def _equal(matrix: np.ndarray, count: int) -> bool:
    """Whether all stripes are equal."""
    parts = np.split(matrix, count)
    return all(np.array_equal(parts[0][:1], part[:1]) for part in parts) and all(
        np.array_equal(parts[0], part) for part in parts[1:]
    )


def _again(blocks: RowBlocks, count: int) -> RowBlocks:
    order, ends = np.tile(blocks.row_order, (count, 1)), np.tile(blocks.offsets[1:].astype(np.int64), (count, 1))
    shift = np.arange(count)[:, None]
    order = np.where(order < 0, -1, order + shift * blocks.rows)
    return RowBlocks(
        rows=blocks.rows * count,
        columns_total=blocks.columns_total,
        height=blocks.height,
        row_order=order.astype(np.int32).ravel(),
        offsets=np.concatenate([[0], (ends + shift * len(blocks.columns)).ravel()]).astype(np.int32),
        columns=np.tile(blocks.columns, count),
        values=np.tile(blocks.values, (count, 1)),
    )
