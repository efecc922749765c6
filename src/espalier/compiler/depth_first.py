"""Depth first: a wide tensor between a convolution and a depthwise one is made and used some channels at a time.

The expanded tensor of an inverted residual is several times as large as what goes in and comes out, and larger than a
core's cache. A depthwise window reads one channel, so a group of channels can go all the way to the narrow side while
it is hot, and the next group takes its memory. In the graph this is: both nodes once per group, and a concatenation,
whose parts the layout writes in place.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from espalier.compiler.window import is_depthwise
from espalier.graph.ir import Graph, Node, Value

LARGE_BYTES = 1 << 20  # of a tensor for one sample, from which it is split
GROUP_BYTES = 3 << 18  # of one group: a good part of a small second-level cache
_UNIT = 8  # channels: groups keep blocks of rows whole


def depth_first(graph: Graph) -> Graph:
    """The same outputs with wide tensors before depthwise convolutions in groups of channels.

    graph: fused. Node names get "/0", "/1" ... behind them; attrs["fused"] says which node each group is of.
    """
    producer, readers = graph.producer(), graph.readers()
    values, tensors = dict(graph.values), dict(graph.tensors)
    split: dict[str, Node] = {}  # depthwise node -> the conv before it
    for node in graph.nodes:
        source = producer.get(str(node.inputs[0])) if node.op == "conv" else None
        if source is None or not is_depthwise(graph, node) or not _whole(graph, source, node):
            continue
        x = source.outputs[0]
        if len(readers[x]) == 1 and x not in graph.outputs and _size_bytes(graph, x) >= LARGE_BYTES:
            split[node.name] = source
    if not split:
        return graph
    postponed = {source.name for source in split.values()}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in split:
            nodes += _in_groups(graph, split[node.name], node, values, tensors)
        elif node.name not in postponed:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes), values=values, tensors=tensors)


def _whole(graph: Graph, source: Node, node: Node) -> bool:
    """Whether channels map one to one and both nodes are plain: one group of the conv, no residual in the middle.

    The conv has stride 1: the phases of another stride would be gathered for every group.
    """
    if source.op != "conv" or source.attrs["conv_groups"] != 1 or len(source.inputs) > 3:
        return False
    if any(s != 1 for s in source.attrs["stride"]):
        return False
    known = all(n is None or n in graph.tensors for n in (*source.inputs[1:3], *node.inputs[1:3]))
    channels = graph.values[str(source.inputs[1])].shape[0]
    return known and len(node.inputs) < 4 and graph.values[str(node.inputs[1])].shape[0] == channels


def _size_bytes(graph: Graph, name: str) -> int:
    return 4 * math.prod(graph.values[name].shape[1:])


def _in_groups(
    graph: Graph, source: Node, node: Node, values: dict[str, Value], tensors: dict[str, Tensor]
) -> list[Node]:
    middle, out = values[source.outputs[0]], values[node.outputs[0]]
    channels = middle.shape[1]
    per_channel = _size_bytes(graph, middle.name) // channels
    count = max(1, GROUP_BYTES // per_channel // _UNIT) * _UNIT
    made, parts = [], []
    for number, first in enumerate(range(0, channels, count)):
        upto = min(channels, first + count)
        x = source.inputs[0]
        for which, value in ((source, middle), (node, out)):
            names = [None if n is None else _rows(n, first, upto, number, values, tensors) for n in which.inputs[1:3]]
            name = f"{value.name}/{number}"
            values[name] = replace(value, name=name, shape=(value.shape[0], upto - first, *value.shape[2:]))
            attrs = {**which.attrs, "fused": which.attrs.get("fused", [which.name])}
            if which is node:
                attrs["conv_groups"] = upto - first
            made.append(replace(which, name=f"{which.name}/{number}", inputs=(x, *names), outputs=(name,), attrs=attrs))
            x = name
        parts.append(str(x))
    name = f"{node.name}/groups"
    made.append(replace(node, name=name, op="concat", inputs=tuple(parts), outputs=node.outputs, attrs={"dim": 1}))
    return made


def _rows(name: str, first: int, upto: int, number: int, values: dict[str, Value], tensors: dict[str, Tensor]) -> str:
    """A tensor of the graph that holds some rows of another."""
    part = f"{name}/{number}"
    tensors[part] = tensors[name][first:upto]
    values[part] = replace(values[name], name=part, shape=tuple(tensors[part].shape))
    return part
