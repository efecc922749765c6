"""What a row of OPS says about an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

# How channels pass through an op:
#   contract     mixes the channels it reads into new ones (conv, linear); its weight says which it reads
#   elementwise  every output channel comes from the same channels of its inputs, which are thereby coupled
#   norm         elementwise along dimension 1, with one number per channel from each of its other inputs
#   pool         elementwise along all dimensions but the window's, the trailing ones
#   move         only moves entries: the op itself, run on labels, says where they go
#   mix          mixes channels in a way that nobody may cut into: what touches it is frozen
Channels = Literal["contract", "elementwise", "norm", "pool", "move", "mix"]

Parsed = tuple[Sequence[Any], Mapping[str, Any]]  # the tensor arguments, the attributes


@dataclass(frozen=True)
class Op:
    """One op of the graph.

    name: the word used in `Node.op`.
    signature: equal letters are the same channels; ``*`` stands for the positions.
    channels: how channels pass through it (see above).
    reference: the oracle: ``reference(*inputs, training=..., **attrs)``.
    parse: ATen overload -> how its arguments (by their schema names) become inputs and attributes.
    zero: what it makes of channels that are exactly zero everywhere: "zero" stays zero, "constant" becomes a
        constant, "product" is zero when any input is, "varies" is unknown.
    """

    name: str
    signature: str
    channels: Channels
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    parse: Mapping[str, Callable[[Mapping[str, Any]], Parsed]] = field(default_factory=dict)
    zero: Literal["zero", "constant", "product", "varies"] = "zero"
