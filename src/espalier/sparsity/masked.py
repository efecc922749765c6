"""Masked: a tensor with zeros where a mask says so."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as so many bytes


def masked(w: Tensor, mask: Tensor) -> Tensor:
    """``w.masked_fill(~mask, 0)``, without gradient. w, mask (bool): of one shape.

    The bits of `w` times 0 or 1: no branch for every entry, which irregular masks make two to five times slower; and
    unlike a product of floats it leaves neither negative zeros nor NaN where infinity was.

    >>> masked(torch.tensor([-1.5, 2.0]), torch.tensor([False, True]))
    tensor([0., 2.])
    """
    return (w.detach().view(_INTEGERS[w.element_size()]) * mask).view(w.dtype)
