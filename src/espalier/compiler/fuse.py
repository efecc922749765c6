"""Fuse: a graph for running only. Norms folded into weights, activations and residual adds done as results are written.

After fusing, `conv`, `linear`, `affine` and `add` nodes carry ``attrs["activation"]`` (None, or a dict with the
activation's name and attributes), and a conv or linear node may have a fourth input, the residual:
``activation(acc + bias + residual)``. A norm that cannot be folded is an `affine` (x, scale, shift) along dimension 1.
What depends on no input is computed here. The tensors of the given graph are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from espalier.compiler import transposed
from espalier.graph import OPAQUE, Graph, Node, Value
from espalier.graph.interpret import apply
from espalier.graph.opaque import resolve

ACTIVATIONS = ("relu", "clamp", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid", "gelu")
IDENTITIES = ("identity", "dropout", "feature_dropout")  # when a network only runs
HOSTS = ("conv", "linear", "affine", "add")
_GROWTH = 4  # a constant may be that many times as large as what it is made from


def fuse(graph: Graph) -> Graph:
    """The same outputs (in eval mode, up to rounding) from fewer nodes.

    >>> [n.op for n in fuse(capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), x)).nodes]
    ['conv']
    """
    for rewrite in PASSES:
        graph = rewrite(graph)
    return _used(graph)


def fold_constants(graph: Graph) -> Graph:
    """The same graph with every value that depends on no input made a tensor of it, such as a weight that is a product.

    Random ops stay, and so do outputs and what is much larger than its parts.

    >>> fold_constants(capture(weight_norm(nn.Linear(4, 2)), x)).sites()
    """
    tensors: dict[str, Tensor] = dict(graph.tensors)
    nodes = []
    for node in graph.nodes:
        made = _constant(graph, node, tensors)
        if made is None:
            nodes.append(node)
        else:
            tensors.update(made)
    return replace(graph, nodes=tuple(nodes), tensors=tensors) if len(nodes) < len(graph.nodes) else graph


def _constant(graph: Graph, node: Node, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What the node makes, by name, where that is a constant worth keeping."""
    names = [name for name in node.inputs if name is not None]
    outputs = [graph.values[name] for name in node.outputs]
    if not names or any(name not in tensors for name in names):
        return None
    if node.op == OPAQUE and torch.Tag.nondeterministic_seeded in resolve(node.target).tags:  # type: ignore[attr-defined]
        return None
    if any(v.batched or v.name in graph.outputs for v in outputs):
        return None
    if sum(math.prod(v.shape) for v in outputs) > _GROWTH * sum(tensors[name].numel() for name in names):
        return None
    with torch.no_grad():
        result = apply(node, [None if name is None else tensors[name] for name in node.inputs])
    return {v.name: x.clone() for v, x in zip(outputs, (result,) if isinstance(result, Tensor) else result)}


def _without_identities(graph: Graph) -> Graph:
    """Dropout and copies vanish."""
    renamed: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        inputs = tuple(None if name is None else renamed.get(name, name) for name in node.inputs)
        if node.op in IDENTITIES and node.outputs[0] not in graph.outputs:
            renamed[node.outputs[0]] = inputs[0]  # type: ignore[assignment]
        else:
            nodes.append(replace(node, inputs=inputs))
    return replace(graph, nodes=tuple(nodes))


def _with_activation_slots(graph: Graph) -> Graph:
    nodes = (replace(n, attrs={"activation": None, **n.attrs}) if n.op in HOSTS else n for n in graph.nodes)
    return replace(graph, nodes=tuple(nodes))


def _folded_norms(graph: Graph) -> Graph:
    """A batch norm behind a conv or linear that nobody else reads becomes part of its weight; others become affine."""
    producer, readers = graph.producer(), graph.readers()
    tensors, values = dict(graph.tensors), dict(graph.values)
    folded: dict[str, Node] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op != "batch_norm":
            nodes.append(node)
            continue
        x = node.inputs[0]
        assert x is not None
        if any(name not in graph.tensors for name in node.inputs[1:] if name is not None):
            nodes.append(node)  # a norm whose statistics are computed
            continue
        scale, shift = _scale_and_shift(graph, node)
        source = producer.get(x)
        alone = len(readers[x]) == 1 and x not in graph.outputs
        if source is not None and alone and _takes_norm(graph, source):
            folded[source.name] = _folded(source, node, scale, shift, tensors, values)
        else:
            dtype = values[x].dtype
            names = (
                _add(f"{node.name}.scale", scale.to(dtype), tensors, values),
                _add(f"{node.name}.shift", shift.to(dtype), tensors, values),
            )
            nodes.append(replace(node, op="affine", inputs=(x, *names), attrs={"activation": None}))
    made = tuple(folded.get(node.name, node) for node in nodes)
    return replace(graph, nodes=made, tensors=tensors, values=values)


def _takes_norm(graph: Graph, host: Node) -> bool:
    """Whether a norm along dimension 1 of the node's result is one along the rows of its weight, which are known."""
    known = all(name in graph.tensors for name in host.inputs[1:3] if name is not None)
    rows = host.op == "conv" or (host.op == "linear" and len(graph.values[host.outputs[0]].shape) == 2)
    return known and rows and len(host.inputs) < 4 and host.attrs["activation"] is None


