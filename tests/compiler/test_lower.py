"""From graphs to programs: what is fused, which format is chosen and why, what is handed to PyTorch."""

import numpy as np
import pytest
import torch
from torch import nn

from espalier.compiler.blocks import choose, choose_groups
from espalier.compiler.formats import unpack
from espalier.compiler.fuse import fuse
from espalier.compiler.lower import lower, split
from espalier.compiler.support import LOWERINGS
from espalier.errors import CompileError
from espalier.graph.capture import capture


def graph_of(*layers: nn.Module, shape: tuple[int, ...] = (8, 12, 12)):
    return capture(nn.Sequential(*layers).eval(), torch.randn(2, *shape))


def ops(program) -> list[str]:
    return [step.op for step in program.steps]


def test_norms_activations_and_residuals_are_no_steps() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.n(self.a(x)).relu()
            return (self.n(self.b(x)) + x).relu()

    graph = capture(Block().eval(), torch.randn(2, 8, 12, 12))
    program = lower(graph)
    assert ops(program) == ["copy", "conv", "conv", "copy"]
    assert program.steps[2].b.space == "arena" and program.steps[2].activation[0] == "clamp"
    assert program.to_bytes() == lower(fuse(graph)).to_bytes()


def test_equal_row_strides_make_one_run() -> None:
    program = lower(graph_of(nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5, 1, 2)))
    convs = [step for step in program.steps if step.op == "conv"]
    assert [step.params[1] for step in convs] == [1, 1, 1]  # segments


def test_concatenations_are_written_in_place() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 5, 3, 1, 1), nn.Conv2d(8, 4, 3, 1, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    assert ops(lower(capture(Cat(), torch.randn(2, 8, 6, 6)))) == ["copy", "conv", "conv", "conv", "copy"]


def test_a_flattened_image_is_not_copied() -> None:
    program = lower(graph_of(nn.Conv2d(8, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Flatten(), nn.Linear(576, 3)))
    assert ops(program) == ["copy", "conv", "conv", "linear", "copy"]


def test_the_arena_is_reused() -> None:
    deep = lower(graph_of(*[nn.Conv2d(8, 8, 3, 1, 1) for _ in range(12)]))
    assert deep.arena_size <= lower(graph_of(*[nn.Conv2d(8, 8, 3, 1, 1) for _ in range(3)])).arena_size * 1.1


def test_every_step_says_its_format_and_why() -> None:
    dense = lower(graph_of(nn.Conv2d(8, 16, 3))).steps[1]
    assert (dense.format, dense.nonzeros, dense.weights) == ("dense/8", 1152, 1152)
    assert dense.reason == "density 1.00: skipping would not pay"


def punched(rows: int, columns: int, height: int, density: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    mask = rng.random((rows // height, columns)) < density
    return (rng.standard_normal((rows, columns)) * np.repeat(mask, height, 0)).astype(np.float32)


@pytest.mark.parametrize("op", ["conv", "linear"])
@pytest.mark.parametrize(
    ("height", "density", "expected"),
    [(8, 0.1, "blocks/8"), (1, 1.0, "dense/"), (1, 0.9, "dense/"), (4, 0.1, "blocks/4"), (1, 0.02, "blocks/1")],
)
def test_the_format_follows_the_weight(op, height, density, expected) -> None:
    matrix = punched(64, 300, height, density)
    choice = choose(matrix, op)
    assert choice.format.startswith(expected)
    assert (unpack(choice.blocks) == matrix).all()


def test_rows_that_share_columns_are_found_in_any_order() -> None:
    matrix = punched(64, 300, 8, 0.1)[np.random.default_rng(1).permutation(64)]
    assert choose(matrix, "conv").format == "blocks/8"


@pytest.mark.parametrize(("groups", "rows"), [(1, 5), (3, 4), (7, 1), (2, 16)])
def test_groups_are_a_block_diagonal_matrix(groups, rows) -> None:
    rng = np.random.default_rng(0)
    matrices = [
        (rng.standard_normal((rows, 6)) * (rng.random((rows, 6)) < 0.5)).astype(np.float32) for _ in range(groups)
    ]
    whole = np.zeros((groups * rows, groups * 6), np.float32)
    for k, m in enumerate(matrices):
        whole[k * rows : (k + 1) * rows, k * 6 : (k + 1) * 6] = m
    assert (unpack(choose_groups(matrices, "conv").blocks) == whole).all()


class Lacking(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1) + x.relu()


def test_what_cannot_be_lowered_is_named() -> None:
    graph = capture(Lacking(), torch.randn(2, 8, 4, 4))
    with pytest.raises(CompileError, match=r"cumsum \(opaque\) at .*cumsum.*: no kernel for aten.cumsum.default"):
        lower(graph)


def test_split_hands_it_to_pytorch() -> None:
    pieces = split(capture(Lacking(), torch.randn(2, 8, 4, 4)))
    assert [piece.program is not None for piece in pieces] == [False, True]
    assert pieces[0].reasons == (("cumsum", "no kernel for aten.cumsum.default"),)


def test_a_row_for_every_op_has_a_check() -> None:
    assert all(callable(row.emit) and callable(row.check) for row in LOWERINGS.values())


class RolledWeight(nn.Module):
    """A weight that comes from an op without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.roll(1, 0)).relu()


def test_what_depends_on_no_input_is_no_piece() -> None:
    (piece,) = split(capture(RolledWeight().eval(), torch.randn(2, 6)))
    assert piece.program is not None and not piece.reasons


def _storages(density: float, size: int, height: int = 8) -> list[tuple[int, ...]]:
    """Strides of what the convs write whose weights lose blocks of `height` rows."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)]
    with torch.no_grad():
        for conv in layers:
            conv.weight *= (torch.rand(16 // height, *conv.weight.shape[1:]) < density).repeat_interleave(height, 0)
    program = lower(graph_of(*layers, shape=(16, size, size)))
    return [step.out.strides for step in program.steps if step.op == "conv"]


@pytest.mark.parametrize("size", [14, 16, 28, 32])
def test_small_images_of_sparse_layers_lie_row_by_row(size) -> None:
    """One row of all channels, then the next; they begin with a cache line if that costs little."""
    pitches = {14: (16, 16), 28: (32, 32)}.get(size, (size + 1, size))
    assert _storages(0.1, size)[:2] == [(0, pitch, 16 * pitch, 1) for pitch in pitches]


@pytest.mark.parametrize(("density", "size", "height"), [(1.0, 14, 8), (0.1, 14, 1), (0.1, 21, 8), (0.1, 56, 8)])
def test_other_images_lie_in_planes(density, size, height) -> None:
    """Those of dense layers, of layers that lost single weights, and those whose rows leave lanes empty."""
    assert all(plane > row for _, plane, row, _ in _storages(density, size, height)[:2])


def test_convs_know_that_depthwise_ones_read_them() -> None:
    """Threads share out the channels of both."""
    program = lower(graph_of(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 8, 1)))
    assert [step.params[7] for step in program.steps if step.op == "conv"] == [1, 0]
