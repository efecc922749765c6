"""Images of a few whole vectors and one pixel: it goes with the last tile, whatever is done to its sums."""

import pytest
import torch
from torch import Tensor, nn

import espalier as es


class Net(nn.Module):
    def __init__(self, rows: int, act: nn.Module, bias: bool) -> None:
        super().__init__()
        self.before, self.sparse = nn.Conv2d(24, 24, 1), nn.Conv2d(24, rows, 1, bias=bias)
        self.act, self.behind = act, nn.Conv2d(rows, 4, 3, padding=1)  # which reads margins

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y = self.sparse(x)
        return self.behind(self.act(y + x if y.shape == x.shape else y))


@pytest.mark.parametrize("size", [(1, 17), (3, 11), (7, 7), (1, 16), (1, 1), (5, 13), (9, 9)])
@pytest.mark.parametrize(
    ("rows", "act", "bias"),
    [(40, nn.ReLU6(), True), (37, nn.SiLU(), True), (24, nn.ReLU(), False), (8, nn.ReLU(), True)],
)
def test_the_last_pixel(size: tuple[int, int], rows: int, act: nn.Module, bias: bool) -> None:
    torch.manual_seed(0)
    net, x = Net(rows, act, bias).eval(), torch.randn(2, 24, *size)
    es.start(net, es.Plan.of({"sparse": es.scheme("block_punched", 0.3)}, unfit="dense"), "magnitude", x).finish()
    with torch.no_grad():
        wanted = net(x)
    found = [es.compile(net, x, threads=threads)(x) for threads in (1, 2, 3)]
    assert float((found[0] - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert all(torch.equal(found[0], other) for other in found[1:])
