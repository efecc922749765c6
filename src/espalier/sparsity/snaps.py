"""Snaps: the nearest allowed point of a group.

A snap maps every row of a matrix ``[groups, size]`` to the nearest point (Euclidean) that it allows.
`support` says which entries may be non-zero afterwards; entries outside it are pruned.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from espalier.errors import SchemeError
from espalier.sparsity.masked import masked
from espalier.sparsity.structures import Structure


class Snap(ABC):
    """The nearest allowed point for each group.

    ties: snapped groups share one magnitude (unification), so retraining learns one number per group.
    skips_dead: groups that are zero already do not count in the share that a rule leaves alone.
    """

    ties: ClassVar[bool] = False
    skips_dead: ClassVar[bool] = False

    @abstractmethod
    def nearest(self, matrix: Tensor) -> Tensor:
        """``argmin ||p - matrix||`` row by row over the allowed points p; shape ``[groups, size]``."""

    @abstractmethod
    def support(self, matrix: Tensor) -> Tensor:
        """Boolean ``[groups, size]``: the entries that stay free to be non-zero in a snapped group."""

    def loss(self, w: Tensor, structure: Structure, conv_groups: int) -> Tensor:
        """``||nearest - group||^2`` for each group of `w`, shape ``[groups]``."""
        matrix = structure.groups(w, conv_groups)
        return (self.nearest(matrix) - matrix).square().sum(1)

    def apply(self, w: Tensor, structure: Structure, conv_groups: int, chosen: Tensor) -> Tensor:
        """`w` with the `chosen` groups (bool ``[groups]``) snapped."""
        matrix = structure.groups(w, conv_groups)
        snapped = self.nearest(matrix)
        if not bool(chosen.all()):
            snapped = torch.where(chosen[:, None], snapped, matrix)
        return structure.ungroup(snapped, w.shape, conv_groups)

    def mask(self, w: Tensor, structure: Structure, conv_groups: int, chosen: Tensor) -> Tensor:
        """Boolean, shape of `w`: what may live when the `chosen` groups are snapped."""
        support = self.support(structure.groups(w, conv_groups)) | ~chosen[:, None]
        return structure.ungroup(support, w.shape, conv_groups)


@dataclass(frozen=True)
class Zero(Snap):
    """Pruning: the only allowed point is zero."""

    def nearest(self, matrix: Tensor) -> Tensor:
        return torch.zeros_like(matrix)

    def support(self, matrix: Tensor) -> Tensor:
        return torch.zeros_like(matrix, dtype=torch.bool)

    # Group sums and spreads do the same as the matrix here, without permuting the weight.

    def loss(self, w: Tensor, structure: Structure, conv_groups: int) -> Tensor:
        return structure.sum(w.square(), conv_groups)

    def apply(self, w: Tensor, structure: Structure, conv_groups: int, chosen: Tensor) -> Tensor:
        return masked(w, structure.spread(~chosen, w.shape, conv_groups))

    def mask(self, w: Tensor, structure: Structure, conv_groups: int, chosen: Tensor) -> Tensor:
        return structure.spread(~chosen, w.shape, conv_groups)


class Keep(Snap):
    """Pruning within groups: what a group's `support` leaves stays as it is."""

    def nearest(self, matrix: Tensor) -> Tensor:
        return masked(matrix, self.support(matrix))

    def apply(self, w: Tensor, structure: Structure, conv_groups: int, chosen: Tensor) -> Tensor:
        return masked(w, self.mask(w, structure, conv_groups, chosen))  # masks are lighter to permute than weights


@dataclass(frozen=True)
class KeepLargest(Keep):
    """N:M sparsity: the `keep` largest of every group stay; ties go to the first entry."""

    keep: int

    def support(self, matrix: Tensor) -> Tensor:
        size = matrix.shape[1]
        if size > 8:
            kept = matrix.abs().topk(min(self.keep, size), dim=1).indices
            return torch.zeros_like(matrix, dtype=torch.bool).scatter_(1, kept, True)
        columns = matrix.T.contiguous().abs_()  # counting beats sorting millions of narrow rows
        larger = torch.zeros(columns.shape, dtype=torch.int8, device=matrix.device)  # how many others an entry loses to
        for j, k in itertools.combinations(range(size), 2):
            later = (columns[k] > columns[j]).view(torch.int8)
            larger[j] += later
            larger[k] += 1 - later
        return (larger < self.keep).T


