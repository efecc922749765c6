"""Every kernel with weights against float64, on every instruction set, around the edges of its tiles."""

from dataclasses import replace

import numpy as np
import pytest

from espalier.compiler.blocks import dense
from espalier.compiler.formats import RowBlocks, pack
from espalier.compiler.program import Operand, Program, Step, TensorSpec
from espalier.errors import EngineError
from espalier.runtime.engine import Context, LoadedProgram

HEIGHTS = [1, 2, 4, 8, 16]
WIDTH = {"avx512": 16, "avx2": 8, "baseline": 4}
ROWS, COLUMNS = 19, 23


def widest_tile(isa: str, height: int) -> int:
    """Pixels of the widest tile of native/kernels/conv.c."""
    vectors = {1: 8, 2: 8, 4: 6, 8: 3, 16: 3} if isa == "avx512" else {1: 8, 2: 5, 4: 3, 8: 3, 16: 3}
    return WIDTH[isa] * vectors[height]


def matrix(kind: str, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    rng = np.random.default_rng(0)
    full = rng.standard_normal((rows, columns)).astype(np.float32)
    if kind == "empty":
        return np.zeros_like(full)
    if kind == "survivor":
        one = np.zeros_like(full)
        one[rows // 2, columns - 1] = 3
        return one
    return full * (rng.random(full.shape) < 0.3) if kind == "sparse" else full


def arrays(blocks: RowBlocks, index: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "rows": blocks.row_order,
        "starts": blocks.offsets,
        "index": index.astype(np.int32),
        "values": blocks.values,
        "bias": bias,
    }


def row_blocks(weight: np.ndarray, height: int) -> RowBlocks:
    return pack(weight, height) if height in HEIGHTS else dense(weight, height)


def conv_program(weight: np.ndarray, pixels: int, height: int, bias: np.ndarray, segments: int = 1) -> Program:
    """relu(weight @ x + bias + x') for x [columns, segments * pixels]; x' are the first rows of x."""
    rows, columns = weight.shape
    blocks, size = row_blocks(weight, height), segments * pixels
    x = Operand("arena", 0, 0, (1, 1, 1, columns * size), (0, 0, 0, 1))
    y = Operand("arena", 0, columns * size, (1, rows, segments, pixels), (0, size, pixels, 1))
    step = Step(
        "conv",
        "conv",
        y,
        replace(x, sizes=(1, columns, segments, pixels), strides=(0, size, pixels, 1)),
        replace(x, sizes=(1, rows, segments, pixels), strides=(0, size, pixels, 1)),
        activation=("clamp", 0.0, float("inf")),
        params=(height, segments, pixels, pixels, pixels, pixels, 192),
        arrays=arrays(blocks, blocks.columns * size, bias),
    )
    steps = (
        Step("in", "copy", x, Operand("input", 0, 0, x.sizes, x.strides)),
        step,
        Step("out", "copy", Operand("output", 0, 0, y.sizes, y.strides), y),
    )
    ends = (TensorSpec("x", (columns, size)),), (TensorSpec("y", (rows, size)),)
    return Program(*ends, steps, 4 * (columns + rows) * size)


def linear_program(weight: np.ndarray, height: int, bias: np.ndarray) -> Program:
    rows, columns = weight.shape
    blocks = pack(weight, height)
    x = Operand("input", 0, 0, (1, 1, 1, columns), (0, 0, 0, 1))
    y = Operand("output", 0, 0, (1, 1, 1, rows), (0, 0, 0, 1))
    step = Step("fc", "linear", y, x, params=(height, 1, 0, 0, 0, 1), arrays=arrays(blocks, blocks.columns, bias))
    return Program((TensorSpec("x", (columns,)),), (TensorSpec("y", (rows,)),), (step,), 0)


def run(program: Program, *inputs: np.ndarray, threads: int = 1) -> np.ndarray:
    return Context(LoadedProgram(program.to_bytes()), threads).run([x[None] for x in inputs], 1)[0][0]


def conv_case(
    isa: str, height: int, pixels: int, kind: str, segments: int = 1, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    weight, bias = matrix(kind, rows, columns), rng.standard_normal(rows).astype(np.float32)
    x = rng.standard_normal((columns, segments * pixels)).astype(np.float32)
    loaded = LoadedProgram(conv_program(weight, pixels, height, bias, segments).to_bytes())
    assert loaded.kernels[1] == f"conv/{height}/{isa}"
    got = Context(loaded, 2).run([x[None]], 1)[0][0]
    expected = np.maximum(weight.astype(np.float64) @ x + bias[:, None] + x[:rows], 0)
    return got, expected


@pytest.mark.parametrize("kind", ["empty", "survivor", "sparse", "dense"])
@pytest.mark.parametrize("height", HEIGHTS)
def test_conv_kernels(isa, height, kind, assert_close) -> None:
    tile = widest_tile(isa, height)
    for pixels in (1, WIDTH[isa] - 1, WIDTH[isa] + 1, tile - 1, tile, tile + 1, 2 * tile + 3, 700):
        assert_close(*conv_case(isa, height, pixels, kind))


@pytest.mark.parametrize("height", HEIGHTS)
def test_conv_kernels_row_by_row(isa, height, assert_close) -> None:
    assert_close(*conv_case(isa, height, 37, "sparse", segments=11))


@pytest.mark.parametrize("kind", ["empty", "survivor", "dense"])
def test_conv_kernels_with_vectors_along_rows(isa, kind, assert_close) -> None:
    """Tiles of up to 3 segments, 7 pixels and 256 columns; bands of 256 pixels; 2 vectors of rows at once."""
    for pixels, segments in (
        (1, 1),
        (1, 5),
        (4, 4),
        (5, 3),
        (6, 7),
        (7, 7),
        (8, 2),
        (15, 1),
        (17, 2),
        (60, 5),
        (256, 2),
    ):
        assert_close(*conv_case(isa, 32, pixels, kind, segments))
    for rows, columns in ((31, 255), (32, 256), (33, 257)):
        assert_close(*conv_case(isa, 32, 9, kind, 2, rows, columns))


def test_segments_too_long_for_vectors_along_rows_are_refused() -> None:
    with pytest.raises(EngineError, match="a segment too long"):
        LoadedProgram(conv_program(matrix("dense"), 257, 32, np.zeros(ROWS, np.float32)).to_bytes())


@pytest.mark.parametrize("kind", ["empty", "survivor", "sparse", "dense"])
@pytest.mark.parametrize("height", HEIGHTS)
def test_linear_kernels(isa, height, kind, assert_close) -> None:
    rng = np.random.default_rng(2)
    for rows in (1, height, height + 1, 3 * height - 1, 50):
        for columns in (1, 3, 4, 5, 129):
            weight, bias = matrix(kind, rows, columns), rng.standard_normal(rows).astype(np.float32)
            x = rng.standard_normal(columns).astype(np.float32)
            got = run(linear_program(weight, height, bias), x)
            assert_close(got, weight.astype(np.float64) @ x + bias)


def test_a_broken_kernel_fails(assert_close) -> None:
    """A format with one weight at the wrong column is found."""
    got, expected = conv_case_with_a_wrong_column()
    with pytest.raises(AssertionError):
        assert_close(got, expected)


def conv_case_with_a_wrong_column() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    weight, bias, x = matrix("dense"), np.zeros(ROWS, np.float32), rng.standard_normal((COLUMNS, 9)).astype(np.float32)
    program = conv_program(weight, 9, 4, bias)
    index = program.steps[1].arrays["index"].copy()
    index[3] = index[4]
    broken = replace(program.steps[1], arrays={**program.steps[1].arrays, "index": index})
    got = run(replace(program, steps=(program.steps[0], broken, program.steps[2])), x)
    return got, np.maximum(weight.astype(np.float64) @ x + x[:ROWS], 0)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_results_do_not_depend_on_the_number_of_threads(threads) -> None:
    program = conv_program(matrix("sparse", 40, 96), 1111, 8, np.ones(40, np.float32))
    x = np.random.default_rng(3).standard_normal((96, 1111)).astype(np.float32)
    alone = run(program, x)
    assert (run(program, x, threads=threads) == alone).all()


def test_unknown_instruction_sets_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("ESPALIER_ISA", "mmx")
    with pytest.raises(EngineError, match=r"ESPALIER_ISA=mmx: unknown instruction set; this machine has .*baseline"):
        run(linear_program(matrix("dense"), 4, np.zeros(ROWS, np.float32)), np.zeros(COLUMNS, np.float32))
