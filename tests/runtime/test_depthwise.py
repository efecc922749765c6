"""The depthwise kernel against float64 on every instruction set, around the edges of its tiles; depth-first chains."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from espalier.compiler import depth_first
from espalier.compiler.lower import lower
from espalier.compiler.program import Operand, Program, Step, TensorSpec
from espalier.graph.capture import capture
from espalier.runtime.engine import Context, LoadedProgram
from espalier.runtime.executable import compile

WIDTH = {"avx512": 16, "avx2": 8, "baseline": 4}
TALLEST = 7  # rows at once, native/kernels/depthwise.c
WINDOWS = [  # window, stride, padding, dilation: those with tiles of their own, and others
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (5, 1, 2, 1),
    (5, 2, 2, 1),
    (7, 1, 3, 1),
    (7, 2, 3, 1),
    (3, 1, 0, 1),
    (3, 2, 0, 1),
    (3, 1, 2, 2),
    (3, 3, 1, 1),
    (4, 2, 1, 1),
    ((1, 5), 1, (0, 2), 1),
    ((3, 1), (2, 1), (1, 0), 1),
    (2, 2, 0, 1),
    (5, 1, 5, 1),
]


def kinds(executable) -> set[str]:
    return {row.kernel.split("/")[0] for row in executable.describe() if row.op in ("conv", "depthwise", "gather")}


def depthwise(window, stride, padding, dilation, channels: int = 5, multiplier: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels * multiplier, window, stride, padding, dilation, channels).requires_grad_(False)


@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_every_window_around_the_edges_of_its_tiles(isa, case, check_network) -> None:
    w = WIDTH[isa]
    for height, width in [(7, w - 1), (8, w), (9, w + 1), (TALLEST - 1, 2 * w), (TALLEST, 2 * w + 3), (15, 5 * w + 1)]:
        executable = check_network(depthwise(*case), (5, height, width))
        assert kinds(executable) == {"depthwise"}
        assert any(row.kernel == f"depthwise/{isa}" for row in executable.describe())


@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_rows_longer_than_what_is_planned_at_once(isa, case, check_network) -> None:
    """SPANS vectors of native/kernels/depthwise.c: an output of one vector more, with a ragged end, at any stride."""
    most = 16 * WIDTH[isa]
    for width in (most - 1, most, most + 1, 2 * most + 5):
        check_network(nn.Sequential(depthwise(*case), nn.ReLU(), depthwise(3, 1, 1, 1)), (5, 9, width))


@pytest.mark.parametrize("kind", ["empty", "survivor", "dense"])
def test_weights_with_zeros(isa, kind, check_network) -> None:
    for stride in (1, 2):
        conv = depthwise(3, stride, 1, 1)
        if kind != "dense":
            kept = torch.zeros_like(conv.weight)
            if kind == "survivor":
                kept[2, 0, 2, 0] = 1
            conv.weight *= kept
        check_network(nn.Sequential(conv, nn.ReLU6()), (5, 12, 19))


def test_as_part_of_networks(isa, check_network) -> None:
    """Several outputs per input, margins for what follows, residuals, one dimension, inputs that are views."""
    assert kinds(check_network(depthwise(3, 1, 1, 1, multiplier=3), (5, 9, 17))) == {"depthwise"}
    check_network(nn.Sequential(depthwise(3, 2, 1, 1), nn.Conv2d(5, 4, 3, padding=1), nn.Hardswish()), (5, 13, 21))
    check_network(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), depthwise(5, 1, 2, 1)), (3, 13, 21))
    check_network(nn.Sequential(nn.Conv1d(6, 6, 5, 2, 2, groups=6), nn.SiLU()), (6, 41))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = depthwise(3, 1, 1, 1), depthwise(3, 1, 1, 1), depthwise(3, 2, 1, 1)

        def forward(self, x):
            y = torch.relu(x + self.a(x))
            return self.c(torch.relu(y + self.b(y))[:, :, :, :-1])

    check_network(Residual(), (5, 11, 18))


def test_many_channels_per_input_stay_with_the_block_kernel(check_network) -> None:
    assert kinds(check_network(depthwise(3, 1, 1, 1, channels=3, multiplier=8), (3, 9, 9))) == {"conv"}


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(1, 24, 37, 53)
    for window, stride in ((3, 1), (5, 2), (4, 1)):
        net = nn.Sequential(depthwise(window, stride, 1, 1, channels=24), nn.ReLU())
        results = [compile(net, x, threads=threads)(x) for threads in (1, 2, 3, 4)]
        assert all(torch.equal(results[0], r) for r in results)


def program(weight: np.ndarray, size: int) -> Program:
    """A 3 x 3 window over one channel, rows of `size`."""
    x = Operand("arena", 0, 0, (1, 1, size, size), (0, size * size, size, 1))
    y = replace(x, offset=size * size)
    step = Step("dw", "depthwise", y, x, params=(3, 3, 1, 1, 1, 1, 1, 1, 1), arrays={"values": weight})
    ends = (TensorSpec("x", (1, size, size)),), (TensorSpec("y", (1, size, size)),)
    steps = Step("in", "copy", x, replace(x, space="input")), step, Step("out", "copy", replace(x, space="output"), y)
    return Program(*ends, steps, 8 * size * size)


def test_a_broken_kernel_fails(assert_close) -> None:
    """A window that is turned around is found; the same one as it should be passes."""
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal(s).astype(np.float32) for s in ((3, 3), (1, 1, 20, 20)))
    expected = torch.nn.functional.conv2d(*(torch.from_numpy(a).double() for a in (x, weight[None, None])), padding=1)

    def got(values: np.ndarray) -> np.ndarray:
        return Context(LoadedProgram(program(values, 20).to_bytes()), 1).run([x.reshape(1, 1, 20, 20)], 1)[0]

    assert_close(got(weight.reshape(-1)), expected)
    with pytest.raises(AssertionError):
        assert_close(got(weight.T.reshape(-1).copy()), expected)


class Inverted(nn.Module):
    """An inverted residual whose wide tensor is large."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(8, 44, 1), nn.BatchNorm2d(44)
        self.window = nn.Conv2d(44, 44, 3, stride, 1, groups=44)
        self.project = nn.Conv2d(44, 8, 1)
        self.stride = stride

    def forward(self, x):
        y = self.project(torch.relu(self.window(torch.relu(self.norm(self.expand(x))))))
        return x + y if self.stride == 1 else y


