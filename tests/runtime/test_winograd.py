"""Dense 3 x 3 windows by Winograd's algorithm against PyTorch in float64, around the edges of tiles and bands."""

import numpy as np
import pytest
import torch
from torch import nn

from espalier.compiler import emit_winograd
from espalier.runtime.executable import compile


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the plain sum would be faster."""
    monkeypatch.setattr(emit_winograd, "_TRANSFORM_CYCLES", 0.0)
    monkeypatch.setattr(emit_winograd, "_STREAMED_WEIGHT", 0.0)


class Residual(nn.Module):
    """An input that is read with its margins, a residual, and a reader of the result's margins."""

    def __init__(self, channels: int, rows: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, rows, 3, padding=1), nn.Conv2d(rows, rows, 3, padding=1)

    def forward(self, x):
        y = self.a(x).relu()
        return (self.b(y) + y).relu()


@pytest.mark.parametrize("size", [(5, 6), (12, 12), (13, 14), (15, 17), (16, 65), (33, 64), (70, 13)], ids=str)
def test_planes_around_whole_tiles(isa, size, check_network) -> None:
    executable = check_network(Residual(33, 48), (33, *size))
    assert [row.op for row in executable.describe()].count("winograd_out") >= 2


def test_bands_of_tile_rows(isa, check_network, monkeypatch) -> None:
    monkeypatch.setattr(emit_winograd, "_BAND_FLOATS", 36 * 64 * 15)
    executable = check_network(Residual(32, 32), (32, 21, 18))
    assert [row.op for row in executable.describe()].count("winograd_in") == 2 * 2


@pytest.mark.parametrize(("kept", "steps"), [(3, 0), (28, 1)])
def test_many_zeros_stay_with_the_row_blocks(check_network, kept, steps) -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    conv.weight[:, kept:] = 0
    executable = check_network(conv, (32, 16, 16))
    assert [row.op for row in executable.describe()].count("winograd_in") == steps


@pytest.mark.parametrize(("density", "steps"), [(0.1, 0), (0.3, 1)])
def test_single_weights_stay_with_the_row_blocks_while_few(density, steps, monkeypatch) -> None:
    """Measured at 256 channels of 14 x 14 pixels: 0.8 ms by Winograd's algorithm, at density 0.3 1.3 in rows."""
    monkeypatch.undo()
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    conv.weight *= torch.rand(conv.weight.shape) < density
    executable = compile(conv, torch.randn(1, 256, 14, 14), threads=1)
    assert [row.op for row in executable.describe()].count("winograd_in") == steps


def test_numbers_behind_the_image_do_not_matter() -> None:
    """What lies behind an edge that no tile ends at is never part of a sum, be it infinite."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)).requires_grad_(False)
    x = torch.randn(1, 32, 14, 14)
    executable, expected = compile(network, x, threads=1), network.double()(x.double())
    executable(torch.full_like(x, torch.inf))  # the arena is full of NaN now
    got = executable(x)
    assert np.isfinite(got.numpy()).all()
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_results_do_not_depend_on_the_number_of_threads(threads) -> None:
    torch.manual_seed(0)
    network, x = Residual(32, 64).eval(), torch.randn(1, 32, 30, 30)
    assert (compile(network, x, threads=threads)(x) == compile(network, x, threads=1)(x)).all()
