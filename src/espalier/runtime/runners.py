"""Runners: what runs the pieces of a compiled network, in the engine or in PyTorch."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.compiler.lower import Piece
from espalier.graph.interpret import run_values
from espalier.runtime.engine import Context, LoadedProgram


class Native:
    """A piece with its program in the engine, and contexts that wait for callers."""

    def __init__(self, piece: Piece, threads: int) -> None:
        assert piece.program is not None
        self.program, self.threads = piece.program, threads
        self.loaded = LoadedProgram(piece.code)
        self.inputs, self.outputs = piece.graph.inputs, piece.graph.outputs
        self.idle: list[Context] = [Context(self.loaded, threads)]

    def __call__(self, values: dict[str, Any], batch: int, times: defaultdict[str, float] | None) -> None:
        arrays = [array_of(values[name]) for name in self.inputs]
        context = self.borrow()
        try:
            if times is None:
                results = context.run(arrays, batch)
            else:
                with self.timing(context, times):
                    results = context.run(arrays, batch)
        finally:
            self.idle.append(context)
        values.update(zip(self.outputs, results))

    @contextmanager
    def timing(self, context: Context, times: defaultdict[str, float]) -> Iterator[None]:
        """Adds to `times` the milliseconds that each step takes meanwhile."""
        context.profile(True)
        try:
            yield
        finally:
            for step, spent in zip(self.program.steps, context.step_ms()):
                times[step.layer] += spent
            context.profile(False)

    def borrow(self) -> Context:
        """One that nobody else has. Those of a process that forked are left alone: their threads did not follow."""
        while True:
            try:
                context = self.idle.pop()  # atomic: two callers never get the same
            except IndexError:
                return Context(self.loaded, self.threads)
            if context.process == os.getpid():
                return context


class InTorch:
    """A piece that PyTorch runs."""

    def __init__(self, piece: Piece) -> None:
        self.graph = piece.graph

    def __call__(self, values: dict[str, Any], batch: int, times: defaultdict[str, float] | None) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            found = run_values(self.graph, [torch.as_tensor(values[name]) for name in self.graph.inputs])
        if times is not None:  # of all that runs here, under the name of the first
            times[self.graph.nodes[0].name] += (time.perf_counter() - start) * 1e3
        values.update({name: found[name] for name in self.graph.outputs})


def array_of(x: Any) -> np.ndarray:
    """A tensor or array as a contiguous array, without a copy where it is one."""
    return np.ascontiguousarray(x.numpy(force=True) if isinstance(x, Tensor) else x)


def tensor_of(x: Any) -> Tensor:
    """A tensor or array as a tensor that shares its memory."""
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x
