"""Programs as bytes: what stands where, and that the engine reads it back."""

import struct

import numpy as np
import pytest

from espalier.compiler.program import FORMAT_VERSION, Operand, Program, Step, TensorSpec, dense_strides
from espalier.runtime.engine import Context, LoadedProgram


def scaling(*scales: float) -> Program:
    """y = x * scales, in as many steps."""
    x = Operand("input", 0, 0, (1, 1, 1, 3), (0, 0, 0, 1))
    y = Operand("output", 0, 0, (1, 1, 1, 3), (0, 0, 0, 1))
    steps = [
        Step(
            f"s{k}",
            "unary",
            y,
            x if k == 0 else y,
            arrays={"values": np.array([s], np.float32)},
            format="f",
            reason="r",
        )
        for k, s in enumerate(scales)
    ]
    return Program((TensorSpec("x", (3,)),), (TensorSpec("y", (3,)),), tuple(steps), 256)


def test_the_header() -> None:
    data = scaling(2.0).to_bytes()
    assert data[:8] == b"ESPALIER" and len(data) % 64 == 0
    version, _, size, arena, inputs, outputs, steps = struct.unpack_from("<IIqqqqq", data, 8)
    assert (version, size, arena, inputs, outputs, steps) == (FORMAT_VERSION, len(data), 64, 1, 1, 1)


def test_equal_programs_have_equal_bytes() -> None:
    assert scaling(2.0, 3.0).to_bytes() == scaling(2.0, 3.0).to_bytes()


def test_shared_arrays_are_stored_once() -> None:
    x, y = scaling(1.0).steps[0].a, scaling(1.0).steps[0].out
    big = np.ones(4096, np.float32)
    wide = [Step(f"s{k}", "linear", y, x, params=(1, 1, 0, 0, 0, 1), arrays={"values": big}) for k in range(4)]
    assert len(Program((), (), tuple(wide), 0).to_bytes()) < 2 * big.nbytes


def test_the_engine_reads_it_back() -> None:
    loaded = LoadedProgram(scaling(2.0, 5.0).to_bytes())
    assert loaded.inputs == [("x", (3,))] and loaded.outputs == [("y", (3,))]
    assert loaded.steps == ["s0", "s1"] and loaded.notes == ["f: r", "f: r"]
    got = Context(loaded, 1).run([np.array([[1, 2, 3], [4, 5, 6]], np.float32)], 2)[0]
    assert got.tolist() == [[10, 20, 30], [40, 50, 60]]


def test_the_engine_gives_back_what_it_loaded() -> None:
    data = scaling(2.0, 5.0).to_bytes()
    assert LoadedProgram(data).to_bytes() == data


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (1, 1, 7, 2)])
def test_dense_strides(shape) -> None:
    array = np.empty(shape, np.float32)
    assert dense_strides(shape) == tuple(s // 4 for s in array.strides) or array.size in (0, 1)
