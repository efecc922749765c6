"""Formats: how a sparse weight is stored. Row-blocks: runs of rows that share one set of columns.

Made by looking at the weights alone, so a network that anyone pruned with anything packs well: rows with equal or
nearly equal column sets are brought together (the order is kept beside them, and undone for free by writing each row
where it belongs), and a block multiplies every activation that it loads with all its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Time of one column of a block of that height, in loads of an activation: a load, and half as much for the product of
# each row, the zeros of padding included: 1 + height / 2. 16 rows spill a little out of the registers.
COST: Mapping[int, float] = {1: 1.5, 2: 2.0, 4: 3.0, 8: 5.0, 16: 9.5}
HEIGHTS = tuple(COST)
_BLOCK = 2.0  # time of a block besides its columns, in the same unit
_SAMPLE = 512  # columns by which rows are compared
_AT_ONCE = 1 << 16  # numbers of a matrix that are packed at once
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)


@dataclass(frozen=True)
class RowBlocks:
    """A matrix ``[rows, columns_total]`` as blocks of `height` rows.

    row_order: int32 ``[blocks * height]``: which row stands where; -1 is padding. Every row stands once, also one of
        zeros, since its bias is written.
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
        """How many blocks of `height` rows."""
        return len(self.offsets) - 1

    @property
    def stored(self) -> int:
        """Numbers stored, zeros inside blocks included."""
        return self.values.size

    @property
    def cost(self) -> float:
        """Estimated time, in loads of an activation."""
        return _cost(len(self.columns), self.blocks, self.height)


def pack(matrix: np.ndarray, height: int | None = None) -> RowBlocks:
    """The row-blocks of a float32 ``[rows, columns]`` matrix; without `height`, the one with the least estimated cost:

        argmin over heights of  entries * COST[height] + blocks * 2

    ``unpack(pack(w)) == w``, to the bit but for the sign of zeros. Raises ValueError for a height without a kernel.

    >>> pack(np.array([[1, 0], [0, 2], [3, 0]], np.float32), 2).row_order
    array([ 0,  2,  1, -1], dtype=int32)
    """
    if matrix.ndim != 2:
        raise ValueError(f"a matrix has two dimensions, got shape {matrix.shape}")
    if height is not None and height not in COST:
        raise ValueError(f"no kernel has blocks of {height} rows; there are {', '.join(map(str, HEIGHTS))}")
    heights = [h for h in HEIGHTS if h == 1 or h < 2 * len(matrix)] if height is None else [height]
    return packed(matrix, min(arrange(matrix, heights), key=lambda each: each.cost))


@dataclass(frozen=True)
class Arrangement:
    """Row-blocks without values: which rows stand together.

    order: as `row_order` of RowBlocks. unions: uint8 ``[blocks, bytes]``, the packed bits of each block's columns.
    """

    height: int
    order: np.ndarray
    unions: np.ndarray

    @property
    def blocks(self) -> int:
        """How many blocks of `height` rows."""
        return len(self.unions)

    @cached_property
    def entries(self) -> int:
        """The columns of all blocks."""
        return int(_ONES[self.unions].sum())

    @property
    def cost(self) -> float:
        """Estimated time, in loads of an activation."""
        return _cost(self.entries, self.blocks, self.height)


def arrange(matrix: np.ndarray, heights: Sequence[int]) -> list[Arrangement]:
    """How `matrix` ``[rows, columns]`` would be packed in blocks of each of these heights.

    Comparing several costs little more than one: what takes time is the values, which only `packed` brings together.
    """
    return _arranged(np.packbits(matrix != 0, axis=1), heights)


