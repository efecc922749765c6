"""Graph: what a network computes, op by op.

Values have names. The name of a parameter, buffer or constant is its name in the user's module
(``layer1.0.conv1.weight``), so a site of a plan, a tensor of a graph and a key of ``state_dict`` are one word.
Everything here is plain data; `graph.capture` makes it, `graph.interpret` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OPAQUE = "opaque"


@dataclass(frozen=True)
class Value:
    """A tensor that flows through the graph.

    shape: sizes at the captured batch size.
    batched: dimension 0 follows the batch size of the inputs, so `shape[0]` is only an example.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool = False


@dataclass(frozen=True)
class Node:
    """One op applied to values.

    op: a row of `graph.ops.OPS`, or ``"opaque"`` for an op without a row.
    inputs: names of values; None where an optional input is absent (a conv without bias).
    outputs: names of the values it makes.
    attrs: JSON values only (numbers, strings, lists, dicts, None), so a node can be stored.
    target: the ATen overload it was captured from, e.g. ``aten.conv2d.default``.
    place: module path and line in the user's code, for messages.
    """

    name: str
    op: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    place: str = ""


@dataclass(frozen=True)
class Site:
    """A parameter where a scheme applies: the weight of a conv or linear op.

    positions: how many output positions one sample of the example input has, so that one dense pass costs
    `positions * prod(shape)` multiply-accumulates.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    conv_groups: int = 1
    positions: int = 1

    @property
    def weights(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample, dense."""
        return self.weights * self.positions

    @property
    def depthwise(self) -> bool:
        """Whether each filter reads one channel."""
        return self.op == "conv" and self.conv_groups > 1 and self.shape[1] == 1


@dataclass(frozen=True)
class Graph:
    """What a network computes: nodes in execution order over named values.

    inputs, outputs: names of values, flat.
    output_tree: how the outputs are handed back: an index into `outputs`, or None, or lists and dicts of such.
    tensors: every parameter, buffer and constant by name (shared with the captured module, not copied).
    parameters: the names in `tensors` that are trainable parameters.
    aliases: other names under which the module knows a tensor (tied weights) -> name in `tensors`.
    constants: the names in `tensors` that are not in the module's state_dict (numbers in the code, buffers that are
        not kept).
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    parameters: frozenset[str] = frozenset()
    output_tree: Any = 0
    aliases: Mapping[str, str] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()

    def producer(self) -> dict[str, Node]:
        """value name -> the node that makes it (inputs and tensors have none)."""
        return {out: node for node in self.nodes for out in node.outputs}

    def readers(self) -> dict[str, list[Node]]:
        """value name -> the nodes that read it, in order; a node that reads it twice stands once."""
        table: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name is not None:
                    table[name].append(node)
        return table

    def sites(self) -> dict[str, Site]:
        """The weights that a scheme can shape: input 1 of conv and linear nodes, where it is a tensor with entries."""
        sites: dict[str, Site] = {}
        for node in self.nodes:
            if node.op not in ("conv", "linear") or node.inputs[1] not in self.tensors:
                continue
            name = node.inputs[1]
            assert name is not None
            shape, out = self.values[name].shape, self.values[node.outputs[0]]
            if not math.prod(shape):  # a layer of no width
                continue
            per_sample = math.prod(out.shape[1:] if out.batched else out.shape)
            before = sites[name].positions if name in sites else 0  # a shared weight works at each use
            positions = before + per_sample // shape[0]
            sites[name] = Site(name, node.op, tuple(shape), int(node.attrs.get("conv_groups", 1)), positions)
        return sites

    def opaque(self) -> tuple[Node, ...]:
        """The nodes that no row of OPS describes; what touches them is never cut."""
        return tuple(node for node in self.nodes if node.op == OPAQUE)
