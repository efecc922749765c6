"""Depth first: a wide tensor between a convolution and a depthwise one is made and used some channels at a time.

The expanded tensor of an inverted residual is several times as large as what goes in and comes out, and larger than a
core's cache. A depthwise window reads one channel, so a group of channels can go all the way to the narrow side while
it is hot. Each group is a task of one thread, in memory of its own that the next group takes again: what lies between
the two convolutions never leaves the nearest caches, and threads need not meet there. In the graph this is: both nodes
once per group, and a concatenation, whose parts the layout writes in place.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from espalier.compiler.row_bands import goes_by_rows
from espalier.compiler.window import is_depthwise
from espalier.graph.ir import Graph, Node, Value

LARGE_BYTES = 1 << 16  # of a tensor for one sample, from which it is split
GROUP_BYTES = 1 << 15  # of one group: a good part of the nearest cache
_UNIT = 8  # channels: groups keep blocks of rows whole
_THREADS = 4  # of which a few should be able to share the groups evenly


def depth_first(graph: Graph, threads: int = 1) -> Graph:
    """The same outputs with wide tensors before depthwise convolutions in groups of channels.

    Those that `row_bands` makes row by row for so many threads are left whole. graph: fused. Node names get "/0", "/1"
    ... behind them; attrs["fused"] says which node each group is of, attrs["task"] which nodes are a task; tasks whose
    numbers follow each other may be done at once.
    """
    producer, readers = graph.producer(), graph.readers()
    values, tensors = dict(graph.values), dict(graph.tensors)
    split: dict[str, Node] = {}  # depthwise node -> the conv before it
    for node in graph.nodes:
        source = producer.get(str(node.inputs[0])) if node.op == "conv" else None
        if source is None or not is_depthwise(graph, node) or not _whole(graph, source, node):
            continue
        x = source.outputs[0]
        if len(readers[x]) != 1 or x in graph.outputs or _size_bytes(graph, x) < LARGE_BYTES:
            continue
        if not goes_by_rows(graph, readers, source, node, threads):
            split[node.name] = source
    if not split:
        return graph
    postponed = {source.name for source in split.values()}
    nodes: list[Node] = []
    task = 1
    for node in graph.nodes:
        if node.name in split:
            made = _in_groups(graph, split[node.name], node, task, values, tensors)
            task += len(made)  # and at least one number between
            nodes += made
        elif node.name not in postponed:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes), values=values, tensors=tensors)


def _whole(graph: Graph, source: Node, node: Node) -> bool:
    """Whether channels map one to one and both nodes are plain: one group of the conv, no residual in the middle.

    The conv is 1 x 1, so that both are a step each, which read nothing that is made for them.
    """
    if source.op != "conv" or source.attrs["conv_groups"] != 1 or len(source.inputs) > 3:
        return False
    x, weight = (graph.values[str(name)].shape for name in source.inputs[:2])
    if len(x) < 3 or math.prod(weight[2:]) * math.prod(source.attrs["stride"]) > 1 or math.prod(x[2:]) < 4:
        return False
    if any(source.attrs["padding"]):
        return False
    known = all(n is None or n in graph.tensors for n in (*source.inputs[1:3], *node.inputs[1:3]))
    channels = graph.values[str(source.inputs[1])].shape[0]
    return known and len(node.inputs) < 4 and graph.values[str(node.inputs[1])].shape[0] == channels


def _size_bytes(graph: Graph, name: str) -> int:
    return 4 * math.prod(graph.values[name].shape[1:])


def _in_groups(
    graph: Graph, source: Node, node: Node, task: int, values: dict[str, Value], tensors: dict[str, Tensor]
) -> list[Node]:
    middle, out = values[source.outputs[0]], values[node.outputs[0]]
    channels = middle.shape[1]
    per_channel = _size_bytes(graph, middle.name) // channels
    count = _group(channels, GROUP_BYTES // per_channel)
    made, parts = [], []
    # a channel alone would be a plain conv, which does not read what is a task's own: it joins the group before
    ends = [*range(count, channels - 1, count), channels]
    for number, (first, upto) in enumerate(zip([0, *ends], ends)):
        x = source.inputs[0]
        for which, value in ((source, middle), (node, out)):
            names = [None if n is None else _rows(n, first, upto, number, values, tensors) for n in which.inputs[1:3]]
            name = f"{value.name}/{number}"
            values[name] = replace(value, name=name, shape=(value.shape[0], upto - first, *value.shape[2:]))
            attrs = {**which.attrs, "fused": which.attrs.get("fused", [which.name]), "task": task + number}
            if which is node:
                attrs["conv_groups"] = upto - first
            made.append(replace(which, name=f"{which.name}/{number}", inputs=(x, *names), outputs=(name,), attrs=attrs))
            x = name
        parts.append(str(x))
    name = f"{node.name}/groups"
    made.append(replace(node, name=name, op="concat", inputs=tuple(parts), outputs=node.outputs, attrs={"dim": 1}))
    return made


def _group(channels: int, most: int) -> int:
    """Channels of a group, at most about `most`: as many as can be, where they come out even.

    >>> _group(192, 10), _group(384, 40), _group(576, 40)
    (8, 32, 24)
    """
    counts = range(_UNIT, max(_UNIT, most) + 1, _UNIT)

    def rounded_up(count: int) -> int:
        return -(-channels // count // _THREADS) * _THREADS * count

    return min(counts, key=lambda count: (rounded_up(count), -count))


def _rows(name: str, first: int, upto: int, number: int, values: dict[str, Value], tensors: dict[str, Tensor]) -> str:
    """A tensor of the graph that holds some rows of another."""
    part = f"{name}/{number}"
    tensors[part] = tensors[name][first:upto]
    values[part] = replace(values[name], name=part, shape=tuple(tensors[part].shape))
    return part
