"""Rows of OPS that only move entries: run on channel labels, they say by themselves where channels go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.graph.op import Op, Parse, Parsed, only


def _move(name: str, function: Callable[..., Any], parse: Mapping[str, Parse], attrs: Mapping[str, str]) -> Op:
    def reference(*inputs: Tensor, training: bool = False, **given: Any) -> Any:
        return function(*inputs, **given)

    return Op(name, "moved", "move", reference, {f"aten.{target}": p for target, p in parse.items()}, attrs)


def _self(**names: str) -> Parse:
    """Parse `self` and the given attributes (attribute -> name in the schema)."""

    def parse(a: Mapping[str, Any]) -> Parsed:
        return [a["self"]], {k: list(a[s]) if isinstance(a[s], (list, tuple)) else a[s] for k, s in names.items()}

    return parse


def _tensors(a: Mapping[str, Any]) -> Parsed:
    return list(a["tensors"]), {"dim": a["dim"]}


def _shaped(a: Mapping[str, Any]) -> Parsed:
    """The shape itself is read off the result, where what follows the batch becomes -1."""
    return [a["self"]], {"shape": []}


def _permuted(order: Callable[[Mapping[str, Any], int], Sequence[int]]) -> Parse:
    return lambda a: ([a["self"]], {"dims": list(order(a, len(a["self"].shape)))})


def _swapped(rank: int, a: int, b: int) -> list[int]:
    dims = list(range(rank))
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _moved(a: Mapping[str, Any], rank: int) -> list[int]:
    source, target = (
        [d % rank for d in ([a[k]] if isinstance(a[k], int) else a[k])] for k in ("source", "destination")
    )
    rest = iter(d for d in range(rank) if d not in source)
    return [source[target.index(d)] if d in target else next(rest) for d in range(rank)]


def _parse_pad(a: Mapping[str, Any]) -> Parsed:
    only(a.get("mode", "constant") == "constant", "padding by other things than a number")
    return [a["self"]], {"amounts": list(a["pad"]), "value": float(a["value"] or 0)}


def _parse_squeeze(a: Mapping[str, Any]) -> Parsed:
    dims = [a["dim"]] if isinstance(a["dim"], int) else list(a["dim"])
    rank = len(a["self"].shape)
    return [a["self"]], {"dims": [d for d in dims if a["self"].shape[d % rank] == 1]}


def _parse_narrow(a: Mapping[str, Any]) -> Parsed:
    only(type(a["start"]) is int and a["start"] >= 0, "a narrow from a computed place")
    return [a["self"]], {"dim": a["dim"], "start": a["start"], "end": a["start"] + a["length"], "step": 1}


def _parse_index_select(a: Mapping[str, Any]) -> Parsed:
    only(a["index"].constant is not None, "an index that is computed")
    return [a["self"]], {"dim": a["dim"], "index": a["index"].constant.tolist()}


def _parse_index(a: Mapping[str, Any]) -> Parsed:
    chosen = [k for k, index in enumerate(a["indices"]) if index is not None]
    only(len(chosen) == 1, "several indices")
    index = a["indices"][chosen[0]].constant
    only(index is not None and index.ndim == 1 and index.dtype != torch.bool, "an index that is computed")
    size = a["self"].shape[chosen[0]]
    return [a["self"]], {"dim": chosen[0], "index": [int(k) % int(size) for k in index]}


def _slice(x: Tensor, dim: int, start: int, end: int | None, step: int) -> Tensor:
    return x[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)]


def _gather_channels(x: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """Entries `index` of dimension `dim`, in that order; -1 gives zeros."""
    dim %= x.ndim
    size = x.shape[dim]
    if -1 in index:
        x = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, 1])
    return x.index_select(
        dim, torch.tensor([size if k == -1 else k for k in index], dtype=torch.int64, device=x.device)
    )


def _expand_batch(x: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` repeated to as many samples as `like` has; the rest of `shape` as in expand."""
    return x.expand(like.shape[0], *shape[1:])


