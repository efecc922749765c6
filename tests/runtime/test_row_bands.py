"""Bands of rows around depthwise windows: which rows, when, and the same bits as without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import espalier as es
from espalier.compiler import depth_first, row_bands
from espalier.compiler import lower as lower_module
from espalier.compiler.lower import lower
from espalier.compiler.row_bands import Extent
from espalier.graph import capture
from espalier.runtime.engine import Context, LoadedProgram


class Inverted(nn.Module):
    """Two inverted residuals behind a stem, the second with a window of any size and stride."""

    def __init__(self, width: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.window = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.expand = nn.Conv2d(8, width, 1)
        self.window_2 = nn.Conv2d(width, width, size, stride, size // 2, groups=width)
        self.project_2 = nn.Conv2d(width, 8, 1)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(torch.relu(self.window(torch.relu(self.stem(x)))))
        y = self.project_2(torch.relu(self.window_2(torch.nn.functional.hardtanh(self.expand(x), 0, 6))))
        return x + y if self.stride == 1 else y


@pytest.fixture(autouse=True)
def small_networks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_bands, "_FETCH", 100.0)
    monkeypatch.setattr(row_bands, "LARGE_FLOATS", 1)
    monkeypatch.setattr(depth_first, "LARGE_BYTES", 1)


CASES = [
    ((8, 3, 1), (56, 28)),  # 14 pixels in a row: images row by row
    ((24, 3, 1), (56, 56)),
    ((24, 3, 2), (52, 60)),
    ((16, 5, 1), (60, 40)),
    ((16, 5, 2), (46, 50)),
    ((16, 7, 1), (48, 90)),
]


@pytest.mark.parametrize(("arguments", "shape"), CASES)
def test_the_same_bits_in_bands(arguments, shape, assert_close) -> None:
    network, x = Inverted(*arguments).eval(), torch.randn(5, 3, *shape)
    graph = capture(network, x[:1])
    plain = _run(lower(graph), x, 1)
    assert_close(plain, network(x))
    for threads in (2, 3, 4):
        program = lower(graph, threads)
        bands = [step for step in program.steps if step.op == "depthwise" and step.task]
        assert {step.layer for step in bands} == {"conv2d_1", "conv2d_4"}
        assert all(step.a.space == step.out.space == "scratch" for step in bands)
        assert len(bands) >= 2 * threads
        for used in (1, threads, 5):
            assert torch.equal(_run(program, x, used), plain)


def _run(program, x: torch.Tensor, threads: int) -> torch.Tensor:
    (out,) = Context(LoadedProgram(program.to_bytes()), threads).run([x.numpy()], len(x))
    return torch.from_numpy(out)


def test_one_thread_makes_a_window_and_what_is_behind_it_in_bands(monkeypatch) -> None:
    monkeypatch.setattr(row_bands, "WINDOW_FLOATS", 1 << 12)
    steps = lower(capture(Inverted(24).eval(), torch.randn(1, 3, 56, 56))).steps
    tasks = {step.layer: step.task for step in steps if step.task}
    assert {"conv2d_1", "conv2d_2"} <= set(tasks) and "conv2d" not in tasks
    assert sum(step.out.sizes[2] for step in steps if step.layer == "conv2d_2") == 28


def test_layers_are_told_of_once() -> None:
    network, x = Inverted(24).eval(), torch.randn(1, 3, 56, 56)
    program = es.compile(network, x, threads=2)
    found = {row.step: row.weights for row in program.describe() if row.weights}
    assert found["conv2d"] == 3 * 16 * 9 and found["conv2d_1"] == 16 * 9 and found["conv2d_3"] == 8 * 24
    times = program.profile(x)
    assert all(times[name] > 0 for name in found)


def test_a_result_that_windows_read_is_not_made_in_bands() -> None:
    """They want zeros around it, which bands do not write."""
    network = nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, 1, 1)
    )
    steps = lower(capture(network.eval(), torch.randn(1, 8, 32, 32)), 4).steps
    assert not any("scratch" in (step.out.space, step.a.space) for step in steps if step.layer == "conv2d_2")


def test_bands_wait_for_tasks_before_them(monkeypatch) -> None:
    """Steps of tasks whose numbers follow each other are done at once."""
    seen = []

    def with_a_task_before(steps, threads):
        first = next(k for k, step in enumerate(steps) if step.op == "depthwise")
        before = replace(steps[0], task=7, name="before")
        seen.extend(row_bands.through_rows([before, *steps[first - 1 :]], threads)[0])
        return row_bands.through_rows(steps, threads)

    monkeypatch.setattr(lower_module, "through_rows", with_a_task_before)
    lower(capture(Inverted(24).eval(), torch.randn(1, 3, 56, 56)), 2)
    tasks = [step.task for step in seen]
    assert tasks[0] == 7 and tasks[1] > 8


def test_a_batch_is_shared_by_samples() -> None:
    network = Inverted(24).eval()
    programs = [lower(capture(network, torch.randn(batch, 3, 56, 56)), 3) for batch in (2, 3)]
    found = [sum(step.layer == "conv2d" for step in p.steps) for p in programs]
    assert found == [3, 1]


def extent(**changes) -> Extent:
    given = {"before": 1000, "behind": 1000, "channels": 576, "source": (14, 14), "out": (14, 14)}
    return Extent(**{**given, "size": 3, "stride": 1, "pad": 1, "dilation": 1, **changes})


def test_rows_that_windows_read() -> None:
    assert extent().read((0, 4)) == (0, 5)
    assert extent().read((4, 7)) == (3, 8)
    assert extent().read((10, 14)) == (9, 14)
    assert extent(source=(28, 28), stride=2).read((3, 7)) == (5, 14)
    assert extent(size=5, pad=2).read((4, 7)) == (2, 9)
    assert extent(pad=2, dilation=2).read((4, 7)) == (2, 9)


def test_bands_that_would_read_nothing() -> None:
    far = extent(size=1, pad=20, source=(14, 14), out=(54, 54))
    assert far.read((0, 13)) == (0, -7) and not far.bands(4) and not replace(far, before=None).bands(1)


def test_what_is_left_over_goes_to_the_ends(monkeypatch) -> None:
    assert extent().bands(4) == [(0, 4), (4, 7), (7, 10), (10, 14)]
    assert extent(source=(15, 15), out=(15, 15)).bands(4) == [(0, 4), (4, 8), (8, 11), (11, 15)]
    monkeypatch.undo()
    assert extent(before=11_000, behind=11_000).bands(4)
    assert not extent(before=55_000, behind=55_000).bands(4)  # the neighbours' rows would cost more than they save
    assert extent(before=55_000, behind=55_000).bands(2) and not extent(source=(7, 7), out=(7, 7)).bands(4)
    assert not extent().bands(1)
