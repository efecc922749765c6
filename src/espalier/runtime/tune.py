"""Tune: which format each weight is stored in, by measuring all of them on this machine instead of estimating.

Every conv and linear layer is compiled alone in each format that fits it and timed. Times are kept on disk, by machine
and build of the engine, so that a network is measured once. The compiler gets what was fastest through
`blocks.choosing`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable

import numpy as np

from espalier.compiler import blocks
from espalier.compiler.lower import alone, native_nodes, program_of
from espalier.compiler.program import Program
from espalier.graph.ir import Graph, Node
from espalier.runtime.cache import Shelf, identity
from espalier.runtime.engine import Context, LoadedProgram

ROUNDS = 7  # of all formats in turns, after one to warm up
MOST_RUNS = 40  # in a round, so that it takes about a millisecond
_ROUND_MS = 1.0
_WORTH = 0.95  # of the usual format's time: less is within what a measurement of one layer by itself can say


def tuned(graph: Graph, threads: int, shelf: Shelf | None = None) -> blocks.Chooser:
    """A chooser that knows the fastest format of every conv and linear weight of `graph`.

    threads: for which to measure. shelf: where measurements are kept; default: this machine's cache folder.
    """
    shelf = shelf or Shelf("formats", identity(threads))
    known = shelf.read()
    fresh: dict[str, float] = {}
    fastest: dict[str, str] = {}
    for part, node in native_nodes(graph, threads):
        seen = _Seen()
        with blocks.choosing(seen):
            program_of(alone(part, node))
        for matrix, op in seen.asked:
            key = _layer_key(part, node, matrix, op)
            formats = blocks.formats(matrix, op)
            missing = [name for name in formats if f"{key} {name}" not in known]
            if missing:
                # all of them again, in turns: times of one run compare best
                known |= (made := _measured(part, node, matrix, op, key, formats, threads))
                fresh |= made
            best = min(formats, key=lambda name: known[f"{key} {name}"])
            usual = blocks.choose(matrix, op).format
            if known[f"{key} {best}"] < _WORTH * known.get(f"{key} {usual}", float("inf")):
                fastest[_digest(matrix, op)] = best
    if fresh:
        shelf.add(fresh)
    return lambda matrix, op: fastest.get(_digest(matrix, op))


class _Seen:
    """A chooser that leaves the choice to the estimate and remembers what it was asked about."""

    def __init__(self) -> None:
        self.asked: list[tuple[np.ndarray, str]] = []

    def __call__(self, matrix: np.ndarray, op: str) -> str | None:
        self.asked.append((matrix, op))
        return None


def _measured(
    graph: Graph, node: Node, matrix: np.ndarray, op: str, key: str, formats: Iterable[str], threads: int
) -> dict[str, float]:
    """ "<key> <format>" -> milliseconds of the node's steps."""
    digest = _digest(matrix, op)
    timers = {}
    for name in formats:
        with blocks.choosing(_fixed(name, digest)):
            timers[name] = _Timer(program_of(alone(graph, node)), 1 if "task" in node.attrs else threads)
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.round_ms())
    return {f"{key} {name}": float(np.median(found)) for name, found in times.items()}


def _fixed(name: str, digest: str) -> blocks.Chooser:
    """A chooser of one format for one matrix."""
    return lambda matrix, op: name if _digest(matrix, op) == digest else None


class _Timer:
    """Runs a program of one layer and times the steps of the layer itself, not the copies around it."""

    def __init__(self, program: Program, threads: int) -> None:
        self.context = Context(LoadedProgram(program.to_bytes()), threads)
        self.own = [i for i, step in enumerate(program.steps) if step.nodes]
        rng = np.random.default_rng(0)
        self.inputs = [rng.standard_normal((1, *spec.shape), np.float32) for spec in program.inputs]
        self.runs = 1
        self.runs = max(1, min(MOST_RUNS, math.ceil(_ROUND_MS / max(1e-6, min(self.round_ms(), self.round_ms())))))

    def round_ms(self) -> float:
        """The mean of some runs."""
        self.context.profile(True)
        for _ in range(self.runs):
            self.context.run(self.inputs, 1)
        ms = self.context.step_ms()
        return sum(ms[i] for i in self.own) / self.runs


def _digest(matrix: np.ndarray, op: str) -> str:
    return hashlib.sha256(op.encode() + np.ascontiguousarray(matrix).tobytes()).hexdigest()


def _layer_key(graph: Graph, node: Node, matrix: np.ndarray, op: str) -> str:
    """What the time of a layer depends on: the op with its attributes and shapes, and where the matrix has zeros."""
    attrs = {k: v for k, v in node.attrs.items() if k not in ("fused", "task")} | {"own": "task" in node.attrs}
    shapes = [None if n is None else tuple(graph.values[n].shape[1:]) for n in (*node.inputs[:1], *node.outputs)]
    place = hashlib.sha256(np.packbits(matrix != 0).tobytes()).hexdigest()
    text = json.dumps([node.op, op, attrs, shapes, matrix.shape, len(node.inputs), place], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
