"""Planning a layout: which values lie together, which margins windows need, what is gathered before they read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from torch import Tensor

from espalier.compiler.layout import VECTOR, Layout, Root, planes_of
from espalier.compiler.window import is_depthwise, window
from espalier.graph.ir import Graph, Node

_FEW_PIXELS = 64  # of an image that is worth a copy for every column of a window
_SPARSE = 0.5  # density of weights up to which layouts for sparse ones pay


def plan_layout(
    graph: Graph,
    nodes: tuple[Node, ...],
    inputs: tuple[str, ...],
    fresh: set[str],
    strange: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Layout:
    """Storages for the values that `nodes` write.

    fresh: the values that steps write, rather than views of others. strange: shapes of those for one sample whose batch
    is not their first dimension.
    """
    shapes = {name: tuple(value.shape[1:]) for name, value in graph.values.items() if value.shape} | dict(strange)
    layout = Layout(graph, inputs, shapes)
    parts = _channel_parts(nodes, shapes, fresh)
    for node in nodes:
        for name in node.outputs:
            if 1 <= len(shapes[name]) <= 3 and name in fresh and name not in parts:
                layout.add(name, shapes[name])
    for name in [n for node in nodes for n in node.outputs]:
        root, channel = name, 0
        while root in parts:
            root, channel = parts[root][0], channel + parts[root][1]
        if root in layout.roots:
            layout.home[name] = (root, channel)
            layout.roots[root].planes |= root != name
    for node in nodes:
        if not fresh.issuperset(node.outputs):
            for root in {layout.home[n][0] for n in node.inputs if n in layout.home}:
                layout.roots[root].planes = True
        if node.op == "conv":
            _plan_conv(layout, node, graph)
        elif node.op in ("add", "sub", "mul", "div"):
            homes = [layout.home[n][0] for n in (*node.inputs, *node.outputs) if n in layout.home]
            for a, b in pairwise(homes):
                if layout.roots[a].height == layout.roots[b].height:
                    layout.join(a, b)
    return layout


def _channel_parts(
    nodes: tuple[Node, ...], shapes: dict[str, tuple[int, ...]], fresh: set[str]
) -> dict[str, tuple[str, int]]:
    """value -> (value whose storage it is part of, first channel there)."""
    parts: dict[str, tuple[str, int]] = {}
    for node in nodes:
        names = [n for n in node.inputs if n is not None]
        if node.op == "concat" and node.attrs["dim"] in (1, 1 - len(shapes[names[0]]) - 1):
            channel = 0
            for name in names:
                if name in fresh and name not in parts and names.count(name) == 1 and len(shapes[name]) in (1, 2, 3):
                    parts[name] = (node.outputs[0], channel)
                channel += shapes[name][0]
        elif node.op in ("slice", "split") and node.attrs["dim"] == 1 and len(shapes[names[0]]) in (2, 3):
            if node.op == "slice" and node.attrs["step"] != 1:
                continue
            channel = node.attrs.get("start", 0) or 0
            channel += shapes[names[0]][0] if channel < 0 else 0
            for name in node.outputs:
                parts[name] = (names[0], channel)
                channel += shapes[name][0]
    return parts


def _plan_conv(layout: Layout, node: Node, graph: Graph) -> None:
    """Margins for a window of stride 1, and equal row strides of what it reads and writes."""
    source, out = str(node.inputs[0]), node.outputs[0]
    kernel = graph.values[str(node.inputs[1])].shape[2:]
    home = layout.home[source][0] if source in layout.home else None
    target = layout.home[out][0]
    for root in {home, target} - {None}:
        layout.roots[str(root)].pixels = True
        if not is_depthwise(graph, node):
            layout.roots[str(root)].planes |= _wants_planes(graph.tensors.get(str(node.inputs[1])))
    if is_depthwise(graph, node):  # reads planes of any kind, in the arena
        if home is None and f"{source}/planes" not in layout.roots:
            layout.add(f"{source}/planes", layout.shapes[source])
    elif all(s == 1 for s in node.attrs["stride"]) and _shifts(layout, node, graph):
        _plan_shifts(layout, node, target, [1, *kernel][-2:])
    elif all(s == 1 for s in node.attrs["stride"]):
        padding = [0, *node.attrs["padding"]][-2:]
        if home is None:
            home = f"{source}/planes"
            if home not in layout.roots:
                layout.add(home, layout.shapes[source])
        layout.need(home, padding[0], padding[1])
        layout.join(home, target)
    else:
        _plan_phases(layout, node, target, [1, *kernel][-2:], _shifts(layout, node, graph))
    residual = node.inputs[3] if len(node.inputs) > 3 else None
    if residual in layout.home:
        layout.join(layout.home[residual][0], target)


def _wants_planes(weight: Tensor | None) -> bool:
    """Whether a conv runs best over planes: dense ones, and those whose rows share few columns.

    The tiles of the latter are one row high and as wide as can be, and want vectors that lie one behind the other.
    """
    if weight is None:
        return True
    rows = weight.detach().flatten(1) != 0
    density = float(rows.float().mean())
    blocks = rows[: len(rows) // 8 * 8].unflatten(0, (-1, 8)).any(1)
    return density > _SPARSE or not len(blocks) or float(blocks.float().mean()) > 2 * density


def _shifts(layout: Layout, node: Node, graph: Graph) -> bool:
    """Whether a window reads copies shifted to every column of it, over images without margins.

    These pay where margins would leave many lanes of the vectors empty, as over 4 x 4 pixels.
    """
    _, padding, _ = window(node)
    weight = graph.tensors.get(str(node.inputs[1]))
    _, height, width = planes_of(layout.shapes[node.outputs[0]])
    if weight is None or height == 1 or height * width > _FEW_PIXELS:
        return False
    run = (height - 1) * (width + max(1, padding[1])) + width
    fewer = -(-height * width // VECTOR) <= 0.6 * -(-run // VECTOR)
    return fewer and int(weight.count_nonzero()) <= _SPARSE * weight.numel()


def _plan_shifts(layout: Layout, node: Node, target: str, kernel: Sequence[int]) -> None:
    """Planes as high as the window reaches, once for each of its columns; convs of one value share them."""
    _, padding, dilation = window(node)
    channels = planes_of(layout.shapes[str(node.inputs[0])])[0]
    _, height, width = planes_of(layout.shapes[node.outputs[0]])
    name = f"{node.inputs[0]}/shifts {kernel} {padding} {dilation}"
    if name not in layout.roots:
        layout.roots[name] = Root(channels, height + (kernel[0] - 1) * dilation[0], width)
        layout.above[name] = name
    layout.shifted[node.name] = name
    layout.join(name, target)


def phases_of(node: Node) -> str:
    """The root of the phases that a strided conv reads. Convs of one value with one stride share them."""
    stride, _, _ = window(node)
    return f"{node.inputs[0]}/phases {stride[0]}x{stride[1]}"


def _plan_phases(layout: Layout, node: Node, target: str, kernel: Sequence[int], shifts: bool) -> None:
    """Planes of phases, large enough for every conv that reads them.

    shifts: every column of the window is a phase of its own, so that nothing is read beside them.
    """
    stride, _, dilation = window(node)
    channels = planes_of(layout.shapes[str(node.inputs[0])])[0]
    _, *out = planes_of(layout.shapes[node.outputs[0]])
    name = phases_of(node)
    if name not in layout.roots:
        layout.roots[name] = Root(channels, 0, 0, pixels=True, shifts=shifts)
        layout.above[name] = name
    root = layout.roots[name]
    height, width = (o + (k - 1) * d // s for o, k, d, s in zip(out, kernel, dilation, stride))
    root.height, root.width = max(root.height, height), max(root.width, out[1] if root.shifts else width)
    layout.strided.setdefault(name, []).append(node)
    layout.join(name, target)
