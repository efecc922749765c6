"""Rows of OPS that work entry by entry: activations, dropout, and arithmetic of two values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.op import Op, Parse, Parsed, only

_SIGNATURE = "n c * -> n c *"


def _unary(name: str, function: Callable[..., Tensor], *targets: str, **attrs: str) -> Op:
    """A row for a function of one tensor; `attrs` maps an attribute to "schema name, kind"."""
    sources = {key: text.split(", ") for key, text in attrs.items()}

    def parse(a: Mapping[str, Any]) -> Parsed:
        return [a["self"]], {key: a[source] for key, (source, _) in sources.items()}

    return Op(
        name,
        _SIGNATURE,
        "elementwise",
        lambda x, training, **a: function(x, **a),
        {f"aten.{target}": parse for target in targets or (f"{name}.default",)},
        {key: kind for key, (_, kind) in sources.items()},
    )


def _clamps(low: Any, high: Any) -> Parse:
    """A clamp between numbers, or between the arguments of these names."""

    def parse(a: Mapping[str, Any]) -> Parsed:
        return [a["self"]], {
            "min": a[low] if isinstance(low, str) else low,
            "max": a[high] if isinstance(high, str) else high,
        }

    return parse


def _same_type(other: str) -> Parse:
    """A conversion that converts nothing: `other` names the argument with the dtype, or the tensor that has it."""

    def parse(a: Mapping[str, Any]) -> Parsed:
        wanted = getattr(a[other], "dtype", a[other])
        only(wanted is None or wanted == a["self"].dtype, "a change of dtype")
        return [a["self"]], {}

    return parse


def _itself(a: Mapping[str, Any]) -> Parsed:
    return [a["self"]], {}


def _parse_dropout(a: Mapping[str, Any]) -> Parsed:
    only(not a["train"], "dropout that drops in eval mode too")
    return [a["input"]], {"p": a["p"]}


def _whole_channels(x: Tensor, training: bool, p: float) -> Tensor:
    return torch.feature_dropout(x, p, training)


_COPIES = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "lift", "positive")
_CASTS = {"to.dtype": "dtype", "to.dtype_layout": "dtype", "to.device": "dtype", "to.other": "other"}
_CASTS |= {"_to_copy.default": "dtype", "type_as.default": "other"}

_ACTIVATIONS = (
    _unary("relu", F.relu),
    Op(
        "clamp",
        _SIGNATURE,
        "elementwise",
        lambda x, training, min, max: x.clamp(min, max),
        {
            "aten.relu6.default": _clamps(0.0, 6.0),
            "aten.hardtanh.default": _clamps("min_val", "max_val"),
            "aten.clamp.default": _clamps("min", "max"),
            "aten.clamp_min.default": _clamps("min", None),
            "aten.clamp_max.default": _clamps(None, "max"),
        },
        {"min": "number?", "max": "number?"},
    ),
    _unary("leaky_relu", lambda x, slope: F.leaky_relu(x, slope), slope="negative_slope, number"),
    _unary("elu", lambda x, alpha: F.elu(x, alpha), "celu.default", alpha="alpha, number"),
    _unary("selu", F.selu),
    _unary("sigmoid", torch.sigmoid),
    _unary("tanh", torch.tanh),
    _unary("silu", F.silu),
    _unary("mish", F.mish),
    _unary("hardswish", F.hardswish),
    _unary("hardsigmoid", F.hardsigmoid),
    _unary("softplus", F.softplus, beta="beta, number", threshold="threshold, number"),
    _unary("log_sigmoid", F.logsigmoid),
    _unary("gelu", F.gelu, approximate="approximate, gelu"),
    _unary("exp", torch.exp),
    _unary("log", torch.log),
    _unary("sqrt", torch.sqrt),
    _unary("rsqrt", torch.rsqrt),
    _unary("pow", torch.pow, "pow.Tensor_Scalar", exponent="exponent, number"),
    _unary("abs", torch.abs),
    _unary("neg", torch.neg),
    _unary("square", torch.square),
    Op(
        "identity",
        _SIGNATURE,
        "elementwise",
        lambda x, training: x,
        {**{f"aten.{t}.default": _itself for t in _COPIES}, **{f"aten.{t}": _same_type(d) for t, d in _CASTS.items()}},
    ),
    Op(
        "dropout",
        _SIGNATURE,
        "elementwise",
        lambda x, training, p: F.dropout(x, p, training),
        {"aten.dropout.default": _parse_dropout},
        {"p": "number"},
    ),
    Op(
        "feature_dropout",
        _SIGNATURE,
        "elementwise",
        _whole_channels,
        {"aten.feature_dropout.default": _parse_dropout},
        {"p": "number"},
    ),
    Op(
        "prelu",
        "n c *, c -> n c *",
        "norm",
        lambda x, w, training: F.prelu(x, w),
        {"aten.prelu.default": lambda a: _parse_prelu(a)},
    ),
)


def _parse_prelu(a: Mapping[str, Any]) -> Parsed:
    only(len(a["self"].shape) > 1 and tuple(a["weight"].shape) == (a["self"].shape[1],), "one slope for all channels")
    return [a["self"], a["weight"]], {}


def _binary(
    name: str, function: Callable[[Any, Any], Tensor], joins: Literal["all", "any", "never"], *more: str
) -> Op:
    def reference(x: Tensor, y: Tensor | None = None, *, training: bool, other: float = 0, alpha: float = 1) -> Tensor:
        second = other if y is None else y
        return function(x, second if alpha == 1 else second * alpha)

    def parse(a: Mapping[str, Any]) -> Parsed:
        alpha = {"alpha": a["alpha"]} if a.get("alpha", 1) != 1 else {}
        if isinstance(a["other"], (int, float)):
            return [a["self"]], {"other": a["other"], **alpha}
        return [a["self"], a["other"]], alpha

    targets = (f"{name}.Tensor", f"{name}.Scalar", *more)
    return Op(
        name,
        "n c *, n c * -> n c *",
        "elementwise",
        reference,
        {f"aten.{target}": parse for target in targets},
        {"other?": "number", "alpha?": "number"},
        joins,
    )


ROWS = (
    *_ACTIVATIONS,
    _binary("add", torch.add, "all"),
    _binary("sub", torch.sub, "all"),
    _binary("mul", torch.mul, "any"),
    _binary("div", torch.div, "never"),
    _binary("rsub", lambda x, y: y - x, "all"),
    _binary("maximum", torch.maximum, "all", "maximum.default"),
    _binary("minimum", torch.minimum, "all", "minimum.default"),
)