def _pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    *batch, c, h, w = x.shape
    split = x.reshape(*batch, c // factor**2, factor, factor, h, w)
    k = len(batch)
    order = (*range(k), k, k + 3, k + 1, k + 4, k + 2)
    return split.permute(order).reshape(*batch, c // factor**2, h * factor, w * factor)


def _channel_shuffle(x: Tensor, conv_groups: int) -> Tensor:
    n, c = x.shape[:2]
    return x.reshape(n, conv_groups, c // conv_groups, math.prod(x.shape[2:])).transpose(1, 2).reshape(x.shape)


MOVES = (
    _move(
        "concat",
        lambda *x, dim: torch.cat(x, dim),
        {"cat.default": _tensors, "concat.default": _tensors},
        {"dim": "int"},
    ),
    _move("stack", lambda *x, dim: torch.stack(x, dim), {"stack.default": _tensors}, {"dim": "int"}),
    _move(
        "flatten",
        lambda x, start, end: x.flatten(start, end),
        {"flatten.using_ints": _self(start="start_dim", end="end_dim")},
        {"start": "int", "end": "int"},
    ),
    _move(
        "reshape",
        lambda x, shape: x.reshape(shape),
        {
            f"{target}": _shaped
            for target in (
                *("view.default", "reshape.default", "_unsafe_view.default", "unflatten.int"),
                *("view_as.default", "reshape_as.default", "squeeze.default"),
            )
        },
        {"shape": "ints"},
    ),
    _move(
        "permute",
        lambda x, dims: x.permute(dims),
        {
            "permute.default": _self(dims="dims"),
            "transpose.int": _permuted(lambda a, rank: _swapped(rank, a["dim0"], a["dim1"])),
            "swapaxes.default": _permuted(lambda a, rank: _swapped(rank, a["axis0"], a["axis1"])),
            "t.default": _permuted(lambda a, rank: range(rank)[::-1]),
            "numpy_T.default": _permuted(lambda a, rank: range(rank)[::-1]),
            "mT.default": _permuted(lambda a, rank: _swapped(rank, -1, -2)),
            "movedim.int": _permuted(_moved),
            "movedim.intlist": _permuted(_moved),
        },
        {"dims": "ints"},
    ),
    _move(
        "slice",
        _slice,
        {"slice.Tensor": _self(dim="dim", start="start", end="end", step="step"), "narrow.default": _parse_narrow},
        {"dim": "int", "start": "int", "end": "int?", "step": "count"},
    ),
    _move(
        "select",
        lambda x, dim, index: x.select(dim, index),
        {"select.int": _self(dim="dim", index="index")},
        {"dim": "int", "index": "int"},
    ),
    _move(
        "split",
        lambda x, sizes, dim: tuple(x.split(sizes, dim)),
        {
            "split.Tensor": _self(sizes="split_size", dim="dim"),  # capture reads the sizes off the results
            "split.sizes": _self(sizes="split_size", dim="dim"),
            "split_with_sizes.default": _self(sizes="split_sizes", dim="dim"),
            "chunk.default": _self(sizes="chunks", dim="dim"),
            "tensor_split.sections": _self(sizes="sections", dim="dim"),
        },
        {"sizes": "sizes", "dim": "int"},
    ),
    _move("unbind", lambda x, dim: tuple(x.unbind(dim)), {"unbind.int": _self(dim="dim")}, {"dim": "int"}),
    _move(
        "pad",
        lambda x, amounts, value: F.pad(x, amounts, value=value),
        {"pad.default": _parse_pad, "constant_pad_nd.default": _parse_pad},
        {"amounts": "ints", "value": "number"},
    ),
    _move(
        "squeeze",
        lambda x, dims: x.squeeze(tuple(dims)),
        {"squeeze.dim": _parse_squeeze, "squeeze.dims": _parse_squeeze},
        {"dims": "ints"},
    ),
    _move("unsqueeze", lambda x, dim: x.unsqueeze(dim), {"unsqueeze.default": _self(dim="dim")}, {"dim": "int"}),
    _move(
        "expand",
        lambda x, shape: x.expand(shape),
        {"expand.default": _shaped, "expand_as.default": _shaped},
        {"shape": "ints"},
    ),
    _move("expand_batch", _expand_batch, {}, {"shape": "ints"}),  # capture's word for an expand to the batch size
    _move("repeat", lambda x, times: x.repeat(times), {"repeat.default": _self(times="repeats")}, {"times": "sizes"}),
    _move("flip", lambda x, dims: x.flip(dims), {"flip.default": _self(dims="dims")}, {"dims": "ints"}),
    _move(
        "roll",
        lambda x, shifts, dims: x.roll(shifts, dims),
        {"roll.default": _self(shifts="shifts", dims="dims")},
        {"shifts": "ints", "dims": "ints"},
    ),
    _move(
        "pixel_shuffle", _pixel_shuffle, {"pixel_shuffle.default": _self(factor="upscale_factor")}, {"factor": "count"}
    ),
    _move(
        "channel_shuffle",
        _channel_shuffle,
        {"channel_shuffle.default": _self(conv_groups="groups")},
        {"conv_groups": "count"},
    ),
    _move(
        "gather_channels",
        _gather_channels,
        {"index_select.default": _parse_index_select, "index.Tensor": _parse_index},
        {"dim": "int", "index": "ints"},
    ),
)
