"""Rows of OPS that work entry by entry: activations, dropout, and arithmetic of two values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.op import Op, Parse, Parsed, only

_SIGNATURE, _TWO = "n c * -> n c *", "n c *, n c * -> n c *"


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
    return [a["input"] if "input" in a else a["self"]], {"p": a["p"]}  # its in-place twin says self


def _whole_channels(x: Tensor, training: bool, p: float) -> Tensor:
    return torch.feature_dropout(x, p, training)


def _elu(x: Tensor, training: bool, alpha: float) -> Tensor:
    return F.elu(x, alpha)


def _parse_elu(a: Mapping[str, Any]) -> Parsed:
    only(a["scale"] == 1 and a["input_scale"] == 1, "a scaled elu")
    return [a["self"]], {"alpha": a["alpha"]}


def _parse_prelu(a: Mapping[str, Any]) -> Parsed:
    only(len(a["self"].shape) > 1 and tuple(a["weight"].shape) == (a["self"].shape[1],), "one slope for all channels")
    return [a["self"], a["weight"]], {}


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
    Op("elu", _SIGNATURE, "elementwise", _elu, {"aten.elu.default": _parse_elu}, {"alpha": "number"}),
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
        {"aten.prelu.default": _parse_prelu},
    ),
)


def _binary(name: str, function: Callable[..., Tensor], joins: Literal["all", "any", "never"]) -> Op:
    """A row for a function of two, the second a value or the attribute "other"."""

    def reference(x: Tensor, y: Tensor | None = None, *, training: bool, other: float = 0, alpha: float = 1) -> Tensor:
        return function(x, other if y is None else y, alpha)

    def parse(a: Mapping[str, Any]) -> Parsed:
        alpha = {"alpha": a["alpha"]} if a.get("alpha", 1) != 1 else {}
        if isinstance(a["other"], (int, float)):
            return [a["self"]], {"other": a["other"], **alpha}
        return [a["self"], a["other"]], alpha

    targets = (f"aten.{name}.Tensor", f"aten.{name}.Scalar")
    attrs = {"other?": "number", "alpha?": "number"}
    return Op(name, _TWO, "elementwise", reference, dict.fromkeys(targets, parse), attrs, joins)


def _extreme(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    parse: dict[str, Parse] = {f"aten.{name}.default": lambda a: ([a["self"], a["other"]], {})}
    return Op(name, _TWO, "elementwise", lambda x, y, training: function(x, y), parse, joins="all")


def _scaled(y: Any, alpha: float) -> Any:
    return y if alpha == 1 else y * alpha


POINTWISE = (
    *_ACTIVATIONS,
    _binary("add", lambda x, y, alpha: torch.add(x, _scaled(y, alpha)), "all"),
    _binary("sub", lambda x, y, alpha: torch.sub(x, _scaled(y, alpha)), "all"),
    _binary("rsub", lambda x, y, alpha: torch.rsub(_scaled(x, alpha), y), "all"),
    _binary("mul", lambda x, y, alpha: torch.mul(x, y), "any"),
    _binary("div", lambda x, y, alpha: torch.div(x, y), "never"),
    _extreme("maximum", torch.maximum),
    _extreme("minimum", torch.minimum),
)
