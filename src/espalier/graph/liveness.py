"""Liveness: which channels nobody needs.

A coupling lives when some weight reads it: a non-zero weight, into a channel that lives itself, from a value that is
not exactly zero there. So a residual add keeps a channel until every branch is zero in it, and a filter that nobody
reads goes even if it is not zero (unused path removal, P-RM, arXiv 1905.00136).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from espalier.graph.channels import Couplings, compact, couplings
from espalier.graph.ir import Graph, Node
from espalier.graph.states import ZERO, after, along, known, reads, states


@dataclass(frozen=True)
class Liveness:
    """labels: value or tensor -> label per entry; root: label -> coupling; alive: coupling -> is it needed?

    kept: how many channels nobody needs but that could not be cut without breaking a shape.
    """

    found: Couplings
    root: Tensor
    alive: Tensor
    kept: int

    def entries(self, name: str) -> Tensor:
        """Boolean, shape of the value: the entries that live."""
        return self.alive[self.root[self.found.labels[name]]]

    def along(self, name: str, dim: int) -> Tensor:
        """Boolean per index of dimension `dim`."""
        array = self.found.labels[name].movedim(dim, 0)
        return self.alive[self.root[compact(array, keep_first=True).flatten(1)[:, 0]]]


def liveness(graph: Graph) -> Liveness:
    """The channels that are needed, such that what is cut leaves every tensor rectangular and not empty."""
    found = couplings(graph)
    state = states(graph)
    nodes = [n for n in graph.nodes if n.op in ("conv", "linear") and n.inputs[1] in graph.tensors]
    for node in nodes:  # couple what meets at one index before the roots are read off
        found.along(node.inputs[0], _dim(graph, node))  # type: ignore[arg-type]
    root = found.roots()
    alive = torch.zeros(len(root), dtype=torch.bool)
    alive[[found.find(k) for k in found.frozen]] = True
    edges = _edges(graph, nodes, found, state, root)
    demanded = _demand(edges, alive)
    needed = int(demanded.sum())
    while True:
        grown = _demand(edges, _mend(graph, found, root, demanded))
        if bool((grown == demanded).all()):
            return Liveness(found, root, demanded, int(demanded.sum()) - needed)
        demanded = grown


def _dim(graph: Graph, node: Node) -> int:
    return 1 if node.op == "conv" else len(graph.values[node.inputs[0]].shape) - 1  # type: ignore[index]


_Edges = list[tuple[Tensor, Tensor, Tensor]]


def _edges(graph: Graph, nodes: list[Node], found: Couplings, state: dict[str, Tensor], root: Tensor) -> _Edges:
    """For each of `nodes`: what reads what, bool ``[conv_groups, outputs, inputs]``, and the roots of both."""
    edges = []
    for node in nodes:
        weight = graph.tensors[node.inputs[1]].detach().cpu()  # type: ignore[index]
        groups = int(node.attrs.get("conv_groups", 1))
        source = along(state[node.inputs[0]], _dim(graph, node)) != ZERO  # type: ignore[index]
        used = (weight != 0).flatten(2).any(2) if weight.ndim > 2 else weight != 0
        used = used.unflatten(0, (groups, -1))
        if not bool(source.all()):
            used = used & source.reshape(groups, 1, -1)
        outputs = root[found.labels[f"{node.inputs[1]}@0"]].reshape(groups, -1)
        inputs = root[found.labels[f"{node.inputs[1]}@1"]].reshape(groups, -1)
        edges.append((used, outputs, inputs))
    return edges


def _demand(edges: _Edges, alive: Tensor) -> Tensor:
    """`alive` and everything that it reads, directly or through others."""
    alive, count = alive.clone(), -1
    while count != int(alive.sum()):
        count = int(alive.sum())
        for used, outputs, inputs in reversed(edges):
            if bool(alive[inputs].all()):
                continue
            reading = alive[outputs]
            wanted = (used if bool(reading.all()) else used & reading[:, :, None]).any(1)
            alive[inputs[wanted]] = True
    return alive


def _mend(graph: Graph, found: Couplings, root: Tensor, alive: Tensor) -> Tensor:
    """`alive` with what must stay so that every value can be cut by index along its dimensions."""
    alive = alive.clone()
    for name in [*graph.inputs, *[o for n in graph.nodes for o in n.outputs], *graph.tensors]:
        if name not in found.labels:
            continue
        labels = root[compact(found.labels[name])]
        mask = alive[labels]
        if bool(mask.all()):
            continue
        if not bool(mask.any()):
            alive[labels.flatten()[0]] = True  # something must stay
            mask = alive[labels]
        product = torch.ones_like(mask)
        for dim in range(mask.ndim):
            others = [d for d in range(mask.ndim) if d != dim]
            keep = mask.any(others) if others else mask
            if dim == 0 and graph.values[name].batched and not bool(keep.all()):
                keep = torch.ones_like(keep)
            product = product & keep.reshape([-1 if d == dim else 1 for d in range(mask.ndim)])
        alive[labels[product]] = True
    for node in graph.nodes:
        if node.op == "conv" and node.attrs["conv_groups"] > 1 and f"{node.inputs[1]}@0" in found.labels:
            _mend_conv_groups(node, found, root, alive)
    return alive


def _mend_conv_groups(node: Node, found: Couplings, root: Tensor, alive: Tensor) -> None:
    """Conv groups that stay must keep equally many inputs and filters: if they do not, cut none of them."""
    groups = int(node.attrs["conv_groups"])
    outputs = root[found.labels[f"{node.inputs[1]}@0"]].reshape(groups, -1)
    inputs = root[found.labels[f"{node.inputs[1]}@1"]].reshape(groups, -1)
    if outputs.shape[1] == 1 and bool((outputs == inputs).all()):
        return  # depthwise: a conv group is a channel
    rows, columns = alive[outputs].sum(1), alive[inputs].sum(1)
    stays = (rows > 0) | (columns > 0)
    even = len({*rows[stays].tolist()}) <= 1 and len({*columns[stays].tolist()}) <= 1
    if not even or not bool((rows[stays] > 0).all() and (columns[stays] > 0).all()):
        alive[outputs[stays].flatten()] = True
        alive[inputs[stays].flatten()] = True


def needed(graph: Graph, cut: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which kernels somebody would miss, were the tensors of `cut` those of the network: site -> bool.

    Shape of a mask: ``[outputs, inputs of a conv group]``. Nobody misses a kernel that makes a channel which nobody
    needs, or one whose input is always zero, the affine part of dead filters buried.

    >>> needed(graph, {"conv1.weight": without_filter_3})["conv2.weight"][:, 3].any()
    tensor(False)
    """
    tried = replace(graph, tensors={**graph.tensors, **cut})
    buried = {
        name: tried.tensors[name].detach().masked_fill(~keep.to(tried.tensors[name].device), 0)
        for name, keep in bury(tried).items()
    }
    tried = replace(tried, tensors={**tried.tensors, **buried})
    live, state, made = liveness(tried), states(tried), dict[str, Tensor]()
    nodes = [n for n in tried.nodes if n.op in ("conv", "linear") and n.inputs[1] in tried.tensors]
    for node in nodes:
        site, groups = str(node.inputs[1]), int(node.attrs.get("conv_groups", 1))
        fed = along(state[node.inputs[0]], _dim(tried, node)) != ZERO  # type: ignore[index]
        inputs = (live.alive[live.root[live.found.labels[f"{site}@1"]]] & fed).reshape(groups, 1, -1)
        rows = live.alive[live.root[live.found.labels[f"{site}@0"]]].reshape(groups, -1, 1)
        here = (rows & inputs).flatten(0, 1)
        made[site] = made[site] | here if site in made else here
    return made


