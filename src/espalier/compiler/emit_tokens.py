"""Steps for values whose channels are their last dimension: tokens through linear layers, norms, softmax, attention.

They are stored turned: one plane per channel, tokens side by side, so that vectors run along the tokens as they do
along the pixels of an image. A linear layer over tokens then is the kernel of 1x1 convolutions, a norm works on a
vector of tokens at once, and splitting channels into heads costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from espalier.compiler import emit_blocks
from espalier.compiler.blocks import choose
from espalier.compiler.emit import Emitter, fused_activation
from espalier.compiler.layout import Place, Storage
from espalier.compiler.program import Four, Operand, Step, dense_strides
from espalier.graph.ir import Node
from espalier.graph.ops import OPS

FEWEST = 4  # tokens for which turning pays
_CHUNK_FLOATS = 48 * 1024


# -- places ----------------------------------------------------------------------------------------


def turned(place: Place) -> bool:
    """Whether neighbours in memory are neighbours along another dimension than the last."""
    if place.space != "arena" or len(place.shape) < 2 or place.shape[-1] == 1 or place.strides[-1] <= 1:
        return False
    return any(size > 1 and stride == 1 for size, stride in zip(place.shape, place.strides))


def ordered(e: Emitter, name: str, shape: tuple[int, ...], order: tuple[int, ...]) -> Place:
    """A place of its own whose dimensions lie in memory in this order, the slowest first."""
    strides, size = [0] * len(shape), 1
    for k, dim in enumerate(reversed(order)):
        if k == len(order) - 1 and size >= 256:  # planes begin in different cache sets: an odd number of cache lines
            size = (-(-size // 16) | 1) * 16
        strides[dim] = size
        size *= shape[dim]
    storage = e.use(Storage(f"{name}/{len(e.storages)}", 1, 1, size, size, size))
    return Place(shape, tuple(strides), 0, storage)


def channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order in which the last dimension is the slowest."""
    return (len(shape) - 1, *range(len(shape) - 1))


def heads_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order in which the last two dimensions change places."""
    return (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)


def target_like(e: Emitter, value: str, model: Place) -> Place:
    """Where a step writes `value` that works entry by entry on `model`: in the same order, where that one is turned."""
    shape = e.layout.shapes[value]
    if not turned(model) or model.shape != shape:
        return e.target(value)
    order = sorted(range(len(shape)), key=lambda d: (-model.strides[d] if shape[d] > 1 else -math.inf, d))
    place = ordered(e, value, shape, tuple(order))
    e.places[value] = place
    return place


def reordered(place: Place, like: Place) -> Place:
    """A constant laid out in memory as `like` is."""
    if place.constant is None or place.shape != like.shape:
        return place
    order = sorted(range(len(like.shape)), key=lambda d: -like.strides[d])
    array = np.ascontiguousarray(np.asarray(place.constant).reshape(place.shape).transpose(order))
    strides = [0] * len(order)
    for dim, stride in zip(order, dense_strides(array.shape)):
        strides[dim] = stride
    return replace(place, strides=tuple(strides), constant=array)


def _runs(place: Place) -> tuple[int, int, int] | None:
    """The positions (all dimensions but the last) as runs side by side: how many, how long, how far apart."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(place.shape[:-1], place.strides[:-1]):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if place.space != "arena" or not merged or merged[-1][1] != 1 or len(merged) > 2:
        return None
    return (1, merged[0][0], 0) if len(merged) == 1 else (merged[0][0], merged[1][0], merged[0][1])


def _side_by_side(e: Emitter, place: Place, name: str) -> Place:
    """`place`, or a copy of it, with its positions side by side."""
    if _runs(place) is not None:
        return place
    copied = ordered(e, name, place.shape, channels_first(place.shape))
    e.copy(place, copied, f"{name}/turned")
    return copied


# -- linear layers ---------------------------------------------------------------------------------


