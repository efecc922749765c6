"""Rows of OPS that transformers and decoders add: attention, embedding, transposed convolution, weight norm.

All of them mix channels in ways that nobody may cut into: what touches them is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.op import Op, Parse, Parsed, batched, ints, only


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, training: bool, scale: float, causal: bool
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def _parse_attention(a: Mapping[str, Any]) -> Parsed:
    only(a["dropout_p"] == 0 and not a["enable_gqa"], "attention with dropout, or with shared heads")
    only(a["attn_mask"] is None or a["attn_mask"].dtype == a["query"].dtype, "a mask of truth values")
    scale = 1 / math.sqrt(a["query"].shape[-1]) if a["scale"] is None else a["scale"]
    return [a["query"], a["key"], a["value"], a["attn_mask"]], {"scale": float(scale), "causal": bool(a["is_causal"])}


def _parse_embedding(a: Mapping[str, Any]) -> Parsed:
    only(not a["scale_grad_by_freq"] and not a["sparse"], "an embedding with gradients of its own")
    row = a["padding_idx"]
    return [a["weight"], a["indices"]], {"padding_row": None if row is None or row < 0 else row}


def _transposed(x: Tensor, w: Tensor, b: Tensor | None, *, training: bool, **a: Any) -> Tensor:
    op = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[w.ndim]
    return op(x, w, b, a["stride"], a["padding"], a["extra"], a["conv_groups"], a["dilation"])


def _parse_transposed(rank: int) -> Parse:
    def parse(a: Mapping[str, Any]) -> Parsed:
        batched(a["input"], rank)
        attrs = {key: ints(a[key], rank) for key in ("stride", "padding", "dilation")}
        attrs["extra"] = ints(a["output_padding"], rank)
        return [a["input"], a["weight"], a["bias"]], {**attrs, "conv_groups": a["groups"]}

    return parse


def _weight_norm(v: Tensor, g: Tensor, training: bool, dim: int, norms: bool) -> Tensor | tuple[Tensor, Tensor]:
    norm = torch.norm_except_dim(v, 2, dim)
    weight = v * (g / norm)
    return (weight, norm) if norms else weight


def _parse_weight_norm(norms: bool) -> Parse:
    return lambda a: ([a["v"], a["g"]], {"dim": a["dim"], "norms": norms})


_TRANSPOSED = {**dict.fromkeys(("stride", "padding", "extra", "dilation"), "sizes"), "conv_groups": "count"}

TOKENS = (
    Op(
        "attention",
        "mixed",
        "mix",
        _attention,
        {"aten.scaled_dot_product_attention.default": _parse_attention},
        {"scale": "number", "causal": "flag"},
    ),
    Op(
        "embedding",
        "mixed",
        "mix",
        lambda w, index, training, padding_row: F.embedding(index, w, padding_row),
        {"aten.embedding.default": _parse_embedding},
        {"padding_row": "int?"},
    ),
    Op(
        "conv_transpose",
        "mixed",
        "mix",
        _transposed,
        {
            "aten.conv_transpose1d.default": _parse_transposed(1),
            "aten.conv_transpose2d.input": _parse_transposed(2),
            "aten.conv_transpose3d.input": _parse_transposed(3),
        },
        _TRANSPOSED,
    ),
    Op(
        "weight_norm",
        "mixed",
        "mix",
        _weight_norm,
        {
            "aten._weight_norm.default": _parse_weight_norm(False),
            "aten._weight_norm_interface.default": _parse_weight_norm(True),
        },
        {"dim": "int", "norms": "flag"},
    ),
)
