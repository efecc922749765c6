"""Steps for ops without weights: arithmetic, activations, pooling, movement."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from espalier.compiler.emit import (
    Activation,
    Emitter,
    activation_of,
    broadcast,
    fused_activation,
    merged,
)
from espalier.compiler.emit_tokens import move_at_one, reordered, target_like, turned
from espalier.compiler.fuse import IDENTITIES
from espalier.compiler.layout import Place, four, view
from espalier.compiler.program import dense_strides
from espalier.graph.ir import Node
from espalier.graph.ops import OPS

BINARY = {name: number for number, name in enumerate(("add", "sub", "mul", "div"))}


def unary(e: Emitter, node: Node) -> None:
    """An activation on its own."""
    activation = activation_of({"name": node.op, **node.attrs})
    _unary(e, node, activation, {})


def affine(e: Emitter, node: Node) -> None:
    """scale * x + shift per channel."""
    scale, shift = e.array(node.inputs[1]), e.array(node.inputs[2])
    _per_channel(e, node, scale, shift)


def batch_norm(e: Emitter, node: Node) -> None:
    """A norm that nothing took up, as scale and shift per channel from its running mean and variance."""
    mean, var, weight, bias = (e.array(name) for name in node.inputs[1:5])
    assert mean is not None and var is not None
    scale = 1 / np.sqrt(var.astype(np.float64) + node.attrs["eps"]) * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    _per_channel(e, node, scale.astype(np.float32), shift.astype(np.float32))


def _per_channel(e: Emitter, node: Node, scale: np.ndarray | None, shift: np.ndarray | None) -> None:
    arrays = {}
    if scale is not None:
        arrays["values"] = scale.reshape(-1)
    if shift is not None:
        arrays["bias"] = shift.reshape(-1)
    _unary(e, node, fused_activation(node), arrays)


def _unary(e: Emitter, node: Node, activation: Activation, arrays: dict[str, np.ndarray]) -> None:
    x = e.places[str(node.inputs[0])]
    per_channel = any(a.size > 1 for a in arrays.values())
    y = e.target(node.outputs[0]) if per_channel else target_like(e, node.outputs[0], x)
    out, a = y.operand(), x.operand()
    if len(y.shape) == 1 and per_channel:
        out, a = (replace(o, sizes=(1, o.sizes[3], 1, 1), strides=(0, o.strides[3], 0, 0)) for o in (out, a))
    if y.front() is None:
        sizes, (into, of) = merged(out.sizes, (out.strides, a.strides), 2 if per_channel else 0)
        out, a = replace(out, sizes=sizes, strides=into), replace(a, sizes=sizes, strides=of)
    e.step(
        name=node.name,
        op="unary",
        out=out,
        a=a,
        activation=activation,
        front=y.front(),
        arrays=arrays,
        nodes=(node.name,),
    )


def binary(e: Emitter, node: Node) -> None:
    """act(a op b), broadcast as PyTorch does; with a number in place of b, scale and shift."""
    if len([n for n in node.inputs if n is not None]) == 1:
        number = float(node.attrs["other"]) * float(node.attrs.get("alpha", 1))
        scale, shift = {"add": (1.0, number), "sub": (1.0, -number), "mul": (number, 0.0), "div": (0.0, 0.0)}[node.op]
        if node.op == "div":
            scale = 1.0 / number
        arrays = {"values": np.array([scale], np.float32), "bias": np.array([shift], np.float32)}
        _unary(e, node, fused_activation(node), arrays)
        return
    places = [_operand_place(e, str(name)) for name in node.inputs[:2]]
    whole = [p for p in places if p.shape == e.layout.shapes[node.outputs[0]]]
    y = target_like(e, node.outputs[0], next((p for p in whole if turned(p)), places[0]))
    operands = [broadcast(y.shape, reordered(p, y)) for p in places]
    out, front = y.operand(), y.front()
    if front is None:
        sizes, strides = merged(out.sizes, (out.strides, *[o.strides for o in operands]))
        out = replace(out, sizes=sizes, strides=strides[0])
        operands = [replace(o, sizes=sizes, strides=s) for o, s in zip(operands, strides[1:])]
    e.step(
        name=node.name,
        op="binary",
        out=out,
        a=operands[0],
        b=operands[1],
        activation=fused_activation(node),
        front=front,
        params=(BINARY[node.op],),
        nodes=(node.name,),
    )


def _operand_place(e: Emitter, name: str) -> Place:
    if name not in e.graph.tensors:
        return e.places[name]
    array = e.array(name)
    assert array is not None
    shape = array.shape[1:] if array.ndim > 1 and array.shape[0] == 1 else array.shape
    return Place(shape, dense_strides(shape), space="constant", constant=array)


def pool(e: Emitter, node: Node) -> None:
    """The maximum or mean of each window. x: [c, h, w] or [c, w]."""
    attrs = node.attrs
    (wy, wx), (sy, sx) = ([1, *attrs[k]][-2:] for k in ("window", "stride"))
    py, px = [0, *attrs["padding"]][-2:]
    dy, dx = [1, *attrs.get("dilation", [1, 1])][-2:]
    kind = 0 if node.op == "max_pool" else 1 if attrs["count_include_pad"] else 2
    y = e.target(node.outputs[0])
    params = (kind, wy, wx, sy, sx, py, px, dy, dx)
    x = e.places[str(node.inputs[0])].operand()
    e.step(name=node.name, op="pool", out=y.operand(), a=x, front=y.front(), params=params, nodes=(node.name,))


def adaptive(e: Emitter, node: Node) -> None:
    """The mean of as many parts of a plane as the output has pixels. x: [c, h, w] or [c, w]."""
    y = e.target(node.outputs[0])
    x = e.places[str(node.inputs[0])].operand()
    e.step(name=node.name, op="adaptive", out=y.operand(), a=x, front=y.front(), nodes=(node.name,))


def mean(e: Emitter, node: Node) -> None:
    """One kept dimension, one or two that are averaged over."""
    x = e.places[str(node.inputs[0])]
    dims = reduced(node, len(x.shape))
    kept = [d for d in range(len(x.shape)) if d not in dims]
    y = e.clean_target(node.outputs[0])
    channels = x.shape[kept[0]] if kept else 1
    into = y.strides[kept[0] if node.attrs["keepdim"] else 0] if kept else 0
    sizes, strides = ([1, *[p[d] for d in dims]][-2:] for p in (x.shape, x.strides))
    a_sizes = (1, channels, sizes[0], sizes[1])
    a_strides = (0, x.strides[kept[0]] if kept else 0, strides[0], strides[1])
    out = y.operand_of((1, channels, 1, 1), (0, into, 0, 0))
    e.step(name=node.name, op="adaptive", out=out, a=x.operand_of(a_sizes, a_strides), nodes=(node.name,))


def reduced(node: Node, rank: int) -> list[int]:
    """The dimensions of a sample that a mean goes over, counted without the batch; -1 stands for the batch."""
    return sorted(d - 1 if d >= 0 else d + rank for d in node.attrs["dims"])


def pad(e: Emitter, node: Node) -> None:
    """Fill the output with the number, then copy x into it. Amounts are 0 or more (`support`)."""
    x, y = e.places[str(node.inputs[0])], e.target(node.outputs[0])
    amounts, value = list(node.attrs["amounts"]), float(node.attrs["value"])
    if len(y.shape) == 3 and not any(amounts[:4]):
        _pad_channels(e, node, x, y, value)
        return
    e.clear(y, f"{node.name}/fill", value)
    before = [0] * len(y.shape)
    for k in range(len(amounts) // 2):
        before[-1 - k] = amounts[2 * k]
    offset = y.offset + int(np.dot(before, y.strides))
    _copy_inside(e, node, x, Place(x.shape, y.strides, offset, y.storage))


def _pad_channels(e: Emitter, node: Node, x: Place, y: Place, value: float) -> None:
    """Whole planes of the number in front of those of x, and behind them: nothing is written twice."""
    before = (*node.attrs["amounts"], 0, 0)[4]
    ends = {"fill": before, "copy": before + x.shape[0], "fill behind": y.shape[0]}
    first = 0
    for name, upto in ends.items():
        part = Place((upto - first, *y.shape[1:]), y.strides, y.offset + first * y.strides[0], y.storage)
        if name == "copy":
            e.copy(x, part, f"{node.name}/copy", (node.name,))
        elif upto > first:
            e.clear(part, f"{node.name}/{name}", value)
        first = upto


def _copy_inside(e: Emitter, node: Node, x: Place, inside: Place) -> None:
    """A copy into part of a place: margins belong to whoever wrote the whole."""
    sizes, strides = merged(four(x.shape, x.strides)[0], (four(x.shape, inside.strides)[1], x.operand().strides))
    out, a = inside.operand_of(sizes, strides[0]), x.operand_of(sizes, strides[1])
    e.step(name=f"{node.name}/copy", op="copy", out=out, a=a, nodes=(node.name,))


def concat(e: Emitter, node: Node) -> None:
    """Parts that were written in place are there already; the others are copied."""
    y = _concat_target(e, node)
    dim = node.attrs["dim"]
    dim = dim - 1 if dim > 0 else dim + len(y.shape)
    whole_planes = dim == 0
    if not whole_planes and y.front() is not None:
        e.clear(y, f"{node.name}/margins")
    offset = y.offset
    for name in map(str, node.inputs):
        x = _part_place(e, name)
        part = Place(x.shape, y.strides, offset, y.storage)
        in_place = x.storage == y.storage and x.space == "arena" and x.offset == offset and x.strides == y.strides
        if not in_place and whole_planes and len(y.shape) <= 3:
            e.copy(x, part, f"{node.name}/{name}", (node.name,))
        elif not in_place:
            _copy_inside(e, node, x, part)
        offset += x.shape[dim] * y.strides[dim]


def _part_place(e: Emitter, name: str) -> Place:
    if name not in e.graph.tensors:
        return e.places[name]
    array = e.array(name)
    assert array is not None
    array = np.ascontiguousarray(array[0])  # the same for every sample
    return Place(array.shape, dense_strides(array.shape), space="constant", constant=array)


def _concat_target(e: Emitter, node: Node) -> Place:
    """In the order of the largest part, where that is turned."""
    value = node.outputs[0]
    shape = e.layout.shapes[value]
    largest = max((_part_place(e, str(name)) for name in node.inputs), key=lambda p: math.prod(p.shape))
    return target_like(e, value, replace(largest, shape=shape))


def move(e: Emitter, node: Node) -> None:
    """A view where strides can say it; else a contiguous copy and a view of that."""
    if e.samples.strange(node):
        move_at_one(e, node)
        return
    value = str(node.inputs[0])
    source = e.places[value]
    if node.op in IDENTITIES:  # an output of the network: all others are gone
        e.places[node.outputs[0]] = source
        return
    attrs = {k: v for k, v in node.attrs.items() if k != "activation"}
    reference = OPS[node.op].reference
    places = view(source, reference, e.batch, attrs)
    if places is None and _read_by_linear_only(e, node):
        table = np.zeros(source.shape, np.int64)
        for d, (size, stride) in enumerate(zip(source.shape, source.strides)):
            table += (np.arange(size) * stride).reshape([-1 if k == d else 1 for k in range(len(source.shape))])
        e.tables[node.outputs[0]] = (source, table.reshape(-1))
        return
    if places is None:
        places = view(e.contiguous(source, value), reference, e.batch, attrs)
    assert places is not None, f"{node.op} of {value} is no view"
    for name, place in zip(node.outputs, places):
        e.places[name] = place


def _read_by_linear_only(e: Emitter, node: Node) -> bool:
    """Then the linear layer's indices undo the layout, and nothing is copied."""
    out = node.outputs[0]
    if node.op not in ("flatten", "reshape") or len(e.layout.shapes[out]) != 1 or out in e.graph.outputs:
        return False
    return all(r.op == "linear" and r.inputs[0] == out and out not in r.inputs[1:] for r in e.graph.readers()[out])


MOVES = (
    "flatten",
    "reshape",
    "permute",
    "transpose",
    "slice",
    "select",
    "split",
    "unbind",
    "squeeze",
    "unsqueeze",
    "expand",
    *IDENTITIES,
)