def bury(graph: Graph) -> dict[str, Tensor]:
    """Which affine entries live on: 1-d tensor (conv bias, batch-norm weight and bias) -> boolean keep-mask.

    An entry dies when its channel is fed by zero filters only, so that it is the same for every input; without it the
    channel is exactly zero and can go ("the affine part dies with the filter"). Only tensors that lose entries are
    listed. Channels that may not be cut (those of the network's outputs among them) keep theirs.
    """
    found = couplings(graph)
    frozen = {found.find(k) for k in found.frozen}
    root = found.roots()
    free = ~torch.isin(root, torch.tensor(sorted(frozen), dtype=torch.int64))
    dropped: dict[str, Tensor] = {}
    state = known(graph)
    for node in graph.nodes:
        x = node.inputs[0] or ""
        if node.op in ("conv", "linear") and node.inputs[1] in graph.tensors and node.inputs[2] is not None:
            fed = torch.stack(reads(graph, node, along(state[x], _dim(graph, node)))).any(0)
            _drop(dropped, node.inputs[2], ~fed & free[found.labels[f"{node.inputs[1]}@0"]])
        elif node.op == "batch_norm":
            dead = (along(state[x], 1) == ZERO) & free[found.along(x, 1)]
            for name in node.inputs[3:5]:
                if name is not None:
                    _drop(dropped, name, dead)
        state.update(zip(node.outputs, after(graph, node, state, dropped)))
    return {name: ~gone for name, gone in dropped.items() if bool(gone.any())}


def _drop(dropped: dict[str, Tensor], name: str, gone: Tensor) -> None:
    dropped[name] = dropped[name] & gone if name in dropped else gone
