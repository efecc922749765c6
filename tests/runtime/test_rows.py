"""Images that lie row by row, and those without margins: stored by whole vectors, their phases picked row by row."""

import pytest
import torch
from torch import Tensor, nn

import espalier as es


class Stage(nn.Module):
    """A wide value, a strided window over it beside a strided shortcut, and windows over what they make."""

    def __init__(self, act: nn.Module, bias: bool) -> None:
        super().__init__()
        self.widen = nn.Conv2d(16, 32, 1, bias=bias)
        self.stride = nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=bias)
        self.shortcut = nn.Conv2d(32, 48, 1, stride=2)
        self.window, self.last = nn.Conv2d(48, 48, 3, padding=1), nn.Conv2d(48, 24, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.widen(x))
        y = self.act(self.stride(x) + self.shortcut(x))
        return self.last(self.act(self.window(y) + y))


@pytest.mark.parametrize("size", [(28, 28), (14, 14), (56, 56), (13, 27), (15, 14), (7, 7), (28, 30)])
@pytest.mark.parametrize(("act", "bias"), [(nn.ReLU(), True), (nn.SiLU(), False)])
def test_stages(isa: str, size: tuple[int, int], act: nn.Module, bias: bool) -> None:
    torch.manual_seed(0)
    net, x = Stage(act, bias).eval(), torch.randn(2, 16, *size)
    es.start(net, es.Plan.uniform("block_punched", 0.3), "magnitude", x).finish()
    with torch.no_grad():
        wanted = net(x)
    found = [es.compile(net, x[:1], threads=threads)(x) for threads in (1, 2, 3, 4)]
    assert float((found[0] - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_slices_of_a_large_step_give_the_same_bits() -> None:
    """More threads than cores: whoever is not running has its slices done by others."""
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(64, 256, 1), nn.ReLU(), nn.Conv2d(256, 64, 3, padding=1)).eval(),
        torch.randn(1, 64, 56, 56),
    )
    es.start(net, es.Plan.uniform("block_punched", 0.3), "magnitude", x).finish()
    alone = es.compile(net, x, threads=1)(x)
    for threads in (2, 5, 16):
        program = es.compile(net, x, threads=threads)
        assert all(torch.equal(program(x), alone) for _ in range(10))
