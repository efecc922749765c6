"""Values that lie with copies of their planes beside them, a column to either side."""

import pytest
import torch
from torch import Tensor, nn

from espalier.compiler.program import Step
from espalier.runtime.executable import Executable

SIZES = [(4, 4), (2, 8), (8, 8), (6, 8), (1, 16), (3, 16), (16, 16), (2, 32), (32, 32)]


def thin(module: nn.Module, density: float = 0.3, rows: int = 1) -> nn.Module:
    """Single weights of convs go, or those of `rows` neighbouring filters together."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.weight.shape[1] > 4:
            keep = torch.rand(-(-len(part.weight) // rows), *part.weight.shape[1:]) < density
            part.weight.data *= keep.repeat_interleave(rows, 0)[: len(part.weight)]
            nn.init.normal_(part.bias)
    return module.eval()


class Block(nn.Module):
    def __init__(self, channels: int, act: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 3, stride, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.act, self.stride = act, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        return self.act(self.second(y) + x[:, :, :: self.stride, :: self.stride])


def stored(executable: Executable) -> list[Step]:
    """The convs that store the copies themselves."""
    return [step for step in executable.steps() if step.op == "conv" and len(step.params) > 8 and step.params[8]]


def gathered(executable: Executable) -> list[Step]:
    return [step for step in executable.steps() if step.name.endswith("/sides")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_vectors_half_vectors_and_pairs(isa, check_network, size: tuple[int, int], threads: int) -> None:
    channels = 16
    network = nn.Sequential(
        nn.Conv2d(3, channels, 3, 1, 1), nn.ReLU(), Block(channels, nn.ReLU()), Block(channels, nn.ReLU6())
    )
    executable = check_network(thin(network, 0.4), (3, *size), threads=threads)
    assert len(stored(executable)) == (4 if size[0] > 1 else 0) and not gathered(executable)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_strides_and_other_readers(isa, check_network, size: int) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1),
        nn.ReLU(),
        Block(16, nn.ReLU()),
        Block(16, nn.ReLU(), stride=2),
        nn.Conv2d(16, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    assert stored(check_network(thin(network, rows=2), (3, size, size)))


def test_the_output_of_a_network_and_a_residual_of_fewer_channels(isa, check_network) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, 1, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(x).relu()
            y = self.b(x).relu()
            return self.c(y) + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)), y

    assert stored(check_network(thin(Two()), (3, 16, 16)))


def test_other_activations_keep_their_margins(isa, check_network) -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), Block(16, nn.SiLU()))
    assert not stored(check_network(thin(network), (3, 8, 8))), "only what a vector holds when it is stored"


@pytest.mark.parametrize(
    "reader",
    [
        nn.Conv2d(16, 16, 5, 1, 2),
        nn.Conv2d(16, 16, 3, 1, 2),
        nn.Conv2d(16, 16, 3, 1, 2, dilation=2),
        nn.Conv2d(16, 16, 1, 1, 1),
        nn.Conv2d(16, 16, (1, 3), 1, (0, 1)),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.MaxPool2d(3, 1, 1),
    ],
)
def test_readers_of_other_margins(isa, check_network, reader: nn.Module) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.window, self.reader = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), reader

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.stem(x).relu()
            return self.window(y), self.reader(y)

    assert not stored(check_network(thin(Fork()), (3, 8, 8)))


def test_dense_readers_keep_their_margins(isa, check_network) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.thin, self.dense = (
                nn.Conv2d(3, 16, 3, 1, 1),
                nn.Conv2d(16, 16, 3, 1, 1),
                nn.Conv2d(16, 32, 3, 1, 1),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.stem(x).relu()
            return self.thin(y), self.dense(y)

    network = thin(Fork())
    nn.init.normal_(network.dense.weight)
    assert not stored(check_network(network, (3, 16, 16)))


def test_no_value_with_margins_among_them(isa, check_network) -> None:
    """What leads to them or from them would have rows of another length."""
    wide = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 5, 1, 2), nn.Conv2d(16, 16, 3, 1, 1))
    for size in (8, 16):
        assert not stored(check_network(thin(wide), (3, size, size)))


def test_copies_that_a_conv_cannot_store_are_gathered(isa, check_network) -> None:
    """A dense window at stride 2 whose vectors run along rows of the weight."""
    network = nn.Sequential(nn.Conv2d(16, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1))
    thin(network)
    nn.init.normal_(network[0].weight)
    for threads in (1, 3):
        executable = check_network(network, (16, 8, 8), threads=threads)
        assert len(gathered(executable)) == 1 and not stored(executable)
