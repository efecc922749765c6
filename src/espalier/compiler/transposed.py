"""Transposed convolutions as convolutions: every phase of the larger image is a convolution of the small one.

With out[s q + r - p] = sum over t of x[q - t] w[r + s t], phase r is a convolution whose window has ceil(k / s) taps.
All phases together are one convolution with s * s times as many filters, whose zeros cost nothing, and a step
("unphase") that puts its planes side by side.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from espalier.graph.ir import Graph, Node, Value


def transposed_as_conv(graph: Graph, node: Node) -> str:
    """Why a transposed convolution cannot be rewritten; "" when it can."""
    attrs, weight = node.attrs, graph.values[str(node.inputs[1])].shape
    stride = attrs["stride"]
    if len(weight) != 4 or len(set(stride)) != 1 or any(d != 1 for d in attrs["dilation"]) or attrs["conv_groups"] != 1:
        return "a transposed convolution of this kind"
    taps = [-(-k // stride[0]) for k in weight[2:]]
    reach = [t * stride[0] - k for t, k in zip(taps, weight[2:])]
    if any(extra - pad > r for extra, pad, r in zip(attrs["extra"], attrs["padding"], reach)):
        return "output padding beyond the window"
    return ""


def rewrite(graph: Graph) -> Graph:
    """Transposed convolutions and pixel shuffles as convolutions and steps that put phases side by side."""
    tensors, values = dict(graph.tensors), dict(graph.values)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "pixel_shuffle" and len(values[node.outputs[0]].shape) == 4:
            attrs = {"factor": node.attrs["factor"], "crop": [0, 0], "size": list(values[node.outputs[0]].shape[2:])}
            nodes.append(replace(node, op="unphase", attrs=attrs))
        elif (
            node.op == "conv_transpose"
            and all(n in tensors for n in node.inputs[1:] if n is not None)
            and not transposed_as_conv(graph, node)
        ):
            nodes += _as_conv(graph, node, tensors, values)
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes), tensors=tensors, values=values)


def _as_conv(graph: Graph, node: Node, tensors: dict[str, Tensor], values: dict[str, Value]) -> list[Node]:
    x, weight, bias = (*node.inputs, None)[:3]
    assert x is not None and weight is not None
    s = node.attrs["stride"][0]
    w = _phases(tensors[weight].detach(), s)
    taps = list(w.shape[2:])
    height, width = (n + t - 1 for n, t in zip(values[x].shape[2:], taps))
    made = f"{node.name}/phases"
    names = [_add(f"{node.name}/weight", w, tensors, values)]
    if bias is not None:
        names.append(_add(f"{node.name}/bias", tensors[bias].detach().repeat_interleave(s * s), tensors, values))
    values[made] = replace(values[x], name=made, shape=(values[x].shape[0], w.shape[0], height, width))
    ones = [1, 1]
    attrs = {"stride": ones, "padding": [t - 1 for t in taps], "dilation": ones, "conv_groups": 1}
    inputs = (x, names[0], names[1] if bias is not None else None)
    conv = Node(made, "conv", inputs, (made,), attrs, node.target, node.place)
    crop = {"factor": s, "crop": list(node.attrs["padding"]), "size": list(values[node.outputs[0]].shape[2:])}
    return [conv, Node(node.name, "unphase", (made,), node.outputs, crop, node.target, node.place)]


def _phases(w: Tensor, s: int) -> Tensor:
    """[i, o, k, k] -> [o * s * s, i, taps, taps]: filter (o, dy, dx) makes phase (dy, dx) of channel o."""
    i, o, ky, kx = w.shape
    ty, tx = -(-ky // s), -(-kx // s)
    padded = torch.nn.functional.pad(w, (0, tx * s - kx, 0, ty * s - ky))
    split = padded.reshape(i, o, ty, s, tx, s).flip(2, 4)
    return split.permute(1, 3, 5, 0, 2, 4).reshape(o * s * s, i, ty, tx).contiguous()


def _add(name: str, tensor: Tensor, tensors: dict[str, Tensor], values: dict[str, Value]) -> str:
    while name in values:
        name += "'"
    tensors[name], values[name] = tensor, Value(name, tuple(tensor.shape), tensor.dtype)
    return name


def side_by_side(x: Tensor, factor: int, crop: list[int], size: list[int]) -> Tensor:
    """The oracle of "unphase": a pixel shuffle of which `crop` rows and columns are cut off before."""
    whole = torch.nn.functional.pixel_shuffle(x, factor)
    return whole[:, :, crop[0] : crop[0] + size[0], crop[1] : crop[1] + size[1]]
