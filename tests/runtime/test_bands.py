"""Bands of pixels through neighbouring 1 x 1 convolutions."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from espalier.compiler import bands
from espalier.compiler.lower import lower
from espalier.errors import EngineError
from espalier.graph.capture import capture
from espalier.runtime.engine import LoadedProgram
from espalier.runtime.executable import compile
from espalier.runtime.saved import dump, restore


class Bottleneck(nn.Module):
    """Wide where it ends, narrow in between; the first has a convolution beside it, too."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.first, self.window = nn.Conv2d(channels, 12, 1), nn.Conv2d(12, 12, 3, padding=1)
        self.last, self.norm = nn.Conv2d(12, wide, 1), nn.BatchNorm2d(wide)
        self.beside = nn.Conv2d(channels, wide, 1) if channels != wide else nn.Identity()

    def forward(self, x):
        y = torch.relu(self.window(torch.relu(self.first(x))))
        return torch.relu(self.norm(self.last(y)) + self.beside(x))


class Stage(nn.Sequential):
    """Three of them, whose rows lose columns by eights."""

    def __init__(self) -> None:
        super().__init__(*[Bottleneck(channels, 41) for channels in (9, 41, 41)], nn.Conv2d(41, 18, 1))
        with torch.no_grad():
            for part in self.modules():
                if isinstance(part, nn.Conv2d):
                    rows, *rest = part.weight.shape
                    part.weight *= (torch.rand(-(-rows // 8), *rest) < 0.4).repeat_interleave(8, 0)[:rows]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the tests go by bands."""
    torch.manual_seed(0)
    monkeypatch.setattr(bands, "LARGE_FLOATS", 1000)


SIZES = [(31, 33), (28, 28), (56, 56), (40, 37), (1, 700)]  # planes, row by row, planes with and without whole lines


@pytest.mark.parametrize("size", SIZES)
def test_bands_give_the_same_bits_on_any_number_of_threads(isa, size, monkeypatch, assert_close) -> None:
    """Also while steps are timed, and in batches."""
    network, x = Stage().eval(), torch.randn(5, 9, *size)
    monkeypatch.setattr(bands, "LARGE_FLOATS", 1 << 30)
    whole = compile(network, x[:1], threads=1)
    assert not any(step.bands for step in whole.steps())
    expected = whole(x)
    assert_close(expected, network.double()(x.double()))
    network.float()
    monkeypatch.setattr(bands, "LARGE_FLOATS", 1000)
    for threads in (1, 2, 3, 4):
        program = compile(network, x[:1], threads=threads)
        assert any(step.bands for step in program.steps())
        assert torch.equal(program(x), expected)
        assert all(torch.equal(program(x[k : k + 1]), expected[k : k + 1]) for k in range(5))
        assert all(program.profile(x[:1])[step.layer] > 0 for step in program.steps() if step.bands)
        assert torch.equal(program(x[:1]), expected[:1])
        assert [row.step for row in program.describe()] == [row.step for row in whole.describe()]


def test_runs_are_convolutions_of_single_pixels_with_a_large_tensor_between(monkeypatch) -> None:
    graph = capture(Stage().eval(), torch.randn(1, 9, 31, 33))
    found = {step.name: (step.task, step.bands) for step in lower(graph).steps if step.op == "conv"}
    ends, begins = ("conv2d_3", "conv2d_6", "conv2d_9"), ("conv2d_4", "conv2d_7", "conv2d_10")
    assert [found[name] for name in ends] == [found[name] for name in begins] == [(2, 12), (4, 12), (6, 12)]
    assert found["conv2d_2"] == (2, 12)  # beside the first
    assert found["conv2d_1"] == found["conv2d_5"] == (0, 0)  # windows
    monkeypatch.setattr(bands, "LARGE_FLOATS", 41 * 31 * 33 + 1)
    assert not any(step.bands for step in lower(graph).steps)


def test_what_a_run_reads_lives_as_long_as_the_run() -> None:
    """The first step of a run may read what it reads after the last has written."""
    steps = lower(capture(Stage().eval(), torch.randn(1, 9, 31, 33))).steps
    for step, (first, last) in zip(steps, bands.lives(steps), strict=True):
        run = steps[first : last + 1]
        assert step in run and (len(run) == 1) == (step.bands == 0)
        reads = [o for other in run for o in (other.a, other.b) if o.space == "arena"]
        for o in reads:
            whole = o.offset, o.offset + o.sizes[1] * o.strides[1]
            out = step.out.offset, step.out.offset + step.out.sizes[1] * step.out.strides[1]
            same = (o.offset, o.strides) == (step.out.offset, step.out.strides)
            assert same or not step.bands or whole[1] <= out[0] or out[1] <= whole[0]


def test_programs_with_bands_are_saved_and_restored() -> None:
    network, x = Stage().eval(), torch.randn(1, 9, 31, 33)
    program = compile(network, x, threads=2)
    again = restore(program.graph, dump(program), threads=2)
    assert [(s.task, s.bands, s.layer) for s in again.steps()] == [(s.task, s.bands, s.layer) for s in program.steps()]
    assert torch.equal(again(x), program(x))


@pytest.mark.parametrize(("task", "number"), [(0, 12), (2, -1), (2, 1025), (2, 1 << 40)])
def test_impossible_bands_are_refused(task: int, number: int) -> None:
    program = lower(capture(Stage().eval(), torch.randn(1, 9, 31, 33)))
    steps = tuple(replace(s, task=task, bands=number) if s.bands else s for s in program.steps)
    with pytest.raises(EngineError, match="bands"):
        LoadedProgram(replace(program, steps=steps).to_bytes())


def test_bands_of_other_steps_are_refused() -> None:
    program = lower(capture(Stage().eval(), torch.randn(1, 9, 31, 33)))
    steps = tuple(replace(s, task=2, bands=12) if s.op == "copy" else s for s in program.steps)
    with pytest.raises(EngineError, match="bands"):
        LoadedProgram(replace(program, steps=steps).to_bytes())
