"""Interpret: run a graph with the references of OPS. Slow and plain: the oracle of everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from espalier.errors import ShapeError
from espalier.graph.ir import OPAQUE, Graph, Node
from espalier.graph.opaque import call
from espalier.graph.ops import OPS


def run(
    graph: Graph, inputs: Sequence[Tensor], *, tensors: Mapping[str, Tensor] | None = None, training: bool = False
) -> Any:
    """The outputs of `graph` on `inputs`, in the form in which the module hands them back.

    tensors: used in the place of `graph.tensors`. training: batch norms use and update the batch's statistics, dropout
    drops. Raises ShapeError for the wrong number of inputs.
    """
    values = run_values(graph, inputs, tensors=tensors, training=training)
    return assemble(graph.output_tree, [values[name] for name in graph.outputs])


def run_values(
    graph: Graph, inputs: Sequence[Tensor], *, tensors: Mapping[str, Tensor] | None = None, training: bool = False
) -> dict[str, Tensor]:
    """Every value of the graph by name, on `inputs`."""
    if len(inputs) != len(graph.inputs):
        raise ShapeError(f"the network takes {len(graph.inputs)} inputs ({', '.join(graph.inputs)}), got {len(inputs)}")
    values: dict[str, Tensor] = dict(graph.tensors if tensors is None else tensors)
    values.update(zip(graph.inputs, inputs))
    for node in graph.nodes:
        result = apply(node, [None if name is None else values[name] for name in node.inputs], training)
        values.update(zip(node.outputs, (result,) if isinstance(result, Tensor) else result))
    return values


def apply(node: Node, inputs: Sequence[Tensor | None], training: bool = False) -> Any:
    """The result of one node: a tensor, or a tuple of them."""
    if node.op == OPAQUE:
        return call(node.target, node.attrs, [x for x in inputs if x is not None])
    return OPS[node.op].reference(*inputs, training=training, **node.attrs)


def assemble(tree: Any, leaves: Sequence[Any]) -> Any:
    """`leaves` put into the form of `tree`: indices and None, in lists and dicts."""
    if isinstance(tree, int):
        return leaves[tree]
    if isinstance(tree, list):
        return tuple(assemble(value, leaves) for value in tree)
    if isinstance(tree, Mapping):
        return {key: assemble(value, leaves) for key, value in tree.items()}
    return None