@pytest.mark.parametrize("stride", [1, 2])
def test_depth_first_chains_compute_the_same_in_less_memory(stride, check_network, monkeypatch) -> None:
    network = Inverted(stride).eval()
    graph = capture(network, torch.randn(1, 8, 31, 33))
    monkeypatch.setattr(depth_first, "LARGE_BYTES", 1 << 30)
    whole = lower(graph)
    assert not [step.name for step in whole.steps if "/0" in step.name]
    monkeypatch.setattr(depth_first, "LARGE_BYTES", 1000)
    monkeypatch.setattr(depth_first, "GROUP_BYTES", 4 * 31 * 33 * 16)
    groups = lower(graph)
    assert groups.arena_size < whole.arena_size
    steps = {step.name: step for step in groups.steps if step.op in ("conv", "depthwise")}
    names = [name for k in range(3) for name in (f"conv2d/{k}", f"conv2d_1/{k}")]
    assert list(steps) == [*names, "conv2d_2"]
    assert [steps[name].out.sizes[1] for name in names] == [16, 16, 16, 16, 12, 12]
    assert steps["conv2d_1/2"].nodes == ("conv2d_1",)
    assert [steps[name].task for name in names] == [1, 1, 2, 2, 3, 3] and steps["conv2d_2"].task == 0
    assert all(steps[f"conv2d/{k}"].out.space == steps[f"conv2d_1/{k}"].a.space == "scratch" for k in range(3))
    assert 4 * 31 * 33 * 16 <= groups.scratch_size < 1.2 * 4 * 31 * 33 * 16
    assert sum(step.weights for step in groups.steps) == sum(step.weights for step in whole.steps)
    check_network(network, (8, 31, 33))


@pytest.mark.parametrize("stride", [1, 2])
def test_tasks_give_the_same_bits_on_any_number_of_threads(stride, monkeypatch, assert_close) -> None:
    """Each is done by one thread, in a scratch of that thread's own; also while steps are timed, and in batches."""
    monkeypatch.setattr(depth_first, "GROUP_BYTES", 4 * 31 * 33 * 8)
    network, x = Inverted(stride).eval(), torch.randn(7, 8, 31, 33)
    one = compile(network, x[:1], threads=1)
    expected = one(x)
    assert_close(expected, network(x))
    assert {step.task for step in one.steps()} == {0, 1, 2, 3, 4, 5, 6}
    for threads in (2, 3, 4, 8):
        program = compile(network, x[:1], threads=threads)
        assert torch.equal(program(x), expected)
        assert all(torch.equal(program(x[k : k + 1]), expected[k : k + 1]) for k in range(7))
        times = program.profile(x[:1])
        assert all(times[step.layer] > 0 for step in program.steps() if step.task)
        rows = [row for row in program.describe() if row.weights]
        assert [(row.step, row.weights) for row in rows] == [("conv2d", 352), ("conv2d_1", 396), ("conv2d_2", 352)]
        assert torch.equal(program(x[:1]), expected[:1])


def test_no_channel_of_a_chain_is_left_alone(check_network, monkeypatch) -> None:
    """33 channels in groups of 8: a group of one would be a plain conv, which cannot read what is a task's own."""
    monkeypatch.setattr(depth_first, "LARGE_BYTES", 1000)
    monkeypatch.setattr(depth_first, "GROUP_BYTES", 4 * 28 * 28 * 8)
    layers = (
        nn.Conv2d(5, 33, 1),
        nn.ReLU6(),
        nn.Conv2d(33, 33, 3, padding=1, groups=33),
        nn.ReLU6(),
        nn.Conv2d(33, 7, 1),
    )
    check_network(nn.Sequential(*layers), (5, 28, 28))
