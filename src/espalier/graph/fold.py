"""Folding: channels that are constant, but not zero, move into the biases of those who read them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from espalier.graph.interpret import run_values
from espalier.graph.ir import Graph, Node
from espalier.graph.states import CONSTANT, along, states

ROUNDING = 1e-5  # relative: what the order of a sum may make of equal numbers


def fold_constants(graph: Graph) -> Graph:
    """The same network in which nobody reads a constant channel where that can be said by a bias instead.

    Exact where the reader has no zero padding; elsewhere nothing changes. The given graph's tensors stay as they are.
    """
    state, values = states(graph), None
    uses = [name for node in graph.nodes for name in node.inputs if name in graph.tensors]
    for node in graph.nodes:
        constant = _constant_inputs(graph, node, state, uses)
        if constant is not None:
            values = values or some_run(graph)
            level, even = _level(graph, node, values)
            if bool((constant & even).any()):
                graph = _folded(graph, node, constant & even, level)
    return graph


def _constant_inputs(graph: Graph, node: Node, state: dict[str, Tensor], uses: list[str | None]) -> Tensor | None:
    """The constant channels that `node` reads and could do without (bool), or None where there are none."""
    weight = node.inputs[1] if node.op in ("conv", "linear") else None
    grouped, padded = node.attrs.get("conv_groups", 1) > 1, any(node.attrs.get("padding", []))
    if weight not in graph.tensors or grouped or padded or uses.count(weight) > 1 or uses.count(node.inputs[2]) > 1:
        return None
    x = node.inputs[0]
    assert x is not None and weight is not None
    dim = 1 if node.op == "conv" else len(graph.values[x].shape) - 1
    constant = along(state[x], dim) == CONSTANT
    if bool(constant.any()):
        constant &= (graph.tensors[weight].detach().cpu() != 0).movedim(1, 0).flatten(1).any(1)
    return constant if bool(constant.any()) else None


def _level(graph: Graph, node: Node, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The first number of every channel that `node` reads, and whether all its positions hold the same.

    A constant may differ from position to position (bool on the CPU): a pixel shuffle puts several channels into one.
    """
    x = values[node.inputs[0] or ""].detach()
    rows = x.movedim(1 if node.op == "conv" else x.ndim - 1, 0).flatten(1)
    apart = (rows - rows[:, :1]).abs().amax(1)
    return rows[:, 0], (apart <= ROUNDING * rows.abs().amax(1)).cpu()


def _folded(graph: Graph, node: Node, constant: Tensor, level: Tensor) -> Graph:
    x, weight, bias = node.inputs[:3]
    assert x is not None and weight is not None
    old = graph.tensors[weight].detach()
    level = level.double().masked_fill(~constant.to(level.device), 0)
    extra = (old.flatten(2).sum(2) if old.ndim > 2 else old).double() @ level
    name = bias or weight.removesuffix("weight") + "bias"
    start = graph.tensors[name].detach().double() if bias else torch.zeros_like(extra)
    keep = (~constant).to(old).reshape([-1 if d == 1 else 1 for d in range(old.ndim)])
    trains = graph.tensors[weight].requires_grad
    tensors = {**graph.tensors, weight: (old * keep).requires_grad_(trains)}
    tensors[name] = (start + extra).to(old.dtype).requires_grad_(graph.tensors[name].requires_grad if bias else trains)
    value = replace(graph.values[weight], name=name, shape=tuple(extra.shape))
    swapped = replace(node, inputs=(x, weight, name, *node.inputs[3:]))
    return replace(
        graph,
        nodes=tuple(swapped if other.name == node.name else other for other in graph.nodes),
        tensors=tensors,
        values={**graph.values, name: value},
        parameters=graph.parameters | {name},
    )


def some_run(graph: Graph) -> dict[str, Tensor]:
    """Every value on arbitrary inputs: a constant channel shows its constant on any."""
    device = next((tensor.device for tensor in graph.tensors.values()), torch.device("cpu"))
    inputs = [torch.ones(graph.values[n].shape, dtype=graph.values[n].dtype, device=device) for n in graph.inputs]
    with torch.no_grad():
        return run_values(graph, inputs)
