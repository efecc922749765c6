"""What a row of OPS says about an op, and the kinds of attributes that ops have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

# How channels pass through an op:
#   contract     mixes the channels it reads into new ones (conv, linear); its weight says which it reads
#   elementwise  every output channel comes from the same channels of its inputs, which are thereby coupled
#   norm         elementwise along the channels, with one number per channel from each of its other inputs
#   pool         elementwise along all dimensions but the window's, the trailing ones
#   move         only moves entries: the op itself, run on labels, says where they go
#   mix          mixes channels in a way that nobody may cut into: what touches it is frozen
Channels = Literal["contract", "elementwise", "norm", "pool", "move", "mix"]

Parsed = tuple[Sequence[Any], Mapping[str, Any]]  # the tensor arguments, the attributes
Parse = Callable[[Mapping[str, Any]], Parsed]

LONGEST, LARGEST = 1 << 20, 1 << 40  # of lists and sizes in attributes


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= LONGEST and all(test(v) for v in value)


# What an attribute may be: kind -> test. "kind?" may also be None.
KINDS: dict[str, Callable[[Any], bool]] = {
    "int": _is_int,
    "count": lambda value: _is_int(value) and value > 0,
    "ints": _list_of(_is_int),
    "sizes": _list_of(lambda v: _is_int(v) and v >= 0),
    "sizes?s": _list_of(lambda v: v is None or (_is_int(v) and v > 0)),
    "number": _is_number,
    "numbers": _list_of(_is_number),
    "flag": lambda value: isinstance(value, bool),
    "gelu": lambda value: value in ("none", "tanh"),
}


@dataclass(frozen=True)
class Op:
    """One op of the graph.

    name: the word used in `Node.op`.
    signature: equal letters are the same channels, ``*`` stands for the positions, ``n`` for the batch.
    channels: how channels pass through it (see above).
    reference: the oracle: ``reference(*inputs, training=..., **attrs)``.
    parse: ATen overload -> how its arguments (by their schema names) become inputs and attributes; it raises
        NotImplementedError for a use that the row does not describe, which is then opaque.
    attrs: attribute -> its kind, a key of KINDS ("kind?" may be None); a name that ends in "?" may be missing.
    joins: of two inputs, where one is exactly zero: "all" is zero where both are, "any" where one is, "never".
    """

    name: str
    signature: str
    channels: Channels
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    parse: Mapping[str, Parse] = field(default_factory=dict)
    attrs: Mapping[str, str] = field(default_factory=dict)
    joins: Literal["all", "any", "never"] = "never"

    def channel_dim(self, rank: int) -> int:
        """Where the channels of the first input lie, in a value of `rank` dimensions.

        >>> OPS["linear"].channel_dim(3), OPS["conv"].channel_dim(4)
        (2, 1)
        """
        letters = self.signature.split(",")[0].split("->")[0].split()
        at = next(k for k, letter in enumerate(letters) if letter in "ic")
        return at if "*" not in letters[:at] else rank - (len(letters) - at)

    def check(self, attrs: Mapping[str, Any]) -> None:
        """Raises ValueError for attributes that this op does not have, or that are of another kind."""
        kinds = {name.removesuffix("?"): kind for name, kind in self.attrs.items()}
        needed = {name for name in self.attrs if not name.endswith("?")}
        if not needed <= set(attrs) <= set(kinds):
            raise ValueError(f"{self.name} has attributes {sorted(kinds)}, got {sorted(attrs)}")
        for name, value in attrs.items():
            kind = kinds[name]
            if not (value is None if kind.endswith("?") and value is None else KINDS[kind.removesuffix("?")](value)):
                raise ValueError(f"{self.name}: attribute {name} must be {kind}, got {value!r:.60}")


class UnbatchedError(NotImplementedError):
    """A convolution or pooling of one sample without a batch dimension."""


def batched(x: Any, rank: int) -> None:
    """Raises UnbatchedError unless `x` has a batch and channels before its `rank` positions."""
    if len(x.shape) != rank + 2:
        raise UnbatchedError("an input without a batch")


def ints(value: Any, rank: int) -> list[int]:
    """One number per spatial dimension, from one number or a list."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def only(condition: bool, what: str) -> None:
    """Raises NotImplementedError, so that the op becomes opaque, unless `condition` holds."""
    if not condition:
        raise NotImplementedError(what)
