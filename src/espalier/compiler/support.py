"""What the engine can run: for every op a row with its check and the function that writes its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from espalier.compiler import emit_depthwise, emit_ops, emit_resize, emit_tokens
from espalier.compiler.emit import Emitter
from espalier.compiler.fuse import ACTIVATIONS
from espalier.compiler.samples import Samples, follows
from espalier.compiler.transposed import transposed_as_conv
from espalier.errors import CompileError
from espalier.graph.ir import Graph, Node
from espalier.graph.ops import OPS

MAX_RANK = 4  # of one sample
MAX_POOL_REACH = 2048  # ESP_POOL_REACH of native/src/program.h

Check = Callable[[Graph, Node], str]  # why not, or ""


@dataclass(frozen=True)
class Lowering:
    """How an op becomes steps.

    check: why a node of it cannot, or "". fresh: it writes values rather than viewing others.
    """

    emit: Callable[[Emitter, Node], None]
    check: Check
    fresh: bool = True


def why_not(graph: Graph, node: Node, batch: int, samples: Samples) -> str:
    """Why the engine cannot run `node`; "" when it can. batch: size of dimension 0 in the captured graph."""
    row = LOWERINGS.get(node.op)
    if row is None:
        return f"no kernel for {node.target or node.op}" if node.op == "opaque" else f"no kernel for {node.op}"
    activations = [n for n in (*node.inputs, *node.outputs) if n is not None and n not in graph.tensors]
    for name in activations:
        value = graph.values[name]
        if value.dtype != torch.float32:
            return f"{name} is {value.dtype}, kernels are float32"
        if not follows(graph, value, batch) and name not in samples.shapes:
            return f"{name} does not follow the batch"
        if len(value.shape) - 1 > MAX_RANK and OPS[node.op].channels != "move":
            return f"{name} has {len(value.shape) - 1} dimensions beside the batch, kernels take {MAX_RANK}"
        if not all(value.shape):
            return f"{name} is empty"
    if samples.strange(node) and node.name not in samples.fine:
        return "the batch is not its first dimension"
    return row.check(graph, node)


def _rank(graph: Graph, node: Node) -> int:
    """Of input 0, without the batch."""
    return len(graph.values[str(node.inputs[0])].shape) - 1


def _constants(graph: Graph, node: Node) -> str:
    # input 3 of a conv or linear is a fused residual
    weights = node.inputs[1:3] if node.op in ("conv", "linear") else node.inputs[1:]
    missing = [n for n in weights if n is not None and n not in graph.tensors]
    if missing:
        return f"{missing[0]} is computed, not a weight"
    strange = [n for n in weights if n is not None and not graph.tensors[n].is_floating_point()]
    return f"{strange[0]} is not floating point" if strange else ""


def _conv(graph: Graph, node: Node) -> str:
    if node.inputs[0] in graph.tensors:
        return "its input is a constant"
    weight = graph.values[str(node.inputs[1])].shape
    if len(weight) > 4 or _rank(graph, node) != len(weight) - 1:
        return "convolutions in three dimensions"
    return _constants(graph, node)


def _linear(graph: Graph, node: Node) -> str:
    shape = graph.values[str(node.inputs[0])].shape
    if node.inputs[0] in graph.tensors or len(shape) < 2:
        return "its input is a constant"
    return _constants(graph, node)


def _planar(graph: Graph, node: Node) -> str:
    if node.inputs[0] in graph.tensors:
        return "its input is a constant"
    return "" if _rank(graph, node) in (2, 3) else "it pools over another number of dimensions"


def _pool(graph: Graph, node: Node) -> str:
    attrs = node.attrs
    reach = [(w - 1) * d for w, d in zip(attrs["window"], attrs.get("dilation", [1, 1]))]
    if max(reach) >= MAX_POOL_REACH or len(attrs["window"]) != _rank(graph, node) - 1:
        return "a window of this size"
    return _planar(graph, node)


def _adaptive(graph: Graph, node: Node) -> str:
    return "an open size" if None in node.attrs["size"] else _planar(graph, node)


def _mean(graph: Graph, node: Node) -> str:
    rank = _rank(graph, node)
    dims = [d - 1 if d >= 0 else d + rank for d in node.attrs["dims"]]
    if -1 in dims or not 1 <= len(dims) <= 2 or rank - len(dims) > 1:
        return "a mean over these dimensions"
    return ""


def _softmax(graph: Graph, node: Node) -> str:
    return "softmax over the batch" if node.attrs["dim"] in (0, -_rank(graph, node) - 1) else ""


def _binary(graph: Graph, node: Node) -> str:
    names = [n for n in node.inputs if n is not None]
    if len(names) == 1:
        return "" if node.op != "div" or node.attrs["other"] != 0 else "division by zero"
    if node.attrs.get("alpha", 1) != 1:
        return "alpha"
    rank = len(graph.values[node.outputs[0]].shape)
    for name in names:
        value = graph.values[name]
        if name not in graph.tensors:
            if len(value.shape) != rank:
                return "operands of different rank"
        elif (
            value.dtype != torch.float32
            or len(value.shape) > rank
            or (len(value.shape) == rank and value.shape[0] != 1)
        ):
            return f"{name} does not fit one sample"
    return "both operands are constants" if all(n in graph.tensors for n in names) else ""


def _concat(graph: Graph, node: Node) -> str:
    for tensor in (graph.tensors[str(n)] for n in node.inputs if n in graph.tensors):
        if not tensor.is_floating_point() or bool((tensor != tensor[:1]).any()):
            return "a constant that differs from sample to sample"
    if all(n in graph.tensors for n in node.inputs):
        return "all its inputs are constants"
    rank = len(graph.values[node.outputs[0]].shape) - 1
    return "concatenation of samples" if node.attrs["dim"] in (0, -rank - 1) else ""


def _pad(graph: Graph, node: Node) -> str:
    amounts = node.attrs["amounts"]
    return "" if min(amounts, default=0) >= 0 and len(amounts) <= 2 * _rank(graph, node) else "negative padding"


def _layer_norm(graph: Graph, node: Node) -> str:
    if node.inputs[0] in graph.tensors or len(node.attrs["shape"]) != 1 or _rank(graph, node) < 1:
        return "a norm over these dimensions"
    return _constants(graph, node)


def _matmul(graph: Graph, node: Node) -> str:
    shapes = [graph.values[str(name)].shape for name in node.inputs[:2]]
    if any(name in graph.tensors for name in node.inputs[:2]):
        return "a constant factor"
    same = len(shapes[0]) == len(shapes[1]) and shapes[0][:-2] == shapes[1][:-2]
    return "" if same and 3 <= len(shapes[0]) <= 5 else "factors of different rank, or spread over one another"


def _attention(graph: Graph, node: Node) -> str:
    shapes = [graph.values[str(name)].shape for name in node.inputs[:3]]
    if any(name in graph.tensors for name in node.inputs[:3]):
        return "a constant factor"
    if len({shape[:-2] for shape in shapes}) != 1 or not 3 <= len(shapes[0]) <= 5:
        return "queries, keys and values of different rank"
    mask = node.inputs[3]
    if mask is not None and mask in graph.tensors:
        value = graph.values[mask]
        if (len(value.shape) > 2 and value.shape[0] != 1) or len(value.shape) > len(shapes[0]):
            return "a mask that differs from sample to sample"
    elif mask is not None and len(graph.values[mask].shape) != len(shapes[0]):
        return "a mask of another rank"
    return ""


def _expand_batch(graph: Graph, node: Node) -> str:
    if node.inputs[0] not in graph.tensors or not graph.tensors[str(node.inputs[0])].is_floating_point():
        return "what it repeats is computed"
    return ""


def _resize(graph: Graph, node: Node) -> str:
    return "" if _rank(graph, node) in (2, 3) else "up-sampling in three dimensions"


def _transposed(graph: Graph, node: Node) -> str:
    return transposed_as_conv(graph, node) or _constants(graph, node)


def _shuffle(graph: Graph, node: Node) -> str:
    return _planar(graph, node) or ("" if _rank(graph, node) == 3 else "planes without channels")


def _move(graph: Graph, node: Node) -> str:
    if node.inputs[0] in graph.tensors:
        return "its input is a constant"
    return ""


def _rewritten(e: Emitter, node: Node) -> None:
    raise CompileError(f"{node.op} should have been rewritten by fuse")


def _table() -> dict[str, Lowering]:
    ops, tokens, resize = emit_ops, emit_tokens, emit_resize
    table = {
        "conv": Lowering(emit_depthwise.conv, _conv),
        "linear": Lowering(tokens.linear, _linear),
        "affine": Lowering(ops.affine, _constants),
        "batch_norm": Lowering(ops.batch_norm, _constants),
        "max_pool": Lowering(ops.pool, _pool),
        "avg_pool": Lowering(ops.pool, _pool),
        "adaptive_avg_pool": Lowering(ops.adaptive, _adaptive),
        "mean": Lowering(ops.mean, _mean),
        "softmax": Lowering(tokens.softmax, _softmax),
        "log_softmax": Lowering(tokens.softmax, _softmax),
        "layer_norm": Lowering(tokens.layer_norm, _layer_norm),
        "matmul": Lowering(tokens.matmul, _matmul),
        "attention": Lowering(tokens.attention, _attention),
        "expand_batch": Lowering(tokens.expand_batch, _expand_batch, fresh=False),
        "upsample_nearest": Lowering(resize.resize, _resize),
        "upsample_bilinear": Lowering(resize.resize, _resize),
        "conv_transpose": Lowering(_rewritten, _transposed),
        "pixel_shuffle": Lowering(_rewritten, _shuffle),
        "unphase": Lowering(resize.unphase, _planar),
        "concat": Lowering(ops.concat, _concat),
        "pad": Lowering(ops.pad, _pad),
    }
    table |= {name: Lowering(ops.unary, _move) for name in ACTIVATIONS}
    table |= {name: Lowering(ops.binary, _binary) for name in ops.BINARY}
    return table | {name: Lowering(ops.move, _move, fresh=False) for name in ops.MOVES}


LOWERINGS: dict[str, Lowering] = _table()
