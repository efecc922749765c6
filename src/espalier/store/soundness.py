"""Soundness: whether a graph that comes from a file can be what it says, before anything of it is used.

`graph.serial` has checked names and order; here every node is run on shapes alone (PyTorch's meta device: no memory, no
arithmetic), so a wrong attribute, a missing input or a shape that does not follow is found when the file is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.graph import OPAQUE, OPS, Graph, Node
from espalier.graph.interpret import apply

# What a malformed call of an opaque op raises. RuntimeError only where it begins with the op's schema ("aten::relu()
# expected at most 1 argument"): PyTorch cannot run each op on shapes alone, and says that with one too.
_MALFORMED = (KeyError, IndexError, TypeError, AttributeError, ValueError)


def check_sound(graph: Graph) -> None:
    """Raises ValueError that names the first node whose results are not what the graph says."""
    shapes = {v.name: torch.empty(v.shape, dtype=v.dtype, device="meta") for v in graph.values.values()}
    for node in graph.nodes:
        try:
            with torch.device("meta"):  # what an op makes from nothing is no memory either
                made = apply(node, [None if name is None else shapes[name] for name in node.inputs])
        except Exception as error:  # hostile attributes raise whatever the op they go to raises
            if node.op == OPAQUE and not isinstance(error, _MALFORMED) and not str(error).startswith("aten::"):
                continue
            raise ValueError(f"node {node.name!r:.80} ({node.op}) cannot be run: {_line(error)}") from None
        _compare(node, graph, made)
        if node.op != OPAQUE and OPS[node.op].channels in ("contract", "norm"):
            _check_parameters(node, graph)


def _check_parameters(node: Node, graph: Graph) -> None:
    """What runs on shapes alone does not see: one dtype for all, and a bias per output channel."""
    given = [graph.values[name] for name in node.inputs if name is not None]
    if len({value.dtype for value in given}) > 1:
        raise ValueError(f"node {node.name!r:.80} ({node.op}) mixes {', '.join(str(v.dtype) for v in given)}")
    if node.op in ("conv", "linear") and len(given) == 3 and given[2].shape != given[1].shape[:1]:
        raise ValueError(f"node {node.name!r:.80} has a bias {given[2].shape} beside a weight {given[1].shape}")


def _compare(node: Node, graph: Graph, made: Tensor | tuple[Tensor, ...] | list[Tensor]) -> None:
    results = [made] if isinstance(made, Tensor) else list(made)
    got = [(tuple(x.shape), x.dtype) for x in results]
    said = [(graph.values[name].shape, graph.values[name].dtype) for name in node.outputs]
    if got != said:
        raise ValueError(f"node {node.name!r:.80} ({node.op}) makes {got!s:.120}, the file says {said!s:.120}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
