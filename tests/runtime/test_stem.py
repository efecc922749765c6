"""Wide windows at stride 2 over few channels against PyTorch in float64, around the edges of vectors, bands, images."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espalier.compiler import emit_stem, window
from espalier.runtime.executable import compile


def ops(executable) -> list[str]:
    return [row.op for row in executable.describe()]


def reads_as_it_lies(executable) -> bool:
    """Whether it is one step, and perhaps a copy of the result to where callers want it."""
    return ops(executable)[0] == "stem" and set(ops(executable)[1:]) <= {"copy"}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over images where vectors are nearly empty."""
    monkeypatch.setattr(window, "STEM_PIXELS", 1)


@pytest.mark.parametrize("width", [7, 16, 112, 127, 128, 129, 130, 224, 255, 258, 263, 300])
@pytest.mark.parametrize("height", [7, 30])
def test_widths_around_tiles_vectors_and_bands(isa, check_network, width, height) -> None:
    net = nn.Sequential(nn.Conv2d(3, 10, 7, 2, 3), nn.ReLU())
    assert reads_as_it_lies(check_network(net, (3, height, width)))


@pytest.mark.parametrize("height", [1, 2, 3, 7, 8, 9, 255])
def test_images_lower_than_the_window_and_bands_of_every_height(isa, check_network, height) -> None:
    assert reads_as_it_lies(check_network(nn.Conv2d(3, 9, (3, 7), 2, (3, 3)), (3, height, 65)))


@pytest.mark.parametrize("kernel", [(7, 6), (6, 6), (8, 8), (1, 7), (2, 8), (5, 7)], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (8, 8)], ids=str)
def test_windows_and_paddings(isa, check_network, kernel, padding) -> None:
    assert reads_as_it_lies(check_network(nn.Conv2d(2, 8, kernel, 2, padding), (2, 37, 70)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("filters", [8, 15, 16, 17, 64])
def test_channels_and_filters(isa, check_network, channels, filters) -> None:
    net = nn.Sequential(nn.Conv2d(channels, filters, 7, 2, 3, bias=False), nn.SiLU())
    assert reads_as_it_lies(check_network(net, (channels, 32, 64)))


class Margins(nn.Module):
    """A stem whose result is read with its margins, as it lies and by a window at stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.window, self.phases = (
            nn.Conv2d(3, 16, 7, 2, 3),
            nn.Conv2d(16, 8, 3, 1, 1),
            nn.Conv2d(16, 8, 3, 2, 1),
        )

    def forward(self, x):
        y = F.relu6(self.stem(x))
        return self.window(y), self.phases(y)


@pytest.mark.parametrize("size", [(32, 64), (33, 66), (64, 300)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_margins_of_what_it_writes(isa, check_network, size, threads) -> None:
    assert ops(check_network(Margins(), (3, *size), threads=threads)).count("stem") == 1


def test_errors_stay_near_those_of_the_plain_sum() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 64, 7, 2, 3).requires_grad_(False), torch.randn(1, 3, 224, 224)
    executable = compile(conv, x, threads=2)
    assert reads_as_it_lies(executable)
    exact = conv.double()(x.double())
    error = (torch.as_tensor(executable(x)) - exact).abs().max() / exact.abs().max()
    assert float(error) < 3e-6


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(5, 16, 7, 2, 3),
        nn.Conv2d(3, 16, 5, 2, 2),
        nn.Conv2d(3, 16, 9, 2, 4),
        nn.Conv2d(3, 16, 7, 1, 3),
        nn.Conv2d(3, 16, 7, (2, 1), 3),
        nn.Conv2d(3, 16, 7, 2, 6, dilation=2),
        nn.Conv2d(4, 16, 7, 2, 3, groups=2),
        nn.Conv2d(3, 4, 7, 2, 3),
    ],
    ids=str,
)
def test_other_windows_are_done_as_before(check_network, conv) -> None:
    assert "stem" not in ops(check_network(conv, (conv.in_channels, 40, 70)))


def test_sparse_weights_stay_with_row_blocks(check_network) -> None:
    conv = nn.Conv2d(3, 16, 7, 2, 3).requires_grad_(False)
    conv.weight *= torch.rand(conv.weight.shape) < 0.3
    assert "stem" not in ops(check_network(conv, (3, 64, 64)))


def test_the_transform_is_that_of_the_tiles() -> None:
    """A' [(G w) * (B' x)] with A' and B' of the points, as polynomials have them, is the sum over the window."""
    points, rng = emit_stem._POINTS, np.random.default_rng(0)
    before = np.array([*([*np.poly([q for q in points if q != p])[::-1], 0.0] for p in points), np.poly(points)[::-1]])
    behind = np.array([[*(p**i for p in points), float(i == 3)] for i in range(4)])
    x, w = rng.standard_normal(7), rng.standard_normal(4)
    y = behind @ ((emit_stem._transform() @ w) * (before @ x))
    np.testing.assert_allclose(y, np.correlate(x, w, "valid"), atol=1e-12)
