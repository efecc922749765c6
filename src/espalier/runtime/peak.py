"""The machine's arithmetic peak as its own kernels can reach it: what useful GFLOP/s are measured against."""

from __future__ import annotations

import time

import numpy as np

from espalier.compiler.program import Operand, Program, Step, TensorSpec
from espalier.runtime.engine import Context, LoadedProgram

_COLUMNS, _PIXELS, _HEIGHTS = 512, 48 * 4, (4, 8)


def peak_gflops(threads: int = 1, seconds: float = 0.2) -> float:
    """Multiply-adds of float32 on registers, in GFLOP/s: the best of short runs of a conv whose data fit the L1 cache.

    >>> peak_gflops(threads=1) > 1
    True
    """
    best = 0.0
    for height in _HEIGHTS:
        blocks = 128 * threads
        context = Context(LoadedProgram(_program(height, blocks).to_bytes()), threads)
        inputs = [np.ones((1, _PIXELS), np.float32)]
        operations = 2.0 * height * blocks * _COLUMNS * _PIXELS
        end = time.perf_counter() + seconds / len(_HEIGHTS)
        while time.perf_counter() < end:
            start = time.perf_counter()
            context.run(inputs, 1)
            best = max(best, operations / (time.perf_counter() - start) * 1e-9)
    return best


def _program(height: int, blocks: int) -> Program:
    """`blocks` row-blocks, of which every one reads the same few pixels."""
    x = Operand("arena", 0, 0, (1, 1, 1, _PIXELS), (0, 0, 0, 1))
    rows = blocks * height
    y = Operand("arena", 0, _PIXELS, (1, rows, 1, _PIXELS), (0, _PIXELS, _PIXELS, 1))
    arrays = {
        "rows": np.arange(rows, dtype=np.int32),
        "starts": np.arange(blocks + 1, dtype=np.int32) * _COLUMNS,
        "index": np.zeros(blocks * _COLUMNS, np.int32),
        "values": np.full((blocks * _COLUMNS, height), 1e-3, np.float32),
    }
    steps = (
        Step("in", "copy", x, Operand("input", 0, 0, x.sizes, x.strides)),
        Step("conv", "conv", y, x, params=(height, 1, _PIXELS, 0, 0, 0, _PIXELS), arrays=arrays),
    )
    return Program((TensorSpec("x", (_PIXELS,)),), (), steps, 4 * (1 + rows) * _PIXELS)
