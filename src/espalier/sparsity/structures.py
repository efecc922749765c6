"""Structures: which weights live and die together.

A structure is a permutation of the entries of a weight tensor into a matrix ``[groups, size]``, written as an
einops pattern over the weight seen as ``g o i y x`` (conv groups, filters per conv group, input channels per
conv group, kernel height and width; a linear weight has y = x = 1, a 1-d conv y = 1) or, seen as a GEMM
matrix, ``g o k`` with ``k = i y x``. A blocked axis such as ``(O m)`` is padded with zeros up to a
multiple of m; padding entries carry no loss and never come back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import SchemeError

SHORT = 16  # weights of a group that a product sums no worse than a sum would


@dataclass(frozen=True)
class Structure:
    """A rearrangement of a weight into groups, and back.

    pattern: einops pattern ``axes -> (groups) (size)``.
    blocks: sizes of the block letters in the pattern.
    order: the rows as they stand in blocks, ``[rows]``, each within its conv group; None: as they are.

    >>> column = Structure("g o i y x -> (g i y x) o")
    >>> column.groups(torch.ones(8, 3, 5, 5)).shape
    torch.Size([75, 8])
    """

    pattern: str
    blocks: Mapping[str, int] = field(default_factory=dict)
    order: Tensor | None = field(default=None, compare=False, repr=False)

    def groups(self, w: Tensor, conv_groups: int = 1) -> Tensor:
        """The matrix ``[groups, size]`` of `w` (edge blocks padded with zeros)."""
        return rearrange(self._view(w, conv_groups), self.pattern, **self.blocks)

    def ungroup(self, matrix: Tensor, shape: torch.Size, conv_groups: int = 1) -> Tensor:
        """The weight of `shape` whose groups are `matrix`: ``ungroup(groups(w), w.shape) == w``."""
        view = rearrange(matrix, f"{self._right} -> {self._left}", **self._sizes(shape, conv_groups))
        return self._unview(view, shape, conv_groups)

    def sum(self, w: Tensor, conv_groups: int = 1) -> Tensor:
        """``groups(w).sum(1)``, shape ``[groups]``, without making the matrix."""
        view = self._view(w, conv_groups)
        if w.is_floating_point() and self._runs(w.shape, conv_groups):  # short rows: a product is twice as fast
            matrix = rearrange(view, self.pattern, **self.blocks)
            return matrix @ matrix.new_ones(matrix.shape[1])
        return reduce(view, f"{self._left} -> {self._group_axes}", "sum", **self.blocks)

    def spread(self, vector: Tensor, shape: torch.Size, conv_groups: int = 1) -> Tensor:
        """The weight of `shape` in which every entry holds its group's number in `vector` ``[groups]``."""
        sizes = self._sizes(shape, conv_groups)
        view = repeat(vector, f"{self._group_axes} -> {self._left}", **sizes)
        return self._unview(view, shape, conv_groups)

    def group_sizes(self, shape: torch.Size, conv_groups: int = 1) -> Tensor:
        """How many weights each group holds, ``[groups]`` on the CPU: equal but for edge blocks, which hold fewer."""
        return _group_sizes(self.pattern, tuple(self.blocks.items()), torch.Size(shape), conv_groups)

    # -- the pattern, taken apart ------------------------------------------------------------------

    @cached_property
    def _left(self) -> str:
        return self.pattern.split("->")[0].strip()

    @cached_property
    def _right(self) -> str:
        return self.pattern.split("->")[1].strip()

    @cached_property
    def _axes(self) -> list[str]:
        """The axes of the view, one token each: ``["g", "(O m)", "i", "y", "x"]``."""
        return re.findall(r"\([^)]*\)|\S+", self._left)

    @cached_property
    def _halves(self) -> list[str]:
        """The axes of groups and those within a group: ``["(g O i y x)", "m"]``."""
        return re.findall(r"\([^)]*\)|\S+", self._right)

    @property
    def _group_axes(self) -> str:
        return self._halves[0]

    def _runs(self, shape: torch.Size, conv_groups: int) -> bool:
        """Whether every group is a short run of neighbours in memory."""
        sizes = self._sizes(shape, conv_groups)
        left, right, members = (
            [letter for letter in re.findall(r"\w+", axes) if sizes[letter] > 1]
            for axes in (self._left, self._right, self._halves[1])
        )
        return left == right and math.prod(sizes[letter] for letter in members) <= SHORT

    def _block(self, axis: str) -> int:
        """The number by which the size of an axis must divide: its block letter's size."""
        letters = axis.strip("()").split()
        return self.blocks[letters[-1]] if len(letters) == 2 else 1

    def _dims(self, shape: torch.Size, conv_groups: int) -> list[int]:
        """The sizes of the view's axes before padding."""
        rows, inputs = shape[0], shape[1] if len(shape) > 1 else 1
        if rows % conv_groups:
            raise SchemeError(f"{rows} filters cannot be split into {conv_groups} conv groups")
        window = [1, 1, *shape[2:]][-2:] if len(shape) <= 4 else [1, -1]
        if len(shape) > 4:  # 3-d convs and beyond: all kernel positions on one axis
            window[1] = int(torch.Size(shape[2:]).numel())
        dims = [conv_groups, rows // conv_groups, inputs, *window]
        if len(self._axes) == 3:
            dims = [dims[0], dims[1], dims[2] * dims[3] * dims[4]]
        return dims

    def _padding(self, dims: list[int]) -> list[int]:
        return [-size % self._block(axis) for size, axis in zip(dims, self._axes)]

    def _view(self, w: Tensor, conv_groups: int) -> Tensor:
        dims = self._dims(w.shape, conv_groups)
        padding = self._padding(dims)
        view = (w if self.order is None else w[self.order.to(w.device)]).reshape(dims)
        if any(padding):
            view = F.pad(view, [amount for size in reversed(padding) for amount in (0, size)])
        return view

    def _unview(self, view: Tensor, shape: torch.Size, conv_groups: int) -> Tensor:
        dims = self._dims(shape, conv_groups)
        w = view[tuple(slice(size) for size in dims)].reshape(shape)
        return w if self._back is None else w[self._back.to(w.device)]

    @cached_property
    def _back(self) -> Tensor | None:
        """Where each row stands in the order."""
        return None if self.order is None else self.order.argsort()

    def _sizes(self, shape: torch.Size, conv_groups: int) -> dict[str, int]:
        """The size of every letter of the pattern."""
        dims = self._dims(shape, conv_groups)
        sizes: dict[str, int] = dict(self.blocks)
        for size, extra, axis in zip(dims, self._padding(dims), self._axes):
            letters = axis.strip("()").split()
            sizes[letters[0]] = (size + extra) // self._block(axis)
        return sizes


@cache
def _group_sizes(pattern: str, blocks: tuple[tuple[str, int], ...], shape: torch.Size, conv_groups: int) -> Tensor:
    structure = Structure(pattern, dict(blocks))
    if any(structure._padding(structure._dims(shape, conv_groups))):
        return structure.sum(torch.ones(shape), conv_groups)
    sizes = structure._sizes(shape, conv_groups)
    count = math.prod(sizes[letter] for letter in structure._group_axes.strip("()").split())
    return torch.tensor(float(math.prod(shape) // count)).expand(count)
