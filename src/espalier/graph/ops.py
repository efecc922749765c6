"""OPS: one row per op that Espalier understands, with its channel signature and its reference (the oracle)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.op import Channels, Op, Parsed

OPS: dict[str, Op] = {}
TARGETS: dict[str, tuple[Op, Callable[[Mapping[str, Any]], Parsed]]] = {}


def add_op(op: Op) -> None:
    """Put a row into OPS. Raises ValueError for a name or an ATen overload that a row has already."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} stands twice in OPS")
    OPS[op.name] = op
    for target, parse in op.parse.items():
        if target in TARGETS:
            raise ValueError(f"{target} belongs to {TARGETS[target][0].name} and {op.name}")
        TARGETS[target] = (op, parse)


def _row(
    name: str,
    signature: str,
    channels: Channels,
    reference: Callable[..., Any],
    parse: Mapping[str, Callable[[Mapping[str, Any]], Parsed]],
    zero: str = "zero",
) -> None:
    add_op(Op(name, signature, channels, reference, parse, zero))  # type: ignore[arg-type]


def _ints(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


# -- compute --------------------------------------------------------------------------------------


def _conv(x: Tensor, w: Tensor, b: Tensor | None, *, training: bool, **a: Any) -> Tensor:
    op = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[w.ndim]
    return op(x, w, b, a["stride"], a["padding"], a["dilation"], a["conv_groups"])


def _parse_conv(rank: int) -> Callable[[Mapping[str, Any]], Parsed]:
    def parse(a: Mapping[str, Any]) -> Parsed:
        attrs = {key: _ints(a[key], rank) for key in ("stride", "dilation")}
        return [a["input"], a["weight"], a["bias"]], {
            **attrs,
            "padding": _ints(a["padding"], rank),
            "conv_groups": a["groups"],
        }

    return parse


def _parse_conv_padded(rank: int) -> Callable[[Mapping[str, Any]], Parsed]:
    def parse(a: Mapping[str, Any]) -> Parsed:
        window = a["weight"].shape[2:]
        dilation = _ints(a["dilation"], rank)
        total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, window)]
        if any(t % 2 for t in total):
            raise NotImplementedError("a window of even size with padding='same'")
        attrs = {"stride": _ints(a["stride"], rank), "dilation": dilation, "conv_groups": a["groups"]}
        return [a["input"], a["weight"], a["bias"]], {**attrs, "padding": [t // 2 for t in total]}

    return parse


_row(
    "conv",
    "n i *, o i *, o -> n o *",
    "contract",
    _conv,
    {
        **{f"aten.conv{k}d.default": _parse_conv(k) for k in (1, 2, 3)},
        **{f"aten.conv{k}d.padding": _parse_conv_padded(k) for k in (1, 2, 3)},
    },
    "constant",
)
_row(
    "linear",
    "n * i, o i, o -> n * o",
    "contract",
    lambda x, w, b, training: F.linear(x, w, b),
    {"aten.linear.default": lambda a: ([a["input"], a["weight"], a["bias"]], {})},
    "constant",
)
_row(
    "matmul",
    "mixed",
    "mix",
    lambda x, y, training: torch.matmul(x, y),
    {
        "aten.matmul.default": lambda a: ([a["self"], a["other"]], {}),
        "aten.bmm.default": lambda a: ([a["self"], a["mat2"]], {}),
        "aten.mm.default": lambda a: ([a["self"], a["mat2"]], {}),
    },
    "varies",
)


def _batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, w: Tensor | None, b: Tensor | None, *, training: bool, **a: Any
) -> Tensor:
    return F.batch_norm(x, mean, var, w, b, training, a["momentum"], a["eps"])


_row(
    "batch_norm",
    "n c *, c, c, c, c -> n c *",
    "norm",
    _batch_norm,
    {
        "aten.batch_norm.default": lambda a: (
            [a["input"], a["running_mean"], a["running_var"], a["weight"], a["bias"]],
            {"momentum": a["momentum"], "eps": a["eps"]},
        )
    },
    "constant",
)
_row(
    "layer_norm",
    "mixed",
    "mix",
    lambda x, w, b, training, shape, eps: F.layer_norm(x, shape, w, b, eps),
    {
        "aten.layer_norm.default": lambda a: (
            [a["input"], a["weight"], a["bias"]],
            {"shape": list(a["normalized_shape"]), "eps": a["eps"]},
        )
    },
    "varies",
)
_row(
    "group_norm",
    "mixed",
    "mix",
    lambda x, w, b, training, conv_groups, eps: F.group_norm(x, conv_groups, w, b, eps),
    {
        "aten.group_norm.default": lambda a: (
            [a["input"], a["weight"], a["bias"]],
            {"conv_groups": a["num_groups"], "eps": a["eps"]},
        )
    },
    "varies",
)

# -- activations ----------------------------------------------------------------------------------


def _unary(name: str, function: Callable[..., Tensor], *targets: str, zero: str = "zero", **attrs: str) -> None:
    """A row for a function of one tensor; `attrs` maps an attribute to the schema's name for it."""

    def parse(a: Mapping[str, Any]) -> Parsed:
        return [a["self"]], {key: a[source] for key, source in attrs.items()}

    _row(
        name,
        "n c * -> n c *",
        "elementwise",
        lambda x, training, **a: function(x, **a),
        {f"aten.{target}": parse for target in targets},
        zero,
    )


_unary("relu", F.relu, "relu.default", "relu_.default")
_row(
    "clamp",
    "n c * -> n c *",
    "elementwise",
    lambda x, training, min, max: x.clamp(min, max),
    {
        "aten.relu6.default": lambda a: ([a["self"]], {"min": 0.0, "max": 6.0}),
        "aten.relu6_.default": lambda a: ([a["self"]], {"min": 0.0, "max": 6.0}),
        "aten.hardtanh.default": lambda a: ([a["self"]], {"min": a["min_val"], "max": a["max_val"]}),
        "aten.hardtanh_.default": lambda a: ([a["self"]], {"min": a["min_val"], "max": a["max_val"]}),
        "aten.clamp.default": lambda a: ([a["self"]], {"min": a["min"], "max": a["max"]}),
        "aten.clamp_min.default": lambda a: ([a["self"]], {"min": a["min"], "max": None}),
    },
    "constant",
)
_unary(
    "leaky_relu",
    lambda x, slope: F.leaky_relu(x, slope),
    "leaky_relu.default",
    "leaky_relu_.default",
    slope="negative_slope",
)
_unary("elu", F.elu, "elu.default", "elu_.default", alpha="alpha")
_unary("sigmoid", torch.sigmoid, "sigmoid.default", "sigmoid_.default", zero="constant")
_unary("tanh", torch.tanh, "tanh.default", "tanh_.default")
_unary("silu", F.silu, "silu.default", "silu_.default")
_unary("mish", F.mish, "mish.default", "mish_.default")
_unary("hardswish", F.hardswish, "hardswish.default", "hardswish_.default")
_unary("hardsigmoid", F.hardsigmoid, "hardsigmoid.default", "hardsigmoid_.default", zero="constant")
_unary("softplus", F.softplus, "softplus.default", zero="constant", beta="beta", threshold="threshold")
_unary("gelu", F.gelu, "gelu.default", approximate="approximate")
_unary("exp", torch.exp, "exp.default", zero="constant")
_unary("sqrt", torch.sqrt, "sqrt.default")
_unary("abs", torch.abs, "abs.default")
_unary("neg", torch.neg, "neg.default")
_unary("square", torch.square, "square.default")


def _identity(x: Tensor) -> Tensor:
    return x


_unary(
    "identity",
    _identity,
    "contiguous.default",
    "clone.default",
    "detach.default",
    "detach_.default",
    "alias.default",
    "lift_fresh_copy.default",
    "_assert_tensor_metadata.default",
)
_row(
    "dropout",
    "n c * -> n c *",
    "elementwise",
    lambda x, training, p: F.dropout(x, p, training),
    {
        f"aten.{t}.default": (lambda a: ([a["input" if "input" in a else "self"]], {"p": a["p"]}))
        for t in ("dropout", "dropout_")
    },
)
_row(
    "softmax",
    "mixed",
    "mix",
    lambda x, training, dim: F.softmax(x, dim),
    {
        "aten.softmax.int": lambda a: ([a["self"]], {"dim": a["dim"]}),
        "aten._softmax.default": lambda a: ([a["self"]], {"dim": a["dim"]}),
    },
    "varies",
)
_row(
    "log_softmax",
    "mixed",
    "mix",
    lambda x, training, dim: F.log_softmax(x, dim),
    {"aten.log_softmax.int": lambda a: ([a["self"]], {"dim": a["dim"]})},
    "varies",
)

# -- arithmetic of two ----------------------------------------------------------------------------


def _binary(name: str, function: Callable[[Any, Any], Tensor], zero: str) -> None:
    def reference(x: Tensor, y: Tensor | None = None, *, training: bool, other: float = 0, alpha: float = 1) -> Tensor:
        second = other if y is None else y
        return function(x, second if alpha == 1 else second * alpha)

    def parse(a: Mapping[str, Any]) -> Parsed:
        alpha = {"alpha": a["alpha"]} if a.get("alpha", 1) != 1 else {}
        if isinstance(a["other"], (int, float)):
            return [a["self"]], {"other": a["other"], **alpha}
        return [a["self"], a["other"]], alpha

    targets = [f"aten.{name}{mark}.{kind}" for mark in ("", "_") for kind in ("Tensor", "Scalar")]
    _row(name, "n c *, n c * -> n c *", "elementwise", reference, {t: parse for t in targets}, zero)


_binary("add", torch.add, "constant")
_binary("sub", torch.sub, "constant")
_binary("mul", torch.mul, "product")
_binary("div", torch.div, "varies")

# -- pooling --------------------------------------------------------------------------------------


def _pool(kind: str) -> None:
    def reference(
        x: Tensor, *, training: bool, window: list[int], stride: list[int], padding: list[int], **a: Any
    ) -> Tensor:
        function = getattr(F, f"{kind}_pool{x.ndim - 2}d")
        return function(x, window, stride, padding, **a)

    def parse(rank: int) -> Callable[[Mapping[str, Any]], Parsed]:
        def parsed(a: Mapping[str, Any]) -> Parsed:
            window = _ints(a["kernel_size"], rank)
            attrs: dict[str, Any] = {
                "window": window,
                "stride": _ints(a["stride"], rank) if a["stride"] else window,
                "padding": _ints(a["padding"], rank),
                "ceil_mode": bool(a["ceil_mode"]),
            }
            if kind == "max":
                attrs["dilation"] = _ints(a["dilation"], rank)
            else:
                attrs["count_include_pad"] = bool(a["count_include_pad"])
                if a.get("divisor_override") is not None:
                    raise NotImplementedError("average pooling with divisor_override")
            return [a["self"]], attrs

        return parsed

    _row(
        f"{kind}_pool", "n c * -> n c *", "pool", reference, {f"aten.{kind}_pool{k}d.default": parse(k) for k in (1, 2)}
    )


_pool("max")
_pool("avg")
_row(
    "adaptive_avg_pool",
    "n c * -> n c *",
    "pool",
    lambda x, training, size: getattr(F, f"adaptive_avg_pool{len(size)}d")(x, size),
    {
        f"aten.adaptive_avg_pool{k}d.default": (lambda a: ([a["self"]], {"size": list(a["output_size"])}))
        for k in (1, 2)
    },
)
_row(
    "adaptive_max_pool",
    "n c * -> n c *",
    "pool",
    lambda x, training, size: getattr(F, f"adaptive_max_pool{len(size)}d")(x, size),
    {},
)
_row(
    "mean",
    "n c * -> n c",
    "pool",
    lambda x, training, dims, keepdim: x.mean(dims, keepdim),
    {"aten.mean.dim": lambda a: ([a["self"]], {"dims": list(a["dim"]), "keepdim": a["keepdim"]})},
)
_row(
    "upsample_nearest",
    "n c * -> n c *",
    "pool",
    lambda x, training, size, scale: F.interpolate(x, size, scale, "nearest"),
    {
        "aten.upsample_nearest2d.vec": lambda a: (
            [a["input"]],
            {
                "size": a["output_size"] and list(a["output_size"]),
                "scale": a["scale_factors"] and list(a["scale_factors"]),
            },
        )
    },
)
_row(
    "upsample_bilinear",
    "n c * -> n c *",
    "pool",
    lambda x, training, size, scale, align: F.interpolate(x, size, scale, "bilinear", align),
    {
        "aten.upsample_bilinear2d.vec": lambda a: (
            [a["input"]],
            {
                "size": a["output_size"] and list(a["output_size"]),
                "scale": a["scale_factors"] and list(a["scale_factors"]),
                "align": a["align_corners"],
            },
        )
    },
)

# -- data movement: run on channel labels, they say by themselves where channels go -----------------


def _move(name: str, function: Callable[..., Any], parse: Mapping[str, Callable[[Mapping[str, Any]], Parsed]]) -> None:
    def reference(*inputs: Tensor, training: bool = False, **attrs: Any) -> Any:
        return function(*inputs, **attrs)

    _row(name, "moved", "move", reference, {f"aten.{target}": p for target, p in parse.items()})


def _self(**names: str) -> Callable[[Mapping[str, Any]], Parsed]:
    """Parse `self` and the given attributes (attribute -> name in the schema)."""

    def parse(a: Mapping[str, Any]) -> Parsed:
        return [a["self"]], {k: list(a[s]) if isinstance(a[s], (list, tuple)) else a[s] for k, s in names.items()}

    return parse


def _gather_channels(x: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """Entries `index` of dimension `dim`, in that order; -1 gives zeros."""
    chosen = torch.tensor(index, device=x.device)
    taken = x.index_select(dim, chosen.clamp_min(0))
    shape = [1] * x.ndim
    shape[dim] = len(index)
    return taken.masked_fill((chosen < 0).reshape(shape), 0)


_move("concat", lambda *x, dim: torch.cat(x, dim), {"cat.default": lambda a: (list(a["tensors"]), {"dim": a["dim"]})})
_move(
    "stack", lambda *x, dim: torch.stack(x, dim), {"stack.default": lambda a: (list(a["tensors"]), {"dim": a["dim"]})}
)
_move(
    "flatten",
    lambda x, start, end: x.flatten(start, end),
    {"flatten.using_ints": _self(start="start_dim", end="end_dim")},
)
_move(
    "reshape",
    lambda x, shape: x.reshape(shape),
    {
        "view.default": _self(shape="size"),
        "reshape.default": _self(shape="shape"),
        "_unsafe_view.default": _self(shape="size"),
        "unflatten.int": lambda a: ([a["self"]], {"shape": None}),
    },
)
_move(
    "permute",
    lambda x, dims: x.permute(dims),
    {
        "permute.default": _self(dims="dims"),
        "transpose.int": lambda a: ([a["self"]], {"dims": _swapped(len(a["self"].shape), a["dim0"], a["dim1"])}),
    },
)
_move(
    "slice",
    lambda x, dim, start, end, step: x[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)],
    {"slice.Tensor": _self(dim="dim", start="start", end="end", step="step")},
)
_move("select", lambda x, dim, index: x.select(dim, index), {"select.int": _self(dim="dim", index="index")})
_move(
    "split",
    lambda x, sizes, dim: tuple(x.split(sizes, dim)),
    {
        "split.Tensor": _self(sizes="split_size", dim="dim"),
        "split_with_sizes.default": _self(sizes="split_sizes", dim="dim"),
        "chunk.default": _self(sizes="chunks", dim="dim"),  # capture turns the number of chunks into sizes
    },
)
_move(
    "pad",
    lambda x, amounts, value: F.pad(x, amounts, value=value),
    {
        "pad.default": lambda a: _parse_pad(a),
        "constant_pad_nd.default": lambda a: ([a["self"]], {"amounts": list(a["pad"]), "value": a["value"]}),
    },
)
_move(
    "squeeze",
    lambda x, dims: x.squeeze(tuple(dims)),
    {"squeeze.dim": lambda a: ([a["self"]], {"dims": [a["dim"]]}), "squeeze.dims": _self(dims="dim")},
)
_move("unsqueeze", lambda x, dim: x.unsqueeze(dim), {"unsqueeze.default": _self(dim="dim")})
_move("expand", lambda x, shape: x.expand(shape), {"expand.default": _self(shape="size")})
_move("flip", lambda x, dims: x.flip(dims), {"flip.default": _self(dims="dims")})
_move("gather_channels", _gather_channels, {})


def _swapped(rank: int, a: int, b: int) -> list[int]:
    dims = list(range(rank))
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _parse_pad(a: Mapping[str, Any]) -> Parsed:
    if a["mode"] != "constant":
        raise NotImplementedError(f"padding by {a['mode']}")
    return [a["self"]], {"amounts": list(a["pad"]), "value": a["value"] or 0.0}
