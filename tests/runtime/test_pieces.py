"""Single rows whose columns come in pieces of channels: the same bits as in one go, wherever rows and pixels lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from espalier.compiler import emit_blocks
from espalier.compiler.lower import lower
from espalier.compiler.program import Program
from espalier.errors import EngineError
from espalier.graph import capture
from espalier.runtime.engine import Context, LoadedProgram


def sparse(module: nn.Module, density: float = 0.15) -> nn.Module:
    torch.manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv1d)):
            layer.weight.data *= torch.rand_like(layer.weight) < density
            layer.weight.data[layer.out_channels // 2] = 0  # a row of nothing
            layer.weight.data[:, layer.in_channels // 3] = 0  # and a channel that nobody reads
    return module.eval()


class Residual(nn.Module):
    """Margins, a residual, and an activation that is no clamp."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activation(self.a(x))
        return self.activation(self.b(y) + y)


def convs(channels: int, *rows: int, stride: int = 1, size: int = 3) -> nn.Module:
    layers: list[nn.Module] = []
    for out in rows:
        layers += [nn.Conv2d(channels, out, size, stride, size // 2), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers)


CASES = {
    "one run": (lambda: Residual(24, nn.ReLU()), (24, 13, 21)),
    "any activation": (lambda: Residual(24, nn.SiLU()), (24, 9, 33)),
    "more rows than wait": (lambda: convs(12, 131, 260), (12, 11, 12)),
    "wide rows": (lambda: convs(16, 20, 24), (16, 5, 150)),
    "copies to either side": (lambda: convs(3, 24, 24, 24), (3, 16, 16)),
    "shifted copies": (lambda: convs(32, 32, 32), (32, 7, 7)),
    "a lone pixel": (lambda: convs(32, 40, size=1), (32, 7, 7)),
    "phases": (lambda: convs(16, 32, 40, stride=2), (16, 29, 31)),
    "a line": (lambda: nn.Sequential(nn.Conv1d(16, 24, 5, 1, 2), nn.ReLU(), nn.Conv1d(24, 8, 3)), (16, 77)),
}


def run(program: Program, x: torch.Tensor, threads: int) -> torch.Tensor:
    (out,) = Context(LoadedProgram(program.to_bytes()), threads).run([x.numpy()], len(x))
    return torch.from_numpy(out)


def pieces(program: Program) -> list[int]:
    return [step.params[9] for step in program.steps if step.op == "conv" and len(step.params) > 9 and step.params[9]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pieces of few channels, also where a row has few columns."""
    monkeypatch.setattr(emit_blocks, "_PIECE_FLOATS", 1500)
    monkeypatch.setattr(emit_blocks, "_LEAST_COLUMNS", 1)
    return monkeypatch


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_in_one_go(isa, small, case, assert_close) -> None:
    make, shape = CASES[case]
    network, x = sparse(make()), torch.randn(3, *shape)
    graph = capture(network, x[:1])
    program = lower(graph)
    small.setattr(emit_blocks, "_PIECE_FLOATS", 1 << 30)
    whole = lower(graph)
    assert not pieces(whole) and (case == "a lone pixel" or max(pieces(program)) >= 2)
    expected = run(whole, x, 1)
    assert_close(expected, network(x))
    for threads in (1, 2, 3):
        assert torch.equal(run(program, x, threads), expected)


def test_windows_of_one_pixel_and_few_columns_stay_whole(monkeypatch) -> None:
    """Measured: the former lose as much as windows of 3 x 3 gain, a third."""
    monkeypatch.setattr(emit_blocks, "_PIECE_FLOATS", 1500)
    for network, shape, found in (
        (convs(64, 64, size=1), (64, 14, 14), 0),
        (convs(16, 16), (16, 28, 28), 2),
        (convs(64, 64), (64, 28, 28), 10),
    ):
        program = lower(capture(sparse(network), torch.randn(1, *shape)))
        assert len(pieces(program)) == (found > 0) and all(count <= found for count in pieces(program))


@pytest.mark.parametrize("change", [(9, 2), (9, -1), (9, 1 << 40), (0, 2)], ids=str)
def test_impossible_pieces_are_refused(small, change) -> None:
    program = lower(capture(sparse(convs(24, 24)), torch.randn(1, 24, 14, 14)))
    number = next(k for k, step in enumerate(program.steps) if step.op == "conv")
    params = list(program.steps[number].params)
    assert params[9] == 3
    params[change[0]] = change[1]
    steps = [*program.steps]
    steps[number] = replace(steps[number], params=tuple(params))
    with pytest.raises(EngineError, match=r"pieces|blocks disagree|columns disagree"):
        LoadedProgram(replace(program, steps=tuple(steps)).to_bytes())
