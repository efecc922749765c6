"""Window: how a convolution's window moves over the image, and which convolutions are depthwise or a wide stem."""

from __future__ import annotations

from espalier.graph.ir import Graph, Node

MAX_MULTIPLIER = 4  # output channels per input channel; with more, rows of one block share loads and win
STEM_CHANNELS, STEM_WINDOW = 4, 8  # of a stem at most: channels, rows and columns; as in native/src/program.h
STEM_FILTERS, STEM_COLUMNS = 8, 6  # and at least, from which products are saved: 14 for 4 pixels of a row instead of 24
STEM_PIXELS = 32  # of a row of its output, from which vectors of tiles are filled
STEM_DENSE = 0.7  # density of its weights below which row-blocks are faster

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


def is_stem(graph: Graph, node: Node) -> bool:
    """Whether a conv node runs on the kernel for stems: few channels, a wide dense window at stride 2, no residual."""
    weight = graph.tensors.get(str(node.inputs[1]))
    if node.op != "conv" or weight is None or weight.dim() != 4 or any(n is not None for n in node.inputs[3:]):
        return False
    filters, channels, high, wide = weight.shape
    stride, padding, dilation = window(node)
    plain = node.attrs["conv_groups"] == 1 and stride == (2, 2) and dilation == (1, 1) and max(padding) <= STEM_WINDOW
    fits = channels <= STEM_CHANNELS and high <= STEM_WINDOW and STEM_COLUMNS <= wide <= STEM_WINDOW
    if not (plain and fits) or filters < STEM_FILTERS:
        return False
    width = graph.values[node.outputs[0]].shape[-1]
    return width >= STEM_PIXELS and int(weight.count_nonzero()) >= STEM_DENSE * weight.numel()
