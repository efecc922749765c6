"""Compiled networks as plain values, so that a file can hold them and nothing needs to be compiled again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from espalier.compiler.fuse import fold_constants
from espalier.compiler.lower import Piece, subgraph
from espalier.compiler.program import STEP_OPS, Operand, Program, Step, TensorSpec
from espalier.errors import EngineError
from espalier.graph.ir import Graph
from espalier.runtime.executable import Executable


@dataclass(frozen=True)
class _StepRow:
    """What is told of a step: all but its arrays, which are in the program's bytes."""

    name: str
    op: str
    format: str
    reason: str
    nonzeros: int
    weights: int
    out: list[int]
    a: list[int]
    task: int = 0
    bands: int = 0


def dump(program: Executable) -> list[tuple[dict[str, Any], bytes]]:
    """Every piece as JSON values, and the bytes of its program (none where PyTorch runs it)."""
    pieces = []
    engine = iter(program.loaded())
    for piece in program.pieces:
        row: dict[str, Any] = {
            "nodes": [node.name for node in piece.graph.nodes],
            "reasons": [*map(list, piece.reasons)],
        }
        if piece.program is None:
            pieces.append((row, b""))
            continue
        row["steps"] = [
            asdict(
                _StepRow(
                    step.name,
                    step.op,
                    step.format,
                    step.reason,
                    step.nonzeros,
                    step.weights,
                    [*step.out.sizes],
                    [*step.a.sizes],
                    step.task,
                    step.bands,
                )
            )
            for step in piece.program.steps
        ]
        _, loaded = next(engine)
        pieces.append((row, loaded.to_bytes()))
    return pieces


def restore(graph: Graph, pieces: Sequence[tuple[Mapping[str, Any], bytes]], threads: int | None = None) -> Executable:
    """What `dump` made of a compiled `graph`, without compiling.

    Raises ValueError where the pieces are not those of the graph, or the engine refuses a program.
    """
    folded = fold_constants(graph)
    nodes = {node.name: node for node in folded.nodes}
    known = {*folded.inputs, *folded.tensors}
    made = []
    for row, code in pieces:
        names = row["nodes"]
        if not isinstance(names, list) or not all(isinstance(name, str) and name in nodes for name in names):
            raise ValueError("a piece has nodes that the graph has not, or has them twice")
        part = subgraph(folded, [nodes.pop(name) for name in names])
        if not set(part.inputs) <= known:
            raise ValueError("a piece reads what was not made before it")
        known |= {name for node in part.nodes for name in node.outputs}
        reasons = tuple((str(name), str(why)) for name, why in row["reasons"])
        made.append(Piece(part, _program(part, row["steps"]) if code else None, reasons, code))
    if nodes:
        raise ValueError(f"node {next(iter(nodes))!r:.80} is in no piece")
    try:
        program = Executable(graph, threads, pieces=tuple(made))
    except EngineError as error:
        raise ValueError(f"the engine refuses its program: {error}") from error
    for piece, loaded in program.loaded():
        ends = [
            (name, tuple(piece.graph.values[name].shape[1:])) for name in (*piece.graph.inputs, *piece.graph.outputs)
        ]
        assert piece.program is not None
        if [*loaded.inputs, *loaded.outputs] != ends or loaded.steps != [s.name for s in piece.program.steps]:
            raise ValueError("its program is that of another graph")
    return program


def _program(graph: Graph, rows: Sequence[Mapping[str, Any]]) -> Program:
    """What the table of steps needs; the arrays stay in the engine."""
    steps = []
    for values in rows:
        row = _StepRow(**values)
        texts, numbers = (
            (row.name, row.format, row.reason),
            (row.nonzeros, row.weights, row.task, row.bands, *row.out, *row.a),
        )
        sound = row.op in STEP_OPS and all(isinstance(text, str) for text in texts)
        if not sound or any(type(n) is not int or n < 0 for n in numbers) or (len(row.out), len(row.a)) != (4, 4):
            raise ValueError(f"step {row.name!r:.80} cannot be")
        out, a = (Operand(sizes=tuple(sizes)) for sizes in (row.out, row.a))  # type: ignore[arg-type]
        steps.append(
            Step(
                row.name,
                row.op,
                out,
                a,
                format=row.format,
                reason=row.reason,
                nonzeros=row.nonzeros,
                weights=row.weights,
                task=row.task,
                bands=row.bands,
            )
        )
    inputs, outputs = (
        tuple(TensorSpec(name, tuple(graph.values[name].shape[1:])) for name in names)
        for names in (graph.inputs, graph.outputs)
    )
    return Program(inputs, outputs, tuple(steps), 0)
