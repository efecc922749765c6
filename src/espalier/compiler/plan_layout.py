"""Planning a layout: which values lie together, which margins windows need, what is gathered before they read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from torch import Tensor

from espalier.compiler.layout import VECTOR, Layout, Root, planes_of
from espalier.compiler.window import STEM_CHANNELS, is_depthwise, is_stem, window
from espalier.graph.ir import Graph, Node

_FEW_PIXELS = 64  # of an image that is worth a copy for every column of a window
_SIDED_WIDTHS = (4, 8, 16, 32)  # of images whose rows fill vectors
_SIDED_FLOATS = 1 << 16  # of planes with their copies, which threads fetch from each other
_SPARSE = 0.5  # density of weights up to which layouts for sparse ones pay
_FEWER = 0.76  # vectors without margins to those with them, from which copies for every column pay


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
    for name in _sided(layout, nodes):
        layout.roots[name].sides = True
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
    if is_stem(graph, node):
        layout.stems.add(node.name)
    elif is_depthwise(graph, node):  # reads planes of any kind, in the arena
        if home is None and f"{source}/planes" not in layout.roots:
            layout.add(f"{source}/planes", layout.shapes[source])
    elif source in layout.roots and layout.roots[source].sides:
        layout.need(source, window(node)[1][0], 0)
        if _moves_by_one(node):
            layout.join(source, target)
        else:
            _plan_phases(layout, node, target, [1, *kernel][-2:], _exact(layout, node, graph, target))
    elif _moves_by_one(node) and (_shifts(layout, node, graph) or (home is None and layout.roots[target].sides)):
        _plan_shifts(layout, node, target, [1, *kernel][-2:])
    elif _moves_by_one(node):
        padding = [0, *node.attrs["padding"]][-2:]
        if home is None:
            home = f"{source}/planes"
            if home not in layout.roots:
                layout.add(home, layout.shapes[source])
        layout.need(home, padding[0], padding[1])
        layout.join(home, target)
    else:
        _plan_phases(layout, node, target, [1, *kernel][-2:], _exact(layout, node, graph, target))
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
    if _moves_by_one(node) and not _reaches(node, graph):
        return False  # it reads the image as it lies
    run = (height - 1) * (width + max(1, padding[1])) + width
    pixels = height * width
    whole = pixels // VECTOR if pixels % VECTOR == 1 else -(-pixels // VECTOR)  # a lone pixel goes with the others
    fewer = whole <= _FEWER * -(-run // VECTOR)
    return fewer and int(weight.count_nonzero()) <= _SPARSE * weight.numel()


def _sided(layout: Layout, nodes: tuple[Node, ...]) -> set[str]:
    """The values that lie with copies of their planes beside them, which the convs that write them store as well.

    Windows then read whole vectors, none of which lies in two cache lines, and no side margins. That pays for sparse
    windows of three columns over images whose rows fill vectors, unless anybody else reads margins; and where a window
    leads from such a value to one with margins, their rows would not lie alike.
    """
    graph, readers = layout.graph, layout.graph.readers()
    made, margins = set[str](), set[str]()
    for node in nodes:
        for name in node.outputs:
            reading = readers.get(name, [])
            windows = [n for n in reading if n.inputs[0] == name and _reaches(n, graph)]
            if windows and all(n.op in _BLIND for n in reading) and _pays(layout, node, windows):
                made.add(name)
            elif windows and name in layout.home:  # others are copied before they are read
                margins.add(name)
    while True:
        mixed = set[str]()
        for node in nodes:
            if _reaches(node, graph):
                ends = {str(n) for n in (node.inputs[0], *node.inputs[3:], *node.outputs)}
                mixed |= ends & made if ends & margins else set()
        if not mixed:
            return made
        made, margins = made - mixed, margins | mixed


def _pays(layout: Layout, node: Node, windows: Sequence[Node]) -> bool:
    """Whether the output of `node` may lie so, and these windows, which read it, gain more than is spent on it."""
    graph, name = layout.graph, node.outputs[0]
    shape = layout.shapes[name]
    if node.op != "conv" or layout.home.get(name) != (name, 0) or len(shape) != 3 or not _fill_vectors(shape):
        return False
    stem = graph.values[str(node.inputs[1])].shape[1] <= STEM_CHANNELS  # too few for Winograd
    if not _clamped(node) or is_depthwise(graph, node) or not (stem or not _moves_by_one(node) or _sparse(graph, node)):
        return False  # dense ones at stride 1 are better done by Winograd
    if not all(_three_columns(n, graph) for n in windows):
        return False
    tensors = [graph.tensors[str(n.inputs[1])] for n in windows]
    if not all(map(_wants_planes, tensors)):
        return False  # tall blocks gain little, and threads would have three times as much from each other
    channels, height, width = shape
    exact, run = height * width / VECTOR, -(-((height - 1) * (width + 1) + width) // VECTOR)
    saved = sum(int(w.count_nonzero()) for w in tensors) * (run - (1 - _ALIGNED) * exact)
    return saved > _STORES * channels * exact


def _fill_vectors(shape: tuple[int, ...]) -> bool:
    """Whether rows fill vectors, and planes with their copies fit into a cache."""
    channels, height, width = shape
    whole = width in _SIDED_WIDTHS and height * width % VECTOR == 0 and height * width <= 4 * VECTOR**2
    return whole and height > 1 and 3 * channels * (height + 2) * width <= _SIDED_FLOATS


_BLIND = ("conv", "add", "adaptive_avg_pool", "mean", "pad")  # they read no margins
_ALIGNED, _STORES = 0.1, 6  # share of the time that whole cache lines save; what two more stores cost, in products


def _sparse(graph: Graph, node: Node) -> bool:
    weight = graph.tensors.get(str(node.inputs[1]))
    if weight is None or is_depthwise(graph, node):
        return False
    return int(weight.count_nonzero()) <= _SPARSE * weight.numel()


def _clamped(node: Node) -> bool:
    """Whether the kernel has its activation at hand while it stores vectors."""
    activation = node.attrs.get("activation")
    return activation is None or activation["name"] in ("relu", "clamp")


def _reaches(node: Node, graph: Graph) -> bool:
    """Whether a node is a conv that reads pixels beside the one that it writes where they lie."""
    if node.op != "conv" or not _moves_by_one(node):
        return False
    return any(k > 1 for k in graph.values[str(node.inputs[1])].shape[2:]) or any(node.attrs["padding"])


def _moves_by_one(node: Node) -> bool:
    return all(s == 1 for s in node.attrs["stride"])


def _three_columns(node: Node, graph: Graph) -> bool:
    """Whether a conv is sparse and its window reaches one pixel in every direction."""
    _, padding, dilation = window(node)
    kernel = tuple(graph.values[str(node.inputs[1])].shape[2:])
    return _sparse(graph, node) and kernel == (3, 3) and padding == dilation == (1, 1)


def _exact(layout: Layout, node: Node, graph: Graph, target: str) -> bool:
    """Whether a strided window reads phases as wide as what it writes."""
    return layout.roots[target].sides or _shifts(layout, node, graph)


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
    root.planes |= layout.roots[target].sides  # one run of pixels, as what is written
    height, width = (o + (k - 1) * d // s for o, k, d, s in zip(out, kernel, dilation, stride))
    root.height, root.width = max(root.height, height), max(root.width, out[1] if root.shifts else width)
    layout.strided.setdefault(name, []).append(node)
    layout.join(name, target)
