"""Permute: which rows of a weight stand in one block, chosen by looking at the weight.

Blocks of m neighbouring rows prune what happens to stand together. Rows that are large in the same columns lose less in
one block, and the engine writes every row where it belongs, so their order costs nothing. Channel permutations were
proposed for N:M sparsity (Pool and Yu, NeurIPS 2021); here each layer has an order of its own, since none is moved.

The order is found by doubling: blocks of 1, 2, 4 ... rows are paired such that most is kept at the density asked for,
greedily, then by changing partners while that gains. Our reading.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from espalier.sparsity.structures import Structure

_WINDOW, _COLUMNS = 256, 512  # of large weights: rows that are paired among themselves, columns that are looked at


def row_order(structure: Structure, letter: str, w: Tensor, conv_groups: int, free: float) -> Tensor | None:
    """The rows of `w`, ordered such that blocks lose little when the share `free` of them is kept; None: as they are.

    structure: with blocks of rows by `letter`. Rows of different conv groups, and those of an incomplete last block,
    stay where they are.
    """
    height, rows = structure.blocks[letter], w.shape[0] // conv_groups
    if height < 2 or height & (height - 1) or rows < 2 * height or not 0 < free < 1:
        return None
    single = Structure(structure.pattern, {**structure.blocks, letter: 1})
    energy = single.sum(w.detach().float().square(), conv_groups).reshape(conv_groups, rows, -1).cpu().numpy()
    if not np.isfinite(energy).all():
        return None
    energy = energy[:, :, :: max(1, energy.shape[2] // _COLUMNS)]
    order = np.arange(conv_groups * rows).reshape(conv_groups, rows)
    complete = rows - rows % height
    for group in range(conv_groups):
        for first in range(0, complete, _WINDOW - _WINDOW % height):
            upto = min(complete, first + _WINDOW - _WINDOW % height)
            order[group, first:upto] = group * rows + first + _blocks(energy[group, first:upto], height, free)
    return torch.from_numpy(order.reshape(-1))


def _blocks(energy: np.ndarray, height: int, free: float) -> np.ndarray:
    """The order of the rows of `energy` [rows, columns]."""
    members = np.arange(len(energy))[:, None]
    while members.shape[1] < height:
        pairs = _partners(energy, free)
        energy = energy[pairs[:, 0]] + energy[pairs[:, 1]]
        members = np.concatenate([members[pairs[:, 0]], members[pairs[:, 1]]], axis=1)
    return members.reshape(-1)


def _partners(energy: np.ndarray, free: float) -> np.ndarray:
    """Indices [rows / 2, 2] of the rows that make a pair."""
    together = energy[0::2] + energy[1::2]
    threshold = energy.dtype.type(np.quantile(together, 1 - free))  # what a pair must hold to be kept, about
    gain = np.full((len(energy), len(energy)), -np.inf, energy.dtype)
    for k in range(len(energy) - 1):
        sums = energy[k + 1 :] + (energy[k] - threshold)
        gain[k, k + 1 :] = gain[k + 1 :, k] = np.maximum(sums, 0, out=sums).sum(1)
    left, right = _greedy(gain)
    while True:  # two pairs change partners: (a, b) and (c, d) become (a, c) and (b, d), or (a, d) and (c, b)
        now = gain[left, right]
        before = now[:, None] + now[None, :]
        straight = gain[np.ix_(left, left)] + gain[np.ix_(right, right)] - before
        crossed = gain[np.ix_(left, right)] + gain[np.ix_(left, right)].T - before
        np.fill_diagonal(crossed, -np.inf)
        best = straight if straight.max() >= crossed.max() else crossed
        if best.max() <= 1e-6 * max(now.max(), 1e-30):
            return np.stack([left, right], axis=1)
        p, q = np.unravel_index(int(best.argmax()), best.shape)
        if best is straight:
            right[p], left[q] = left[q], right[p]
        else:
            right[p], right[q] = right[q], right[p]


def _greedy(gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs by falling gain."""
    count = len(gain)
    first, second = np.triu_indices(count, 1)
    taken, left, right = np.zeros(count, bool), [], []
    for k in np.argsort(-gain[first, second], kind="stable"):
        i, j = first[k], second[k]
        if not (taken[i] or taken[j]):
            taken[i] = taken[j] = True
            left.append(i)
            right.append(j)
            if 2 * len(left) == count:
                break
    return np.array(left), np.array(right)