def _scale_and_shift(graph: Graph, node: Node) -> tuple[Tensor, Tensor]:
    """The norm as ``x * scale + shift`` per channel, in float64."""
    mean, var, weight, bias = (None if n is None else graph.tensors[n].detach().double() for n in node.inputs[1:5])
    assert mean is not None and var is not None
    scale = (var + float(node.attrs["eps"])).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, (torch.zeros_like(mean) if bias is None else bias) - mean * scale


def _folded(
    host: Node, norm: Node, scale: Tensor, shift: Tensor, tensors: dict[str, Tensor], values: dict[str, Value]
) -> Node:
    weight = tensors[host.inputs[1]].detach()  # type: ignore[index]
    bias = None if host.inputs[2] is None else tensors[host.inputs[2]].detach().double()
    wide = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    name = _add(f"{host.name}.weight", wide.to(weight.dtype), tensors, values)
    offset = shift if bias is None else shift + bias * scale
    bias_name = _add(f"{host.name}.bias", offset.to(weight.dtype), tensors, values)
    return replace(host, inputs=(host.inputs[0], name, bias_name, *host.inputs[3:]), outputs=norm.outputs)


def _add(name: str, tensor: Tensor, tensors: dict[str, Tensor], values: dict[str, Value]) -> str:
    """Put a new tensor into the graph, under `name` or one like it that is free."""
    while name in values:
        name += "'"
    tensors[name], values[name] = tensor, Value(name, tuple(tensor.shape), tensor.dtype)
    return name


def _fused_activations(graph: Graph) -> Graph:
    """An activation goes into the node before it, where nobody else reads that one's result."""
    return _merged(graph, lambda node, host: _with_activation(node, host))


def _with_activation(node: Node, host: Node) -> Node | None:
    if node.op not in ACTIVATIONS or host.op not in HOSTS or host.attrs["activation"] is not None:
        return None
    return replace(host, attrs={**host.attrs, "activation": {"name": node.op, **node.attrs}}, outputs=node.outputs)


def _merged(graph: Graph, merge: Callable[[Node, Node], Node | None]) -> Graph:
    """Every node with one input whose producer has no other reader, merged with it where `merge` says how."""
    nodes: list[Node] = []
    readers = graph.readers()
    place: dict[str, int] = {}
    for node in graph.nodes:
        x = node.inputs[0] if len(node.inputs) == 1 else None
        made = None
        if x is not None and x in place and len(readers[x]) == 1 and x not in graph.outputs:
            made = merge(node, nodes[place[x]])
        if made is not None and x is not None:
            nodes[place[x]] = made
            place[made.outputs[0]] = place[x]
        else:
            place |= {name: len(nodes) for name in node.outputs}
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _fused_residuals(graph: Graph) -> Graph:
    """An add goes into the later of its two producers, if that is a conv or linear that nobody else reads."""
    nodes: list[Node | None] = []
    readers = graph.readers()
    place: dict[str, int] = {}
    for node in graph.nodes:
        host = _host_of(graph, node, nodes, place, readers)
        if host is not None:
            k, residual = host
            before = nodes[k]
            assert before is not None
            attrs = {**before.attrs, "activation": node.attrs["activation"]}
            inputs = (*before.inputs[:3], *[None] * (3 - len(before.inputs)), residual)
            nodes[k] = None  # it moves here, where the residual is there for certain
            node = replace(before, inputs=inputs, outputs=node.outputs, attrs=attrs)
        place |= {name: len(nodes) for name in node.outputs}
        nodes.append(node)
    return replace(graph, nodes=tuple(node for node in nodes if node is not None))


def _host_of(
    graph: Graph, node: Node, nodes: list[Node | None], place: dict[str, int], readers: dict[str, list[Node]]
) -> tuple[int, str] | None:
    """(index of the node that takes the add, name of the residual), or None."""
    if node.op != "add" or len(node.inputs) != 2 or node.attrs.get("alpha", 1) != 1 or node.inputs[0] == node.inputs[1]:
        return None
    found: list[tuple[int, str]] = []
    for own, other in (node.inputs, node.inputs[::-1]):
        assert own is not None and other is not None
        host = nodes[place[own]] if own in place else None
        if (
            host is not None
            and host.op in ("conv", "linear")
            and len(host.inputs) < 4
            and host.attrs["activation"] is None
            and len(readers[own]) == 1
            and own not in graph.outputs
            and other not in graph.tensors
            and replace(graph.values[own], name=other) == graph.values[other]
        ):
            found.append((place[own], other))
    return max(found, default=None)


def _used(graph: Graph) -> Graph:
    """Only nodes, tensors and values that the outputs need."""
    needed, nodes = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if needed & set(node.outputs):
            nodes.append(node)
            needed |= {name for name in node.inputs if name is not None}
    made = {name for node in nodes for name in node.outputs}
    keep = needed | made | set(graph.inputs)
    tensors: dict[str, Any] = {name: tensor for name, tensor in graph.tensors.items() if name in keep}
    return replace(
        graph,
        nodes=tuple(reversed(nodes)),
        tensors=tensors,
        values={name: value for name, value in graph.values.items() if name in keep},
        parameters=graph.parameters & set(tensors),
        aliases={},
    )


PASSES: tuple[Callable[[Graph], Graph], ...] = (
    fold_constants,
    transposed.rewrite,
    _without_identities,
    _with_activation_slots,
    _folded_norms,
    _fused_activations,
    _fused_residuals,
    _fused_activations,
)