def linear(e: Emitter, node: Node) -> None:
    """Over many tokens, as a convolution of 1x1 windows over them; over few, row by row."""
    shape = e.layout.shapes[str(node.inputs[0])]
    if node.inputs[0] in e.tables or math.prod(shape[:-1]) < FEWEST:
        emit_blocks.linear(e, node)
        return
    w = e.array(node.inputs[1])
    assert w is not None
    choice = choose(w, "conv")
    x = _side_by_side(e, e.places[str(node.inputs[0])], str(node.inputs[0]))
    runs = _runs(x)
    assert runs is not None
    segments, length, apart = runs
    value = node.outputs[0]
    out_shape = e.layout.shapes[value]
    out = ordered(e, value, out_shape, channels_first(out_shape))
    e.places[value] = out

    def operand(place: Place, between: int) -> Operand:
        sizes = (1, place.shape[-1], segments, length)
        return place.operand_of(sizes, (0, place.strides[-1], between, 1))

    residual, between = Operand(), 0
    if len(node.inputs) > 3:
        name = str(node.inputs[3])
        place = e.places[name]
        if _runs(place) != (segments, length, apart) and (_runs(place) or (0,))[0] != 1:
            copied = ordered(e, name, place.shape, channels_first(place.shape))
            e.copy(place, copied, f"{name}/turned")
            place = copied
        count, _, stride = _runs(place)  # type: ignore[misc]
        between = length if count == 1 else stride
        residual = operand(place, between)
    chunk = max(192, min(8192, _CHUNK_FLOATS // w.shape[1]))
    e.steps.append(
        Step(
            name=node.name,
            op="conv",
            out=operand(out, length),
            a=operand(x, apart),
            b=residual,
            activation=fused_activation(node),
            params=(choice.blocks.height, segments, length, apart, length, between, chunk),
            arrays=emit_blocks._arrays(choice, choice.blocks.columns * x.strides[-1], e.array(node.inputs[2])),
            **emit_blocks._facts(node, choice, w),
        )
    )


# -- norms, softmax --------------------------------------------------------------------------------


def layer_norm(e: Emitter, node: Node) -> None:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    weight, bias = ((*node.inputs, None, None)[k] for k in (1, 2))
    arrays = {}
    for key, name in (("values", weight), ("bias", bias)):
        array = e.array(name)
        if array is not None:
            arrays[key] = array
    _over(e, node, -1, op="norm", activation=("none", float(node.attrs["eps"]), 0.0), arrays=arrays)


def softmax(e: Emitter, node: Node) -> None:
    """exp(x) / sum exp(x) over `dim`, or its logarithm. Dimensions are the graph's: 0 is the batch."""
    rank = len(e.layout.shapes[node.outputs[0]])
    dim = node.attrs["dim"]
    dim = dim - 1 if dim > 0 else dim + rank
    _over(e, node, dim, op="softmax", params=(int(node.op == "log_softmax"),))


def _over(e: Emitter, node: Node, dim: int, **fields: object) -> None:
    """A step over dimension `dim`, all others being positions."""
    x = e.places[str(node.inputs[0])]
    if len(_positions(x, x, dim)) > 3:
        x = e.contiguous(x, str(node.inputs[0]))
    y = target_like(e, node.outputs[0], x)
    if y.front() is not None:
        e.clear(y, f"{node.outputs[0]}/margins")
    _over_places(e, node, x, y, dim, **fields)


def _over_places(e: Emitter, node: Node, x: Place, y: Place, dim: int, **fields: object) -> None:
    positions = _positions(x, y, dim)
    sizes = [1] * (3 - len(positions)) + [p[0] for p in positions] + [x.shape[dim]]
    into, of = ([0] * (3 - len(positions)) + [p[k] for p in positions] for k in (2, 1))
    out = y.operand_of(tuple(sizes), (*into, y.strides[dim]))  # type: ignore[arg-type]
    a = x.operand_of(tuple(sizes), (*of, x.strides[dim]))  # type: ignore[arg-type]
    e.step(name=node.name, out=out, a=a, nodes=(node.name,), **fields)


def _positions(x: Place, y: Place, dim: int) -> list[tuple[int, int, int]]:
    """All dimensions but one as (size, stride in x, stride in y), merged where they can be, the densest last."""
    dim %= len(x.shape)
    rows = [(n, a, b) for d, (n, a, b) in enumerate(zip(x.shape, x.strides, y.strides)) if d != dim and n > 1]
    rows.sort(key=lambda row: -row[2])
    merged: list[tuple[int, int, int]] = []
    for n, a, b in rows:
        if merged and merged[-1][1] == n * a and merged[-1][2] == n * b:
            merged[-1] = (merged[-1][0] * n, a, b)
        else:
            merged.append((n, a, b))
    return merged


# -- products of activations -----------------------------------------------------------------------


def matmul(e: Emitter, node: Node) -> None:
    """a @ b of two activations. a: [..., rows, k]; b: [..., k, columns]."""
    a, b = (e.places[str(name)] for name in node.inputs[:2])
    e.places[node.outputs[0]] = _product(e, node, a, b, node.outputs[0], 1.0)


def attention(e: Emitter, node: Node) -> None:
    """softmax(scale * q k' + mask) v, heads one after another, queries along the vectors."""
    q, k, v = (e.places[str(name)] for name in node.inputs[:3])
    turned_k = replace(k, shape=(*k.shape[:-2], *k.shape[:-3:-1]), strides=(*k.strides[:-2], *k.strides[:-3:-1]))
    scores = _product(e, node, q, turned_k, f"{node.name}/scores", float(node.attrs["scale"]))
    masks = [_mask(e, str(node.inputs[3]))] if node.inputs[3] is not None else []
    if node.attrs["causal"]:
        later = np.triu(np.full(scores.shape[-2:], -np.inf, np.float32), 1)
        masks.append(Place(later.shape, dense_strides(later.shape), space="constant", constant=later))
    for mask in masks:
        lead = len(scores.shape) - len(mask.shape)
        strides = [0] * lead + [0 if n == 1 else s for n, s in zip(mask.shape, mask.strides)]
        out = _four(scores)
        added = mask.operand_of(_four(scores).sizes, _padded(tuple(strides)))
        e.step(name=f"{node.name}/mask", op="binary", out=out, a=out, b=added, params=(0,), nodes=(node.name,))
    _over_places(e, node, scores, scores, -1, op="softmax", params=(0,))
    e.places[node.outputs[0]] = _product(e, node, scores, v, node.outputs[0], 1.0)


def _mask(e: Emitter, name: str) -> Place:
    if name not in e.graph.tensors:
        return e.places[name]
    array = e.array(name)
    assert array is not None
    shape = array.shape[1:] if array.ndim > 3 or (array.ndim == 3 and array.shape[0] == 1) else array.shape
    return Place(shape, dense_strides(shape), space="constant", constant=array)


def _product(e: Emitter, node: Node, a: Place, b: Place, name: str, scale: float) -> Place:
    """A place that holds scale * a @ b: turned, so that the rows of `a` are what vectors run along."""
    shape = (*a.shape[:-1], b.shape[-1])
    if a.space != "arena" or a.strides[-2] != 1:
        copied = ordered(e, f"{name}/left", a.shape, heads_first(a.shape))
        e.copy(a, copied, f"{name}/left")
        a = copied
    out = ordered(e, name, shape, heads_first(shape))
    swap = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)

    def across(place: Place) -> Operand:
        return _four(
            replace(place, shape=tuple(place.shape[d] for d in swap), strides=tuple(place.strides[d] for d in swap))
        )

    e.step(
        name=node.name,
        op="matmul",
        out=across(out),
        a=across(b),
        b=across(a),
        activation=("none", scale, 0.0),
        nodes=(node.name,),
    )
    return out


def _four(place: Place) -> Operand:
    lead = (1,) * (4 - len(place.shape))
    return place.operand_of((*lead, *place.shape), _padded(place.strides))  # type: ignore[arg-type]


def _padded(strides: tuple[int, ...]) -> Four:
    return (*(0,) * (4 - len(strides)), *strides)  # type: ignore[return-value]


# -- movement --------------------------------------------------------------------------------------


def expand_batch(e: Emitter, node: Node) -> None:
    """A constant, the same for every sample."""
    array = e.array(node.inputs[0])
    assert array is not None
    shape = e.layout.shapes[node.outputs[0]]
    own = (1,) * (len(shape) + 1 - array.ndim) + array.shape
    strides = tuple(0 if n == 1 else s for n, s in zip(own, dense_strides(own)))
    e.places[node.outputs[0]] = Place(shape, strides[1:], space="constant", constant=array)


def move_at_one(e: Emitter, node: Node) -> None:
    """A movement of values whose batch lies in another dimension than the first, at a batch of one."""
    value = str(node.inputs[0])
    source = e.places[value]
    attrs = {k: v for k, v in node.attrs.items() if k != "activation"}
    places = _views_at_one(e, node, source, attrs)
    if places is None:
        places = _views_at_one(e, node, e.contiguous(source, value), attrs)
    assert places is not None, f"{node.op} of {value} is no view"
    e.places.update(zip(node.outputs, places))


def _views_at_one(e: Emitter, node: Node, source: Place, attrs: dict[str, object]) -> list[Place] | None:
    strange = e.samples.shapes
    shape, strides = source.shape, source.strides
    if node.inputs[0] not in strange:
        shape, strides = (1, *shape), (1, *strides)
    meta = torch.empty_strided(shape, strides, device="meta")
    try:
        result = OPS[node.op].reference(meta, training=False, **attrs)
    except RuntimeError:
        return None
    places = []
    for name, tensor in zip(node.outputs, (result,) if isinstance(result, torch.Tensor) else result):
        if tensor is not meta and tensor._base is None:
            return None
        drop = 0 if name in strange else 1
        offset = source.offset + int(tensor.storage_offset())
        places.append(
            replace(source, shape=tuple(tensor.shape[drop:]), strides=tuple(tensor.stride()[drop:]), offset=offset)
        )
    return places