def packed(matrix: np.ndarray, arrangement: Arrangement) -> RowBlocks:
    """The row-blocks of `matrix` in an arrangement that `arrange` made of it."""
    matrix = np.ascontiguousarray(matrix, np.float32)
    (rows, columns), height = matrix.shape, arrangement.height
    counts = _ONES[arrangement.unions].sum(1, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    column, values = np.empty(offsets[-1], np.int32), np.empty((offsets[-1], height), np.float32)
    order = arrangement.order.reshape(-1, height)
    step = max(1, _AT_ONCE // max(1, columns))
    for first in range(0, arrangement.blocks, step):  # few at a time: what lies between stays in the cache
        some = slice(first, first + step)
        made = slice(offsets[first], offsets[min(first + step, arrangement.blocks)])
        bits = np.flatnonzero(np.unpackbits(arrangement.unions[some], axis=1, count=columns))
        block = np.repeat(np.arange(len(order[some])), counts[some])
        column[made] = at = bits - block * columns
        taken = (order[some].astype(np.int64) * columns)[block] + at[:, None]
        np.take(matrix.reshape(-1), taken, out=values[made], mode="clip")
        if (order[some] < 0).any():
            values[made][order[some][block] < 0] = 0
    return RowBlocks(rows, columns, height, arrangement.order, offsets.astype(np.int32), column, values)


def unpack(blocks: RowBlocks) -> np.ndarray:
    """The float32 ``[rows, columns_total]`` matrix that was packed."""
    matrix = np.zeros((blocks.rows + 1, blocks.columns_total), np.float32)  # the last row takes the padding
    block = np.repeat(np.arange(blocks.blocks), np.diff(blocks.offsets))
    order = blocks.row_order.reshape(-1, blocks.height)[block]
    matrix[order, blocks.columns[:, None]] = blocks.values
    return matrix[:-1]


def explain(blocks: RowBlocks) -> str:
    """Why the matrix is stored like this, in a few words: what it is, and what other heights would cost.

    >>> explain(pack(weight))
    '8 blocks of 8 rows, density 0.100, 137 of 200 columns read, 0 % zeros stored; blocks of 4 would cost 1.20x'
    """
    nonzero = int(np.count_nonzero(blocks.values))
    whole = blocks.rows * blocks.columns_total
    padding = 1 - nonzero / blocks.stored if blocks.stored else 0.0
    kept = len(np.unique(blocks.columns))
    others = [h for h in HEIGHTS if h != blocks.height and (h == 1 or h < 2 * blocks.rows)]
    costs = {each.height: each.cost for each in arrange(unpack(blocks), others)}
    best = min(costs, key=lambda h: costs[h], default=blocks.height)
    rival = f"; blocks of {best} would cost {costs[best] / blocks.cost:.2f}x" if blocks.cost and costs else ""
    return (
        f"{blocks.blocks} blocks of {blocks.height} rows, density {nonzero / max(1, whole):.3f}, "
        f"{kept} of {blocks.columns_total} columns read, {100 * padding:.0f} % zeros stored{rival}"
    )


# -- which rows stand together ---------------------------------------------------------------------


def _cost(entries: int, blocks: int, height: int) -> float:
    return entries * COST[height] + _BLOCK * blocks


def _arranged(bits: np.ndarray, heights: Sequence[int]) -> list[Arrangement]:
    """For each height the blocks of rows with these column sets; bits: uint8 ``[rows, bytes]``."""
    alive = np.flatnonzero(bits.any(1))
    sets = _column_sets(bits[alive])
    related = max(heights, default=1) > 1 and _related(bits[alive])
    padded = np.concatenate([bits, np.zeros((1, bits.shape[1]), np.uint8)])  # row -1
    made = []
    for height in heights:
        order = np.arange(len(bits)) if height == 1 else _ascending(_order(bits, alive, sets, height, related), height)
        unions = np.bitwise_or.reduce(padded[order.reshape(-1, height)], axis=1)
        made.append(Arrangement(height, order.astype(np.int32), unions))
    return made


def _column_sets(bits: np.ndarray) -> np.ndarray:
    """For each row the number of its column set; sets that begin alike get near numbers."""
    if bits.size == 0:
        return np.zeros(len(bits), np.int64)
    _, sets = np.unique(np.ascontiguousarray(bits).view(f"S{bits.shape[1]}").ravel(), return_inverse=True)
    return sets.ravel()  # S drops zeros at the end, which is no loss: all have one length


def _order(bits: np.ndarray, alive: np.ndarray, sets: np.ndarray, height: int, related: bool) -> np.ndarray:
    """All rows, block by block: whole blocks of equal column sets, then what is left, then the rows of zeros."""
    order = np.argsort(sets, kind="stable")
    ordered = sets[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    sizes = np.diff(np.r_[starts, len(ordered)])
    place = np.arange(len(ordered)) - np.repeat(starts, sizes)
    whole = place < np.repeat(sizes - sizes % height, sizes)
    left = alive[order[~whole]]
    rest = _together(bits, left, height) if related and len(left) > 1 else left
    made = np.concatenate([alive[order[whole]], rest])
    empty = np.setdiff1d(np.arange(len(bits)), alive)
    holes = np.flatnonzero(made < 0)[: len(empty)]  # rows of zeros cost nothing beside others
    made[holes] = empty[: len(holes)]
    made = np.concatenate([made, empty[len(holes) :]])
    return np.concatenate([made, np.full(-len(made) % height, -1, made.dtype)])


def _ascending(order: np.ndarray, height: int) -> np.ndarray:
    """Blocks by their first row, so that who has a share of them has as good as a share of the rows."""
    blocks = order.reshape(-1, height)
    first = np.where(blocks < 0, len(order), blocks).min(1)
    return blocks[np.argsort(first, kind="stable")].ravel()


def _related(bits: np.ndarray) -> bool:
    """Whether most rows have another that is more like them than chance would make it."""
    sample = _sampled(bits)
    if len(sample) < 2:
        return False
    some = np.unique(np.linspace(0, len(sample) - 1, 128).astype(np.int64))
    overlap = sample[some] @ sample.T
    overlap[np.arange(len(some)), some] = 0
    share = overlap.max(1) / np.maximum(1, sample[some].sum(1))
    chance = float(sample.mean())
    return float(np.median(share)) > chance + 0.5 * (1 - chance)


def _sampled(bits: np.ndarray) -> np.ndarray:
    """Rows as 0 and 1 ``[rows, at most _SAMPLE]`` over columns that any of them has."""
    support = np.unpackbits(bits, axis=1)
    used = np.flatnonzero(support.any(0))
    if len(used) > _SAMPLE:
        used = np.random.default_rng(0).permutation(used)[:_SAMPLE]
    return support[:, used].astype(np.float32)


def _together(bits: np.ndarray, rows: np.ndarray, height: int) -> np.ndarray:
    """`rows` in blocks of similar ones, -1 where a block has fewer than `height`.

    Greedy, first among rows that are nearly equal: one more in a block frees 1 / height of another block, so it may
    cost that share of its columns. Then whole blocks are joined where they fit, the more alike the sooner.
    """
    blocks = [[int(row)] for row in np.sort(rows)]
    sample = _sampled(bits[np.sort(rows)])
    for share in (1 / height, 0.5, 1.0):
        blocks, sample = _joined(blocks, sample, height, share)
    padded = np.full((len(blocks), height), -1, np.int64)
    for k, block in enumerate(blocks):
        padded[k, : len(block)] = block
    return padded.ravel()


def _joined(
    blocks: list[list[int]], sample: np.ndarray, height: int, share: float
) -> tuple[list[list[int]], np.ndarray]:
    """Each block with others that fit into it and add at most `share` of their columns to its own."""
    counts = np.array([len(block) for block in blocks])
    overlap, sizes = sample @ sample.T, sample.sum(1)
    allowed = (sizes - overlap <= share * sizes) & (counts[:, None] + counts <= height)
    np.fill_diagonal(allowed, False)
    key = np.where(allowed, sizes - 2 * overlap, np.inf)  # columns added, less those saved
    alone = ~allowed.any(1)
    free = np.ones(len(blocks), bool)
    made, unions = [], []
    for first in range(len(blocks)):
        if not free[first]:
            continue
        free[first] = False
        members = [first] if alone[first] else _partners(first, key[first], free, counts, height)
        made.append([row for member in members for row in blocks[member]])
        unions.append(sample[members].max(0) if len(members) > 1 else sample[first])
    return made, np.stack(unions)


def _partners(first: int, key: np.ndarray, free: np.ndarray, counts: np.ndarray, height: int) -> list[int]:
    """`first` and those with the least `key` that fit beside it; they are not free then."""
    members, room = [first], height - counts[first]
    keys = np.where(free, key, np.inf)
    near = np.argpartition(keys, min(2 * height, len(keys) - 1))[: 2 * height]
    for other in near[np.argsort(keys[near], kind="stable")]:
        if keys[other] < np.inf and counts[other] <= room:
            members.append(int(other))
            free[other] = False
            room -= counts[other]
    return members
