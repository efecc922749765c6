"""Samples: where the numbers of one sample lie in values whose batch is not their first dimension.

The engine computes one sample at a time. Attention code moves the batch about (``permute(2, 0, 3, 1, 4)``, then
``unbind(0)``) or merges it with another dimension (``view(tokens, batch * heads, width)``). Such a value can still be
computed sample by sample when every op on the way treats samples alike; that is found out by running the ops on
numbered entries: what belongs to a sample must come out in the order in which the op, given that sample alone, would
leave it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from espalier.graph.interpret import apply
from espalier.graph.ir import OPAQUE, Graph, Node, Value
from espalier.graph.ops import OPS

LARGEST = 1 << 24  # entries of a value that are numbered


@dataclass
class Samples:
    """shapes: value whose batch lies elsewhere -> its shape at a batch of one, that dimension included.

    fine: the nodes that read or write such values and treat samples alike.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fine: set[str] = field(default_factory=set)
    owners: dict[str, Tensor] = field(default_factory=dict)
    # how a value was made -> what became of it: the layers of a network are alike
    origins: dict[str, Hashable] = field(default_factory=dict)
    seen: dict[Hashable, list[tuple[Tensor, tuple[int, ...]]] | None] = field(default_factory=dict)

    def strange(self, node: Node) -> bool:
        """Does the node touch a value whose batch lies elsewhere?"""
        return any(name in self.shapes for name in (*node.inputs, *node.outputs) if name is not None)


def follows(graph: Graph, value: Value, batch: int) -> bool:
    """Whether dimension 0 of a value counts samples: neither a multiple of the batch nor some other size like it."""
    free = any(graph.values[name].batched for name in graph.inputs)
    return bool(value.shape) and value.shape[0] == batch and (value.batched or not free)


def track(graph: Graph, batch: int) -> Samples:
    """Every value of `graph` whose batch is not its first dimension and that can be computed sample by sample."""
    found = Samples()
    for node in graph.nodes:
        inputs = [name for name in node.inputs if name is not None and name not in graph.tensors]
        usual = all(follows(graph, graph.values[n], batch) for n in (*inputs, *node.outputs))
        known = all(n in found.shapes or follows(graph, graph.values[n], batch) for n in inputs)
        if node.op == OPAQUE or not inputs or not known or (usual and not found.shapes.keys() & set(inputs)):
            continue
        if max(torch.Size(graph.values[n].shape).numel() for n in (*inputs, *node.outputs)) > LARGEST:
            continue
        rule = node.op if node.op in _RULES else OPS[node.op].channels
        if rule in _RULES and _RULES[rule](graph, batch, found, node, inputs):
            found.fine.add(node.name)
    return found


def _owner(graph: Graph, batch: int, found: Samples, name: str) -> Tensor:
    """Which sample every entry belongs to."""
    if name in found.owners:
        return found.owners[name]
    shape = graph.values[name].shape
    return torch.arange(batch).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def shape_at_one(graph: Graph, shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    """The shape of a value at a batch of one."""
    return shapes[name] if name in shapes else (1, *graph.values[name].shape[1:])


def _keep(graph: Graph, batch: int, found: Samples, name: str, owner: Tensor, shape: tuple[int, ...]) -> bool:
    """Note a result; False where it looks as if its first dimension were the batch, but is not."""
    if follows(graph, graph.values[name], batch):
        return bool((owner == _owner(graph, batch, Samples(), name)).all())
    found.shapes[name], found.owners[name] = shape, owner
    return True


def _moved(graph: Graph, batch: int, found: Samples, node: Node, inputs: list[str]) -> bool:
    if len(inputs) != 1 or len([n for n in node.inputs if n is not None]) != 1:
        return False
    origin: Hashable = (_origin(graph, found, inputs[0]), node.op, str(node.attrs))
    if origin not in found.seen:
        owner, one = _owner(graph, batch, found, inputs[0]), shape_at_one(graph, found.shapes, inputs[0])
        found.seen[origin] = _results(node, batch, owner, one)
    results = found.seen[origin]
    if results is None:
        return False
    for k, (name, (owner, shape)) in enumerate(zip(node.outputs, results)):
        found.origins[name] = (origin, k)
        if not _keep(graph, batch, found, name, owner, shape):
            return False
    return True


def _origin(graph: Graph, found: Samples, name: str) -> Hashable:
    return found.origins.get(name, name) if name in found.shapes else graph.values[name].shape


def _results(
    node: Node, batch: int, owner: Tensor, one: tuple[int, ...]
) -> list[tuple[Tensor, tuple[int, ...]]] | None:
    """For every result: whom its entries belong to, and its shape at a batch of one. None where samples are mixed."""
    size = torch.Size(one).numel()
    numbers = torch.empty(owner.shape, dtype=torch.int64)
    alone = torch.arange(size)
    for sample in range(batch):
        mask = owner == sample
        if int(mask.sum()) != size:
            return None
        numbers[mask] = alone + sample * size
    try:
        whole, single = apply(node, [numbers]), apply(node, [alone.reshape(one)])
    except (RuntimeError, IndexError):
        return None
    wholes, singles = ([x] if isinstance(x, Tensor) else list(x) for x in (whole, single))
    results = []
    for many, few in zip(wholes, singles):
        belongs = many // size
        if any(not torch.equal(many[belongs == k] - k * size, few.flatten()) for k in range(batch)):
            return None
        results.append((belongs, tuple(few.shape)))
    return results


def _linear(graph: Graph, batch: int, found: Samples, node: Node, inputs: list[str]) -> bool:
    owner, one = _owner(graph, batch, found, inputs[0]), shape_at_one(graph, found.shapes, inputs[0])
    if node.inputs[0] != inputs[0] or bool((owner != owner[..., :1]).any()):
        return False
    shape = graph.values[node.outputs[0]].shape
    owner, one = owner[..., :1].expand(shape), (*one[:-1], shape[-1])
    alike = all(  # the residual that fuse puts there
        torch.equal(_owner(graph, batch, found, n), owner) and shape_at_one(graph, found.shapes, n) == one
        for n in inputs[1:]
    )
    found.origins[node.outputs[0]] = (_origin(graph, found, inputs[0]), "linear", shape[-1])
    return alike and _keep(graph, batch, found, node.outputs[0], owner, one)


def _layer_norm(graph: Graph, batch: int, found: Samples, node: Node, inputs: list[str]) -> bool:
    owner, one = _owner(graph, batch, found, inputs[0]), shape_at_one(graph, found.shapes, inputs[0])
    if len(inputs) > 1 or len(node.attrs["shape"]) != 1 or bool((owner != owner[..., :1]).any()):
        return False
    found.origins[node.outputs[0]] = _origin(graph, found, inputs[0])
    return _keep(graph, batch, found, node.outputs[0], owner, one)


def _elementwise(graph: Graph, batch: int, found: Samples, node: Node, inputs: list[str]) -> bool:
    owner, one = _owner(graph, batch, found, inputs[0]), shape_at_one(graph, found.shapes, inputs[0])
    if len(inputs) != len([n for n in node.inputs if n is not None]):
        return False
    same = all(
        torch.equal(_owner(graph, batch, found, n), owner) and shape_at_one(graph, found.shapes, n) == one
        for n in inputs
    )
    found.origins[node.outputs[0]] = _origin(graph, found, inputs[0])
    return same and _keep(graph, batch, found, node.outputs[0], owner, one)


_RULES = {"move": _moved, "linear": _linear, "layer_norm": _layer_norm, "elementwise": _elementwise}
