"""A graph's structure as JSON, and back. Reading trusts nothing: a hostile structure gets an error, never a crash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from espalier.graph.ir import OPAQUE, Graph, Node, Value
from espalier.graph.opaque import check_template, resolve
from espalier.graph.ops import OPS

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
MOST_NODES, MOST_RANK, MOST_DEPTH, LARGEST = 100_000, 8, 16, 2**40


def to_json(graph: Graph) -> dict[str, Any]:
    """Everything of a graph but its tensors, as plain JSON values."""
    return {
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "output_tree": graph.output_tree,
        "parameters": sorted(graph.parameters),
        "aliases": dict(graph.aliases),
        **({"constants": sorted(graph.constants)} if graph.constants else {}),
        "values": {
            v.name: [list(v.shape), str(v.dtype).removeprefix("torch."), v.batched] for v in graph.values.values()
        },
        "nodes": [
            {
                "name": n.name,
                "op": n.op,
                "inputs": list(n.inputs),
                "outputs": list(n.outputs),
                "attrs": dict(n.attrs),
                "target": n.target,
                "place": n.place,
            }
            for n in graph.nodes
        ],
    }


def from_json(structure: Any, tensors: Mapping[str, Tensor]) -> Graph:
    """The graph of `structure` with `tensors`. Raises ValueError that says what is wrong with it."""
    fields = _typed(structure, dict, "the graph")
    values = {name: _value(name, row) for name, row in _typed(fields.get("values"), dict, "values").items()}
    for name, tensor in tensors.items():
        value = values.get(name)
        if value is None or value.shape != tuple(tensor.shape) or value.dtype != tensor.dtype:
            raise ValueError(f"tensor {name!r} is not what the graph says: {value} against {list(tensor.shape)}")
    inputs, outputs = _names(fields.get("inputs"), "inputs"), _names(fields.get("outputs"), "outputs")
    known = {*inputs, *tensors}
    if len(known) != len(inputs) + len(tensors):
        raise ValueError("an input has the name of a tensor, or of another input")
    rows = _typed(fields.get("nodes"), list, "nodes")
    if len(rows) > MOST_NODES:
        raise ValueError(f"{len(rows)} nodes: more than {MOST_NODES} are not read")
    nodes = tuple(_node(row, known, values) for row in rows)
    missing = [name for name in (*inputs, *outputs, *known) if name not in values] + [
        o for o in outputs if o not in known
    ]
    if missing:
        raise ValueError(f"{missing[0]!r} is named but not defined")
    parameters = _names(fields.get("parameters"), "parameters")
    aliases = _typed(fields.get("aliases"), dict, "aliases")
    constants = _names(fields.get("constants", []), "constants")
    if not {*parameters, *constants} <= set(tensors) or any(t not in tensors for t in map(str, aliases.values())):
        raise ValueError("a parameter, constant or alias names no tensor")
    if set(parameters) & set(constants):
        raise ValueError("a parameter is called a constant")
    if any(not _dotted(name) for name in (*tensors, *aliases)) or set(aliases) & set(tensors):
        raise ValueError("a tensor's name is not one of dotted words")
    _tree(fields.get("output_tree"), len(outputs), 0)
    return Graph(
        inputs=inputs,
        outputs=outputs,
        nodes=nodes,
        values=values,
        tensors=dict(tensors),
        parameters=frozenset(parameters),
        output_tree=fields["output_tree"],
        aliases=dict(aliases),
        constants=frozenset(constants),
    )


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _names(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_typed(name, str, what) for name in _typed(value, list, what))


def _dotted(name: str) -> bool:
    return 0 < len(name) < 500 and all(part and part.replace("_", "a").isalnum() for part in name.split("."))


def _value(name: str, row: Any) -> Value:
    if not (isinstance(row, list) and len(row) == 3 and isinstance(row[2], bool) and row[1] in DTYPES):
        raise ValueError(f"value {name!r}: expected [shape, dtype, batched], got {row!r:.80}")
    shape = _typed(row[0], list, f"shape of {name!r}")
    if (
        len(shape) > MOST_RANK
        or any(type(s) is not int or not 0 <= s < LARGEST for s in shape)
        or math.prod(shape) > LARGEST
    ):
        raise ValueError(f"value {name!r}: shape {shape!r:.80} cannot be")
    return Value(name, tuple(shape), DTYPES[row[1]], row[2])


def _node(row: Any, known: set[str], values: Mapping[str, Value]) -> Node:
    """One node; its outputs are known from then on."""
    fields = _typed(row, dict, "a node")
    name, op = _typed(fields.get("name"), str, "a node's name"), _typed(fields.get("op"), str, "a node's op")
    if op != OPAQUE and op not in OPS:
        raise ValueError(f"node {name!r}: unknown op {op!r}: a newer version of espalier may know it")
    inputs = tuple(_typed(fields.get("inputs"), list, f"inputs of {name!r}"))
    for given in inputs:
        if given is not None and (not isinstance(given, str) or given not in known):
            raise ValueError(f"node {name!r} reads {given!r} before it is made")
    outputs = _names(fields.get("outputs"), f"outputs of {name!r}")
    if not outputs or any(out in known or out not in values for out in outputs) or len(set(outputs)) != len(outputs):
        raise ValueError(f"node {name!r} makes {outputs!r}, which are made already or not described")
    known.update(outputs)
    attrs = _typed(fields.get("attrs"), dict, f"attributes of {name!r}")
    _plain(attrs, 0)
    target = _typed(fields.get("target", ""), str, f"target of {name!r}")
    if op == OPAQUE:
        resolve(target)
        check_template(target, attrs, len(inputs))
    else:
        OPS[op].check(attrs)
    return Node(name, op, inputs, outputs, attrs, target, _typed(fields.get("place", ""), str, "place"))


def _plain(value: Any, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError("attributes are nested too deep")
    if isinstance(value, dict):
        for key, item in value.items():
            _typed(key, str, "an attribute's name")
            _plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _plain(item, depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**63:
        raise ValueError("an attribute is too large a number")


def _tree(tree: Any, leaves: int, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError("the outputs are nested too deep")
    if isinstance(tree, dict):
        for item in tree.values():
            _tree(item, leaves, depth + 1)
    elif isinstance(tree, list):
        for item in tree:
            _tree(item, leaves, depth + 1)
    elif tree is not None and (type(tree) is not int or not 0 <= tree < leaves):
        raise ValueError(f"the outputs name leaf {tree!r} of {leaves}")
