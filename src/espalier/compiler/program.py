"""Program: what the compiler makes and the engine runs, as plain data and as bytes.

A program computes one sample. Its steps read and write operands: four-dimensional strided views into one planned arena,
the inputs, the outputs, or the constants of the program itself. The bytes are little-endian and versioned; the
layout is written down in native/src/load.c, which checks every number of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

FORMAT_VERSION = 1
MAGIC = b"ESPALIER"

# The numbers of native/src/program.h.
STEP_OPS = {
    name: number
    for number, name in enumerate(
        (
            "conv",
            "linear",
            "copy",
            "gather",
            "pool",
            "adaptive",
            "binary",
            "unary",
            "softmax",
            "fill",
            "depthwise",
            "winograd_in",
            "winograd_out",
            "norm",
            "matmul",
            "resize",
            "stem",
        ),
        start=1,
    )
}
SPACES = {name: number for number, name in enumerate(("nowhere", "arena", "input", "output", "constant", "scratch"))}
ACTIVATIONS = {
    name: number
    for number, name in enumerate(
        (
            "none",
            "clamp",
            "leaky_relu",
            "elu",
            "sigmoid",
            "tanh",
            "silu",
            "hardswish",
            "hardsigmoid",
            "gelu",
            "gelu_tanh",
        )
    )
}
_HEADER_SIZE, _TENSOR_WORDS, _STEP_WORDS, _PARAMS = 128, 11, 72, 16
_ARRAYS = (("rows", np.int32), ("starts", np.int32), ("index", np.int32), ("values", np.float32), ("bias", np.float32))

Space = Literal["nowhere", "arena", "input", "output", "constant", "scratch"]
Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its name and its shape for one sample."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """A view of up to four dimensions; offset, sizes and strides in floats.

    index: which input or output. storage: the buffer of the arena that `offset` counts from, until memory is
    planned; "" once `offset` counts from the start of the arena.
    """

    space: Space = "nowhere"
    index: int = 0
    offset: int = 0
    sizes: Four = (1, 1, 1, 1)
    strides: Four = (0, 0, 0, 0)
    storage: str = ""
    constant: np.ndarray | None = None

    def words(self) -> list[int]:
        """The integers that a program's bytes hold for it (native/src/program.h)."""
        return [SPACES[self.space], self.index, self.offset, *self.sizes, *self.strides]


