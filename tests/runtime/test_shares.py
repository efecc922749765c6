"""How threads share steps, and how strided convolutions share phases."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.runtime.executable import compile


def pruned(module: nn.Module, height: int, density: float) -> nn.Module:
    """Blocks of `height` filters lose weights together."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d) and part.groups == 1:
                rows, *rest = part.weight.shape
                keep = torch.rand(-(-rows // height), *rest, generator=rng) < density
                part.weight *= keep.repeat_interleave(height, 0)[:rows]
    return module


def stage(channels: int, *more: nn.Module) -> nn.Sequential:
    """Windows of two sizes with what else shares planes out, twice as many channels behind them."""
    wide = 2 * channels
    return nn.Sequential(
        nn.Conv2d(channels, wide, 3, padding=1),
        nn.LeakyReLU(),
        nn.MaxPool2d(3, 1, 1),
        nn.Conv2d(wide, wide, 3, 1, 1, groups=wide),
        nn.Conv2d(wide, wide, 1),
        nn.ReLU6(),
        *more,
    )


@pytest.mark.parametrize(("height", "density"), [(1, 0.2), (8, 0.1), (8, 1.0)])
@pytest.mark.parametrize("size", [(4, 4), (7, 7), (13, 29), (40, 33)])
def test_results_do_not_depend_on_how_threads_share(isa, size, height, density, assert_close) -> None:
    """Bands of pixels, shares of blocks and both, to the bit."""
    torch.manual_seed(0)
    net = nn.Sequential(stage(24, nn.Upsample(scale_factor=2)), nn.Conv2d(48, 40, 3, 2, 1), stage(40, nn.AvgPool2d(2)))
    net = pruned(net, height, density).eval()
    x = torch.randn(1, 24, *size)
    alone = compile(net, x, threads=1)(x)
    assert_close(alone, net.double()(x.double()))
    net.float()
    for threads in (2, 3, 4, 6):
        assert (compile(net, x, threads=threads)(x) == alone).all(), f"{threads} threads"


class Fork(nn.Module):
    """Strided windows over one value."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.stem, self.branches = nn.Conv2d(3, 6, 3, padding=1), nn.ModuleList(branches)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x).relu()
        return [branch(x) for branch in self.branches]


def gathers(executable) -> list[tuple[int, ...]]:
    """How many phases of how many channels every step gathers."""
    return [step.out.sizes[:2] for step in executable.steps() if step.op == "gather"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_residual_block_gathers_its_phases_once(first, check_network) -> None:
    """Whichever of its two branches comes first; the short one reads a phase of the other."""
    branches = [nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(6, 8, 1, 2)]
    for size in ((16, 16), (15, 19), (9, 8)):
        executable = check_network(Fork(branches[first], branches[1 - first]), (3, *size))
        assert gathers(executable) == [(4, 6)]


def test_windows_of_many_kinds_share_phases(check_network) -> None:
    """As many as their windows begin at; each stride has its own."""
    executable = check_network(
        Fork(
            nn.Conv2d(6, 4, 3, 2, 1),
            nn.Conv2d(6, 4, 5, 2, 2),
            nn.Conv2d(6, 8, (1, 5), 2, (0, 1), groups=2),
            nn.Conv2d(6, 4, 3, 2, 0, dilation=2),
            nn.Conv2d(6, 4, 3, 3, 1),
            nn.Conv2d(6, 4, 3, (2, 1), 1),
        ),
        (3, 17, 22),
    )
    assert sorted(gathers(executable)) == [(2, 6), (7, 6), (9, 6)]


def test_phases_that_no_weight_reads_are_not_gathered(check_network) -> None:
    """One window position is left: one phase of four."""
    conv = nn.Conv2d(6, 8, 3, 2, 1)
    with torch.no_grad():
        conv.weight[:, :, np.array([0, 1, 1, 2]), np.array([1, 0, 2, 1])] = 0
        conv.weight[:, :, [0, 0, 2, 2], [0, 2, 0, 2]] = 0
    assert gathers(check_network(Fork(conv), (3, 12, 12))) == [(1, 6)]
    with torch.no_grad():
        conv.weight.zero_()
    check_network(Fork(conv, nn.Conv2d(6, 8, 1, 2)), (3, 12, 12))


@pytest.mark.parametrize("density", [0.1, 0.4])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 4, 4), (24, 4, 4), (9, 2, 8), (17, 5, 3)])
def test_small_images_are_shifted(isa, channels, height, width, density, check_network) -> None:
    """A vector holds whole rows: one copy of the planes for every column of a window, made once for two convs."""
    torch.manual_seed(0)
    branches = [nn.Conv2d(6, 8, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1), nn.Conv2d(6, 8, (1, 5), 1, (0, 2))]
    net = Fork(*branches)
    net.stem = nn.Conv2d(channels, 6, 3, padding=1)
    pruned(net, 1, density)
    executable = check_network(net, (channels, height, width))
    assert [sizes for sizes in gathers(executable) if sizes[1] == 6] == [(3, 6), (5, 6)]
    flat = [step for step in executable.steps() if step.op == "conv"]
    assert all(step.params[1] == 1 for step in flat), "row by row"


def test_dense_windows_over_small_images_are_not_shifted(check_network) -> None:
    assert gathers(check_network(nn.Sequential(nn.Conv2d(6, 40, 3, 1, 1), nn.Conv2d(40, 40, 3, 1, 1)), (6, 4, 4))) == []
