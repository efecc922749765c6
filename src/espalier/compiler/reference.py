"""The oracle of fused graphs: the references of OPS, and after them what was fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from espalier.compiler.transposed import side_by_side
from espalier.graph import Graph, Node
from espalier.graph.interpret import apply, assemble


def run_fused(graph: Graph, inputs: Sequence[Tensor]) -> Any:
    """The outputs of a graph that went through `fuse`."""
    values: dict[str, Tensor] = {**graph.tensors, **dict(zip(graph.inputs, inputs))}
    with torch.no_grad():
        for node in graph.nodes:
            given = [None if name is None else values[name] for name in node.inputs]
            result = apply_fused(node, given)
            values.update(zip(node.outputs, (result,) if isinstance(result, Tensor) else result))
    return assemble(graph.output_tree, [values[name] for name in graph.outputs])


def apply_fused(node: Node, inputs: Sequence[Tensor | None]) -> Any:
    """The result of one node of a fused graph."""
    attrs = {key: value for key, value in node.attrs.items() if key != "activation"}
    plain = replace(node, attrs=attrs)
    activation = node.attrs.get("activation")
    if node.op == "affine":
        x, scale, shift = inputs
        assert x is not None and scale is not None and shift is not None
        shape = (1, -1, *[1] * (x.ndim - 2))
        result = x * scale.reshape(shape) + shift.reshape(shape)
    elif node.op == "unphase":
        result = side_by_side(inputs[0], **attrs)  # type: ignore[arg-type]
    elif node.op in ("conv", "linear") and len(inputs) == 4:
        result = apply(plain, inputs[:3]) + inputs[3]
    else:
        result = apply(plain, inputs)
    if activation is None:
        return result
    name = activation["name"]
    return apply(Node(name, name, (), (), {k: v for k, v in activation.items() if k != "name"}), [result])
