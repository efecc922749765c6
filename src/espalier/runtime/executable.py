"""Executable: a compiled network that is called like the one it came from."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.compiler.blocks import choosing
from espalier.compiler.lower import Piece, batch_of, split
from espalier.compiler.program import Step
from espalier.errors import ShapeError
from espalier.graph.capture import ExampleInputs, capture
from espalier.graph.interpret import assemble
from espalier.graph.ir import Graph, Value
from espalier.graph.module import to_module
from espalier.runtime.bound import Bound
from espalier.runtime.engine import LoadedProgram
from espalier.runtime.runners import InTorch, Native, array_of, tensor_of
from espalier.runtime.tune import tuned

MOST_SAMPLES = 2**31 - 1  # in one call, as in esp_run
_ARRAYS = {torch.float32: np.dtype(np.float32), torch.int64: np.dtype(np.int64), torch.bool: np.dtype(np.bool_)}


@dataclass(frozen=True)
class StepRow:
    """One line of the table that says how a network runs.

    kernel: the native kernel, or "torch". format, reason: how the weights are stored, and why.
    """

    step: str
    op: str
    kernel: str
    format: str
    reason: str
    nonzeros: int
    weights: int


@dataclass(frozen=True)
class _Taken:
    """An input as calls must give it. array: the same dtype in numpy. sizes: of a sample, or of the whole tensor."""

    dtype: torch.dtype
    array: object
    sizes: tuple[int, ...]
    batched: bool

    @classmethod
    def of(cls, value: Value) -> _Taken:
        sizes = value.shape[1:] if value.batched else value.shape
        return cls(value.dtype, _ARRAYS.get(value.dtype, object()), tuple(sizes), value.batched)

    def fits(self, x: Any, batch: int | None) -> bool:
        """Whether it is as it must be; a microsecond counts here. False may be wrong: then look closely."""
        kind, shape = type(x), tuple(x.shape)
        if kind is Tensor:
            right = x.dtype is self.dtype
        else:
            right = kind is np.ndarray and x.dtype == self.array
        if not self.batched:
            return right and shape == self.sizes
        return right and shape[1:] == self.sizes and len(shape) > 0 and batch in (None, shape[0])


class Executable:
    """A network compiled for this machine. May be called from several threads at once.

    graph: what it computes. threads: how many the engine uses for one call.
    fallbacks: what PyTorch runs, as "node (op): why".
    """

    def __init__(
        self,
        graph: Graph,
        threads: int | None = None,
        tune: bool = False,
        pieces: tuple[Piece, ...] | None = None,
    ) -> None:
        """pieces: of the graph, where they are known already. tune: see `compile`.

        Raises EngineError when the native library is missing or refuses."""
        self.graph = graph
        self.threads = threads or os.cpu_count() or 1
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if pieces is None:
            # views are told from copies, also inside the caller's inference mode
            chosen = choosing(tuned(graph, self.threads)) if tune else nullcontext()
            with torch.inference_mode(False), torch.no_grad(), chosen:
                pieces = split(graph, self.threads)
        self._batch = batch_of(graph)
        self._takes = [_Taken.of(graph.values[name]) for name in graph.inputs]
        self._runners = [Native(p, self.threads) if p.program else InTorch(p) for p in pieces]
        self._pieces = tuple(replace(p, code=b"") for p in pieces)  # the engine has its own copy

    @property
    def fallbacks(self) -> tuple[str, ...]:
        nodes = {node.name: node for node in self.graph.nodes}
        return tuple(f"{name} ({nodes[name].op}): {why}" for p in self._pieces for name, why in p.reasons)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The network's outputs on tensors (float32, CPU) or numpy arrays, in the same kind, any batch size.

        Raises ShapeError for inputs of another number, shape or dtype.
        """
        return self._run(inputs, named, None)

    def bind(self, *inputs: Any, **named: Any) -> Bound:
        """A call on these very tensors or arrays, for loops in which microseconds count.

        Each call reads what stands in them by then, and writes into outputs that keep their place, too: the next call
        overwrites them, and nothing is allocated or checked. One thread may use it at a time; other calls of the
        network go on beside it. Raises ShapeError as a call does, and for an input that is not contiguous.

        >>> call = program.bind(frame)
        >>> while camera.read(into=frame):
        ...     label = int(call().argmax())
        """
        given = self._checked(inputs, named)
        return Bound(self, given, self._samples(given))

    def profile(self, *inputs: Any, **named: Any) -> dict[str, float]:
        """Milliseconds of every step by name in one run on `inputs`; what PyTorch runs stands under its first node."""
        times: defaultdict[str, float] = defaultdict(float)
        self._run(inputs, named, times)
        return dict(times)

    def describe(self) -> list[StepRow]:
        """How every step runs, in order; the tasks of a layer are one row, with the format of the first."""
        rows: list[StepRow] = []
        for piece, runner in zip(self._pieces, self._runners):
            if isinstance(runner, Native):
                for step, kernel in zip(runner.program.steps, runner.loaded.kernels):
                    known = next((k for k in reversed(range(len(rows))) if rows[k].step == step.layer), None)
                    row = StepRow(step.layer, step.op, kernel, step.format, step.reason, step.nonzeros, step.weights)
                    if not step.task or known is None:
                        rows.append(row)
                        continue
                    whole = rows[known]
                    sums = whole.nonzeros + row.nonzeros, whole.weights + row.weights
                    rows[known] = replace(whole, nonzeros=sums[0], weights=sums[1])
            else:
                why = dict(piece.reasons)
                for node in piece.graph.nodes:
                    rows.append(StepRow(node.name, node.op, "torch", "", why.get(node.name, "beside others"), 0, 0))
        return rows

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The parts that run one after the other."""
        return self._pieces

    @property
    def max_batch(self) -> int:
        """The most samples that one call takes; a network that was written for one batch size takes that one only."""
        free = any(self.graph.values[name].batched for name in self.graph.inputs)
        return MOST_SAMPLES if free else self._batch

    def loaded(self) -> list[tuple[Piece, LoadedProgram]]:
        """The native pieces, with their programs in the engine."""
        return [(p, r.loaded) for p, r in zip(self._pieces, self._runners) if isinstance(r, Native)]

    def steps(self) -> list[Step]:
        """The native steps, in order."""
        return [step for piece in self._pieces if piece.program for step in piece.program.steps]

    def to_module(self) -> nn.Module:
        """An ordinary PyTorch module that computes the same."""
        return to_module(self.graph)

    @property
    def only_native(self) -> Native | None:
        """What runs all of it, if the engine does so in one piece."""
        only = self._runners[0] if len(self._runners) == 1 else None
        return only if isinstance(only, Native) else None

    def results(self, values: Mapping[str, Any], given: Sequence[Any]) -> Any:
        """The outputs among `values`, in the kind of the inputs `given`, put together as the network does."""
        leaves = [values[n] if n in values else self.graph.tensors[n].detach() for n in self.graph.outputs]
        numpy = bool(given) and all(isinstance(x, np.ndarray) for x in given)
        return assemble(self.graph.output_tree, [array_of(x) if numpy else tensor_of(x) for x in leaves])

    def _run(self, inputs: Sequence[Any], named: Mapping[str, Any], times: defaultdict[str, float] | None) -> Any:
        given = self._checked(inputs, named)
        batch = self._samples(given)
        values: dict[str, Any] = dict(zip(self.graph.inputs, given))
        if batch == 0:
            values |= {n: torch.empty((0, *self.graph.values[n].shape[1:])) for n in self.graph.outputs}
        else:
            for runner in self._runners:
                runner(values, batch, times)
        return self.results(values, given)

    @staticmethod
    def _samples(given: Sequence[Any]) -> int:
        return given[0].shape[0] if given and given[0].ndim else 0

    def _checked(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """The inputs in their order. Raises ShapeError."""
        if not named and len(inputs) == len(self._takes):
            batch = None
            for x, taken in zip(inputs, self._takes):
                if not (hasattr(x, "shape") and taken.fits(x, batch)):
                    break
                batch = x.shape[0] if taken.batched else batch
            else:
                return list(inputs)
        return self._looked_at(inputs, named)

    def _looked_at(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """The same, slowly, to say what is wrong."""
        names = self.graph.inputs
        unknown = [n for n in named if n not in names[len(inputs) :]]
        if unknown or len(inputs) + len(named) != len(names):
            raise ShapeError(
                f"the network takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)} and {list(named)}"
            )
        given = [*inputs, *[named[name] for name in names[len(inputs) :]]]
        batch: int | None = None
        for name, x in zip(names, given):
            value = self.graph.values[name]
            if not isinstance(x, (Tensor, np.ndarray)):
                raise ShapeError(f"input {name}: expected a tensor or an array, got {type(x).__name__}")
            expected, got = str(value.dtype).removeprefix("torch."), str(x.dtype).removeprefix("torch.")
            if got != expected:
                raise ShapeError(f"input {name}: expected {expected}, got {got}; convert it first")
            shape = ("any", *value.shape[1:]) if value.batched else value.shape
            fits = len(x.shape) == len(shape) and all(a in ("any", b) for a, b in zip(shape, x.shape))
            if not fits:
                raise ShapeError(f"input {name}: expected shape {_shown(shape)}, got {_shown(x.shape)}")
            if value.batched and batch is not None and x.shape[0] != batch:
                raise ShapeError(f"input {name}: expected a batch of {batch} like the other inputs, got {x.shape[0]}")
            batch = x.shape[0] if value.batched else batch
        return given


def compile(
    model: nn.Module | Graph,
    example_inputs: ExampleInputs | None = None,
    *,
    threads: int | None = None,
    tune: bool = False,
) -> Executable:
    """Make a network ready to run on this machine's engine.

    model: a module, captured in eval mode on `example_inputs`; or a graph, which needs none.
    example_inputs: any batch size can be run afterwards; of three samples or more, and as many as threads, what is made
        is best for such batches, where each thread takes whole samples.
    threads: for one call; default: all cores.
    tune: measure here which format runs each layer fastest, instead of estimating. Takes seconds to a minute the first
        time; measurements are kept in $ESPALIER_CACHE or the platform's place for caches.

    What the engine lacks runs in PyTorch, and stands in `.fallbacks`. Raises CaptureError for a module that cannot be
    followed, EngineError when the native library is missing.

    >>> compile(model, torch.randn(1, 3, 32, 32))(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 10])
    """
    if isinstance(model, Graph):
        return Executable(model, threads, tune)
    if example_inputs is None:
        raise ShapeError("compile needs example inputs for a module: compile(model, torch.randn(1, 3, 224, 224))")
    return Executable(capture(model, example_inputs), threads, tune)


def _shown(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
