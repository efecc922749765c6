"""Rows of OPS that have weights or mix channels: convolution, linear, norms, attention's matmul and softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.op import Op, Parse, Parsed, batched, ints, only


def _conv(x: Tensor, w: Tensor, b: Tensor | None, *, training: bool, **a: Any) -> Tensor:
    op = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[w.ndim]
    return op(x, w, b, a["stride"], a["padding"], a["dilation"], a["conv_groups"])


def _parse_conv(rank: int) -> Parse:
    def parse(a: Mapping[str, Any]) -> Parsed:
        batched(a["input"], rank)
        attrs = {key: ints(a[key], rank) for key in ("stride", "padding", "dilation")}
        return [a["input"], a["weight"], a["bias"]], {**attrs, "conv_groups": a["groups"]}

    return parse


def _parse_padded_conv(rank: int) -> Parse:
    """padding="same" or "valid". What is not the same on both sides is left to a pad in front: attribute "before"."""

    def parse(a: Mapping[str, Any]) -> Parsed:
        batched(a["input"], rank)
        window, dilation = a["weight"].shape[2:], ints(a["dilation"], rank)
        total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, window)]
        attrs = {"stride": ints(a["stride"], rank), "dilation": dilation, "conv_groups": a["groups"]}
        attrs["padding"] = [t // 2 for t in total]
        if any(t % 2 for t in total):
            attrs["before"] = [amount for t in reversed(total) for amount in (0, t % 2)]
        return [a["input"], a["weight"], a["bias"]], attrs

    return parse


def _batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, w: Tensor | None, b: Tensor | None, *, training: bool, **a: Any
) -> Tensor:
    return F.batch_norm(x, mean, var, w, b, training, a["momentum"], a["eps"])


def _parse_batch_norm(a: Mapping[str, Any]) -> Parsed:
    only(not a.get("training") and a["running_mean"] is not None, "statistics of the batch, in eval mode too")
    inputs = [a["input"], a["running_mean"], a["running_var"], a["weight"], a["bias"]]
    return inputs, {"momentum": a["momentum"], "eps": a["eps"]}


def _parse_layer_norm(a: Mapping[str, Any]) -> Parsed:
    return [a["input"], a["weight"], a["bias"]], {"shape": list(a["normalized_shape"]), "eps": a["eps"]}


def _parse_group_norm(a: Mapping[str, Any]) -> Parsed:
    return [a["input"], a["weight"], a["bias"]], {"conv_groups": a["num_groups"], "eps": a["eps"]}


def _parse_two(second: str) -> Parse:
    return lambda a: ([a["self"], a[second]], {})


def _parse_softmax(a: Mapping[str, Any]) -> Parsed:
    only(a.get("dtype") is None and not a.get("half_to_float"), "a softmax in another dtype")
    return [a["self"]], {"dim": a["dim"]}


_CONV_ATTRS = {"stride": "sizes", "padding": "sizes", "dilation": "sizes", "conv_groups": "count"}

COMPUTE = (
    Op(
        "conv",
        "n i *, o i *, o -> n o *",
        "contract",
        _conv,
        {
            **{f"aten.conv{k}d.default": _parse_conv(k) for k in (1, 2, 3)},
            **{f"aten.conv{k}d.padding": _parse_padded_conv(k) for k in (1, 2, 3)},
        },
        _CONV_ATTRS,
    ),
    Op(
        "linear",
        "n * i, o i, o -> n * o",
        "contract",
        lambda x, w, b, training: F.linear(x, w, b),
        {"aten.linear.default": lambda a: ([a["input"], a["weight"], a["bias"]], {})},
    ),
    Op(
        "batch_norm",
        "n c *, c, c, c, c -> n c *",
        "norm",
        _batch_norm,
        {
            "aten.batch_norm.default": _parse_batch_norm,
            "aten._native_batch_norm_legit_no_training.default": _parse_batch_norm,
        },
        {"momentum": "number", "eps": "number"},
    ),
    Op(
        "layer_norm",
        "mixed",
        "mix",
        lambda x, w, b, training, shape, eps: F.layer_norm(x, shape, w, b, eps),
        {"aten.layer_norm.default": _parse_layer_norm},
        {"shape": "sizes", "eps": "number"},
    ),
    Op(
        "group_norm",
        "mixed",
        "mix",
        lambda x, w, b, training, conv_groups, eps: F.group_norm(x, conv_groups, w, b, eps),
        {"aten.group_norm.default": _parse_group_norm},
        {"conv_groups": "count", "eps": "number"},
    ),
    Op(
        "matmul",
        "mixed",
        "mix",
        lambda x, y, training: torch.matmul(x, y),
        {
            "aten.matmul.default": _parse_two("other"),
            "aten.bmm.default": _parse_two("mat2"),
            "aten.mm.default": _parse_two("mat2"),
        },
    ),
    Op(
        "softmax",
        "mixed",
        "mix",
        lambda x, training, dim: F.softmax(x, dim),
        {"aten.softmax.int": _parse_softmax, "aten._softmax.default": _parse_softmax},
        {"dim": "int"},
    ),
    Op(
        "log_softmax",
        "mixed",
        "mix",
        lambda x, training, dim: F.log_softmax(x, dim),
        {"aten.log_softmax.int": _parse_softmax, "aten._log_softmax.default": _parse_softmax},
        {"dim": "int"},
    ),
)
