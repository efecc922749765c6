"""Window: how a convolution's window moves over the image, and which convolutions are depthwise."""

from __future__ import annotations

from espalier.graph.ir import Graph, Node

MAX_MULTIPLIER = 4  # output channels per input channel; with more, rows of one block share loads and win

Pair = tuple[int, int]


def window(node: Node) -> tuple[Pair, Pair, Pair]:
    """Stride, padding and dilation of a conv node as (vertical, horizontal), also of one in one dimension."""
    stride, dilation = ([1, *node.attrs[k]][-2:] for k in ("stride", "dilation"))
    padding = [0, *node.attrs["padding"]][-2:]
    return (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1])


def is_depthwise(graph: Graph, node: Node) -> bool:
    """Whether a conv node runs on the depthwise kernel: few windows for each input channel, each over it alone."""
    weight = graph.values[str(node.inputs[1])].shape
    out = graph.values[node.outputs[0]].shape
    groups = node.attrs["conv_groups"]
    pixels = out[-1] * (out[-2] if len(out) > 3 else 1)
    return groups > 1 and weight[1] == 1 and weight[0] <= MAX_MULTIPLIER * groups and pixels > 1