# Eight patterns of four of the nine positions of a 3 x 3 kernel: the centre, and three neighbours of it.
# Which eight is our reading (PatDNN keeps the centre and finds the commonest in the network): one arm of
# the cross with the two corners beside it left out for corner shapes (L), and the T shapes, in their four
# turns each.
FOUR_OF_NINE: tuple[tuple[int, ...], ...] = (
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (3, 4, 6, 7),
    (4, 5, 7, 8),
    (1, 3, 4, 5),
    (1, 3, 4, 7),
    (1, 4, 5, 7),
    (3, 4, 5, 7),
)


@dataclass(frozen=True)
class BestPattern(Keep):
    """The pattern out of a set that keeps the most of a kernel's squared weight.

    patterns: for each the kernel positions (row by row, from 0) that live.
    size: kernel positions of a group.
    """

    patterns: tuple[tuple[int, ...], ...] = FOUR_OF_NINE
    size: int = 9

    def _table(self, matrix: Tensor) -> Tensor:
        if matrix.shape[1] != self.size:
            raise SchemeError(
                f"patterns for {self.size} kernel positions cannot apply to {matrix.shape[1]}: "
                "choose another scheme for this layer (block_punched fits every kernel size)"
            )
        table = torch.zeros(len(self.patterns), self.size, device=matrix.device)
        for row, positions in enumerate(self.patterns):
            table[row, list(positions)] = 1
        return table

    def support(self, matrix: Tensor) -> Tensor:
        table = self._table(matrix)
        best = (matrix.float().square() @ table.T).argmax(1)
        return table.bool()[best]


@dataclass(frozen=True)
class EqualMagnitude(Snap):
    """Unification: one magnitude for the whole block, signs kept.

    ``nearest = sign(v) mean|v|`` over the non-zero entries (zeros are pruned already, or padding), at cost
    ``sum (|v| - mean|v|)^2`` (micro-structured weight unification, arXiv 2106.08301).
    """

    ties: ClassVar[bool] = True
    skips_dead: ClassVar[bool] = True

    def nearest(self, matrix: Tensor) -> Tensor:
        return matrix.sign() * (matrix.abs().sum(1) / (matrix != 0).sum(1).clamp_min(1))[:, None]

    def support(self, matrix: Tensor) -> Tensor:
        return torch.ones_like(matrix, dtype=torch.bool)

    def loss(self, w: Tensor, structure: Structure, conv_groups: int) -> Tensor:
        total = structure.sum(w.abs(), conv_groups)
        mean = total / _counts(w, structure, conv_groups, bool(w.all()))
        return (structure.sum(w.square(), conv_groups) - mean.mul_(total)).clamp_min_(0)

    def apply(self, w: Tensor, structure: Structure, conv_groups: int, chosen: Tensor) -> Tensor:
        full = bool(w.all())  # as it mostly is
        mean = structure.sum(w.abs(), conv_groups) / _counts(w, structure, conv_groups, full)
        tied = structure.spread(masked(mean, chosen), w.shape, conv_groups).copysign(w)
        free = masked(w, structure.spread(~chosen, w.shape, conv_groups))
        return free.add_(tied if full else masked(tied, w != 0))

    def mask(self, w: Tensor, structure: Structure, conv_groups: int, chosen: Tensor) -> Tensor:
        return torch.ones_like(w, dtype=torch.bool)


def _counts(w: Tensor, structure: Structure, conv_groups: int, full: bool) -> Tensor:
    """The number of entries that are not zero, ``[groups]``, at least 1; full: none is zero."""
    counts = structure.group_sizes(w.shape, conv_groups) if full else structure.sum(w.sign().square_(), conv_groups)
    return counts.to(w).clamp_min(1)