@dataclass(frozen=True)
class Step:
    """One kernel call.

    activation: name and up to two parameters. front: floats of margin before the first plane; None when the output
    has no margins that must be zero. arrays: the row-blocks and bias (see `_ARRAYS`). params: as enumerated in
    native/src/program.h. format, reason: what was chosen for the weights, and why. nonzeros, weights: of the layer.
    nodes: the names of the graph's nodes that this step computes. task: 0, or: one thread does all steps of a number,
    and those of numbers that follow each other may be done at once. bands: 0, or: the task is so many tasks, each a
    band of the pixels of all its steps.
    """

    name: str
    op: str
    out: Operand
    a: Operand = Operand()
    b: Operand = Operand()
    activation: tuple[str, float, float] = ("none", 0.0, 0.0)
    front: int | None = None
    params: tuple[int, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    format: str = ""
    reason: str = ""
    nonzeros: int = 0
    weights: int = 0
    nodes: tuple[str, ...] = ()
    task: int = 0
    bands: int = 0

    @property
    def layer(self) -> str:
        """Its name without the number of its task: the tasks of a layer are told of as one."""
        return self.name.rpartition("/")[0] if self.task and not self.bands else self.name

    @property
    def note(self) -> str:
        """The format of its weights and why: what `espalier bench` shows."""
        return f"{self.format}: {self.reason}" if self.reason else self.format


@dataclass(frozen=True)
class Program:
    """Steps over an arena of `arena_size` bytes, and a scratch of `scratch_size` for each thread.

    >>> Program((), (), (), 0).to_bytes()[:8]
    b'ESPALIER'
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    arena_size: int
    scratch_size: int = 0

    def to_bytes(self) -> bytes:
        """The program as the engine loads it."""
        return _Writer(self).written()

    def without_arrays(self) -> Program:
        """What remains to be told of it once its bytes are written: weights are large."""
        steps = [replace(s, arrays={}, out=_bare(s.out), a=_bare(s.a), b=_bare(s.b)) for s in self.steps]
        return replace(self, steps=tuple(steps))


def _bare(operand: Operand) -> Operand:
    return replace(operand, constant=None)


class _Writer:
    """Lays tables, names and arrays behind one another; equal arrays are stored once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        tensors = len(program.inputs) + len(program.outputs)
        self.tensors_at = _HEADER_SIZE
        self.steps_at = self.tensors_at + 8 * _TENSOR_WORDS * tensors
        self.end = self.steps_at + 8 * _STEP_WORDS * len(program.steps)
        self.pieces: list[tuple[int, bytes | memoryview]] = []  # by offset
        self.known: dict[Any, int] = {}

    def written(self) -> bytes:
        program = self.program
        words: list[int] = []
        for spec in (*program.inputs, *program.outputs):
            words += self._tensor(spec)
        for step in program.steps:
            words += self._step(step)
        size = _aligned(self.end)
        counts = [len(program.inputs), len(program.outputs), len(program.steps)]
        head = [
            size,
            -(-program.arena_size // 4),
            *counts,
            self.tensors_at,
            self.steps_at,
            -(-program.scratch_size // 4),
        ]
        tables = [
            (0, struct.pack(f"<8sII{len(head)}q", MAGIC, FORMAT_VERSION, 0, *head)),
            (self.tensors_at, struct.pack(f"<{len(words)}q", *words)),
        ]
        return _joined([*tables, *self.pieces], size)

    def _put(self, key: Any, piece: bytes | memoryview) -> int:
        if key not in self.known:
            self.known[key] = self.end = _aligned(self.end)
            self.pieces.append((self.end, piece))
            self.end += len(piece)
        return self.known[key]

    def _text(self, text: str) -> list[int]:
        data = text.encode()[:4096]
        return [self._put(("text", data), data), len(data)] if data else [0, 0]

    def _array(self, array: np.ndarray | None, dtype: Any) -> list[int]:
        if array is None or not array.size:
            return [0, 0]
        plain = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<"))
        return [self._put((id(array), dtype), plain.reshape(-1).view(np.uint8).data), plain.size]

    def _tensor(self, spec: TensorSpec) -> list[int]:
        return [*self._text(spec.name), len(spec.shape), *spec.shape, *[0] * (8 - len(spec.shape))]

    def _operand(self, operand: Operand) -> list[int]:
        words = operand.words()
        if operand.constant is not None:  # offsets count in floats from the start of the file
            words[2] += self._array(operand.constant, np.float32)[0] // 4
        return words

    def _step(self, step: Step) -> list[int]:
        name, first, second = step.activation
        words = [STEP_OPS[step.op], ACTIVATIONS[name], _float_bits(first), _float_bits(second)]
        words += [int(step.front is not None), step.front or 0]
        for operand in (step.out, step.a, step.b):
            words += self._operand(operand)
        for array, dtype in _ARRAYS:
            words += self._array(step.arrays.get(array), dtype)
        words += [*self._text(step.name), *self._text(step.note)]
        words += [*step.params, *[0] * (_PARAMS - len(step.params)), step.task, step.bands]
        return words + [0] * (_STEP_WORDS - len(words))


def _joined(pieces: Sequence[tuple[int, bytes | memoryview]], size: int) -> bytes:
    """Pieces at their offsets, which ascend, and zeros between them; large ones are copied once."""
    ends = [(offset + len(piece), piece) for offset, piece in pieces]
    starts = [*[offset for offset, _ in pieces[1:]], size]
    return b"".join(part for (end, piece), start in zip(ends, starts) for part in (piece, bytes(start - end)))


def _aligned(size: int, to: int = 64) -> int:
    return -(-size // to) * to


def _float_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape.

    >>> dense_strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
