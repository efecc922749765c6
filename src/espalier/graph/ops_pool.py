"""Rows of OPS that reduce or resize the positions of every channel by itself: pooling, means, upsampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.op import Op, Parse, Parsed, batched, ints, only

_FUNCTIONS: dict[tuple[str, int], Callable[..., Tensor]] = {
    ("max", 1): F.max_pool1d,
    ("max", 2): F.max_pool2d,
    ("max", 3): F.max_pool3d,
    ("avg", 1): F.avg_pool1d,
    ("avg", 2): F.avg_pool2d,
    ("avg", 3): F.avg_pool3d,
    ("adaptive_avg", 1): F.adaptive_avg_pool1d,
    ("adaptive_avg", 2): F.adaptive_avg_pool2d,
    ("adaptive_avg", 3): F.adaptive_avg_pool3d,
    ("adaptive_max", 1): F.adaptive_max_pool1d,
    ("adaptive_max", 2): F.adaptive_max_pool2d,
    ("adaptive_max", 3): F.adaptive_max_pool3d,
}
_SIGNATURE = "n c * -> n c *"
_WINDOW = {"window": "sizes", "stride": "sizes", "padding": "sizes", "ceil_mode": "flag"}


def _pool(kind: str, extra: Mapping[str, str], parse_extra: Parse) -> Op:
    def reference(x: Tensor, *, training: bool, window: list[int], **a: Any) -> Tensor:
        stride, padding = a.pop("stride"), a.pop("padding")
        return _FUNCTIONS[kind, len(window)](x, window, stride, padding, **a)

    def parse(rank: int) -> Parse:
        def parsed(a: Mapping[str, Any]) -> Parsed:
            batched(a["self"], rank)
            window = ints(a["kernel_size"], rank)
            attrs: dict[str, Any] = {
                "window": window,
                "stride": ints(a["stride"], rank) if a["stride"] else window,
                "padding": ints(a["padding"], rank),
                "ceil_mode": bool(a["ceil_mode"]),
            }
            return [a["self"]], {**attrs, **parse_extra({**a, "rank": rank})[1]}

        return parsed

    targets = {f"aten.{kind}_pool{k}d.default": parse(k) for k in (1, 2, 3)}
    return Op(f"{kind}_pool", _SIGNATURE, "pool", reference, targets, {**_WINDOW, **extra})


def _max_extra(a: Mapping[str, Any]) -> Parsed:
    return [], {"dilation": ints(a["dilation"], a["rank"])}


def _avg_extra(a: Mapping[str, Any]) -> Parsed:
    only(a.get("divisor_override") is None, "average pooling with divisor_override")
    return [], {"count_include_pad": bool(a["count_include_pad"])}


def _adaptive(kind: str, *targets: str) -> Op:
    def parse(a: Mapping[str, Any]) -> Parsed:
        batched(a["self"], len(a["output_size"]))
        return [a["self"]], {"size": list(a["output_size"])}

    def reference(x: Tensor, training: bool, size: list[int | None]) -> Tensor:
        return _FUNCTIONS[kind, len(size)](x, size)

    return Op(f"{kind}_pool", _SIGNATURE, "pool", reference, dict.fromkeys(targets, parse), {"size": "sizes?s"})


def _parse_mean(a: Mapping[str, Any]) -> Parsed:
    only(a.get("dtype") is None, "a mean in another dtype")
    return [a["self"]], {"dims": list(a["dim"]), "keepdim": bool(a["keepdim"])}


def _parse_upsample(a: Mapping[str, Any]) -> Parsed:
    size, scale = a["output_size"], a["scale_factors"]
    attrs = {"size": None if size is None else list(size), "scale": None if scale is None else list(scale)}
    return [a["input"]], attrs | ({"align": bool(a["align_corners"])} if "align_corners" in a else {})


def _upsample(mode: str, ranks: Mapping[int, str], attrs: Mapping[str, str]) -> Op:
    def reference(
        x: Tensor, training: bool, size: list[int] | None, scale: list[float] | None, align: bool | None = None
    ) -> Tensor:
        return F.interpolate(x, size, scale, ranks[x.ndim - 2], align)

    targets = {f"aten.upsample_{full}{rank}d.vec": _parse_upsample for rank, full in ranks.items()}
    kinds = {"size": "sizes?", "scale": "numbers?", **attrs}
    return Op(f"upsample_{mode}", _SIGNATURE, "pool", reference, targets, kinds)


POOLS = (
    _pool("max", {"dilation": "sizes"}, _max_extra),
    _pool("avg", {"count_include_pad": "flag"}, _avg_extra),
    _adaptive("adaptive_avg", *(f"aten.adaptive_avg_pool{k}d.default" for k in (1, 2, 3))),
    _adaptive("adaptive_max"),
    Op(
        "mean",
        "n c * -> n c",
        "pool",
        lambda x, training, dims, keepdim: torch.mean(x, dims, keepdim),
        {"aten.mean.dim": _parse_mean},
        {"dims": "ints", "keepdim": "flag"},
    ),
    Op(
        "sum",
        "n c * -> n c",
        "pool",
        lambda x, training, dims, keepdim: torch.sum(x, dims, keepdim),
        {"aten.sum.dim_IntList": _parse_mean},
        {"dims": "ints", "keepdim": "flag"},
    ),
    _upsample("nearest", {1: "nearest", 2: "nearest", 3: "nearest"}, {}),
    _upsample("bilinear", {1: "linear", 2: "bilinear", 3: "trilinear"}, {"align": "flag"}),
)
