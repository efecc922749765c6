"""Layers: what a site looks like to the engine, in words that two networks can share."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.graph.ir import Graph, Node, Site


@dataclass(frozen=True)
class Layer:
    """A site with all that its time depends on, but for the weights.

    key: the shape in words: equal keys take equal time. nodes: the names of the nodes that use the weight.
    reads_input: fed by the network's input. answers: makes the network's output.
    """

    site: Site
    key: str
    nodes: tuple[str, ...]
    reads_input: bool
    answers: bool

    @property
    def window(self) -> tuple[int, ...]:
        """The kernel's size in space, () for a linear layer."""
        return self.site.shape[2:]

    @property
    def pointwise(self) -> bool:
        """Is it a plain matrix product: a linear layer or a 1 x 1 conv?"""
        return all(size == 1 for size in self.window)


def layers(graph: Graph) -> dict[str, Layer]:
    """site -> layer, in the graph's order.

    >>> layers(capture(nn.Conv2d(3, 8, 3), torch.ones(1, 3, 9, 9)))["weight"].key
    'conv 8x3x3x3 stride 1x1 padding 0x0 dilation 1x1 groups 1 on 9x9'
    """
    sites = graph.sites()
    users: dict[str, list[Node]] = {name: [] for name in sites}
    for node in graph.nodes:
        if node.op in ("conv", "linear") and node.inputs[1] in users:
            users[str(node.inputs[1])].append(node)
    answers = _answers(graph)
    return {
        name: Layer(
            site,
            "; ".join(_key(graph, node, site) for node in users[name]),
            tuple(node.name for node in users[name]),
            any(node.inputs[0] in graph.inputs for node in users[name]),
            name in answers,
        )
        for name, site in sites.items()
    }


def _key(graph: Graph, node: Node, site: Site) -> str:
    shape = _times(site.shape)
    if node.op == "linear":
        return f"linear {shape} on {site.positions} rows"
    assert node.inputs[0] is not None
    space = graph.values[node.inputs[0]].shape[2:]
    told = " ".join(f"{name} {_times(node.attrs[name])}" for name in ("stride", "padding", "dilation"))
    return f"conv {shape} {told} groups {site.conv_groups} on {_times(space)}"


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _answers(graph: Graph) -> set[str]:
    """The sites whose output reaches the network's output without passing another site."""
    producer, reached, queue = graph.producer(), set(), list(graph.outputs)
    sites, found = graph.sites(), set()
    while queue:
        name = queue.pop()
        if name in reached or name not in producer:
            continue
        reached.add(name)
        node = producer[name]
        weight = node.inputs[1] if node.op in ("conv", "linear") else None
        if weight in sites:
            found.add(str(weight))
        else:
            queue += [value for value in node.inputs if value is not None]
    return found
