"""Calling a compiled network: kinds, shapes, batches, threads, tables."""

import gc
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from espalier.errors import EngineError, ShapeError
from espalier.graph.capture import capture
from espalier.runtime import engine
from espalier.runtime.executable import compile
from espalier.store import load, save


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 5)
    ).eval()


@pytest.fixture(scope="module")
def executable(network):
    return compile(network, torch.randn(1, 3, 10, 10), threads=2)


def test_any_batch_size(network, executable, assert_close) -> None:
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 10, 10)
        assert_close(executable(x), network(x))
    assert executable(torch.empty(0, 3, 10, 10)).shape == (0, 5)


def test_the_kind_of_the_input_comes_back(network, executable, assert_close) -> None:
    x = torch.randn(2, 3, 10, 10)
    got = executable(x.numpy())
    assert isinstance(got, np.ndarray) and isinstance(executable(x), torch.Tensor)
    assert_close(got, network(x))
    assert_close(executable(x.permute(0, 1, 3, 2)), network(x.permute(0, 1, 3, 2)))  # not contiguous
    assert_close(executable(input=x), network(x))


def test_weights_are_held_by_the_engine_alone(tmp_path, assert_close) -> None:
    """Their arrays and the bytes of the program are dropped once it is loaded; saving reads them from the engine."""
    network, x = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 3)).eval(), torch.randn(2, 512)
    tracemalloc.start()
    program = compile(network, x, threads=1)
    gc.collect()
    of_arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    held = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([of_arrays]).traces)
    tracemalloc.stop()
    assert held < 4 * 512 * 1024 / 100
    assert not any(piece.code for piece in program.pieces) and not any(step.arrays for step in program.steps())
    save(program, None, tmp_path / "net.esp")
    again = load(tmp_path / "net.esp", threads=1)
    assert not any(piece.code for piece in again.pieces)
    save(again, None, tmp_path / "again.esp")
    assert load(tmp_path / "again.esp", threads=1).loaded()[0][1].to_bytes() == program.loaded()[0][1].to_bytes()
    assert_close(again(x), program(x))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.randn(1, 3, 10, 11), r"input input: expected shape \[any, 3, 10, 10\], got \[1, 3, 10, 11\]"),
        (torch.randn(3, 10, 10), r"got \[3, 10, 10\]"),
        (torch.randn(1, 3, 10, 10).double(), "expected float32, got float64; convert it first"),
        ([1.0], "expected a tensor or an array, got list"),
    ],
)
def test_wrong_inputs_are_refused(executable, bad, message) -> None:
    with pytest.raises(ShapeError, match=message):
        executable(bad)


def test_wrong_numbers_of_inputs_are_refused(executable) -> None:
    x = torch.randn(1, 3, 10, 10)
    for args, kwargs in (((), {}), ((x, x), {}), ((x,), {"input": x}), ((), {"y": x})):
        with pytest.raises(ShapeError, match="takes 1 inputs"):
            executable(*args, **kwargs)


def test_many_callers_at_once(executable) -> None:
    inputs = [torch.randn(1 + k % 3, 3, 10, 10) for k in range(12)]
    expected = [executable(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            got = list(pool.map(executable, inputs))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_number_of_threads_changes_nothing(network) -> None:
    x = torch.randn(3, 3, 10, 10)
    results = [compile(network, x, threads=t)(x) for t in (1, 2, 3, 4)]
    assert all(torch.equal(results[0], r) for r in results)


def test_a_forked_process_starts_threads_of_its_own(executable) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 10, 10)).astype(np.float32)
    expected = executable(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if (executable(x) == expected).all() else 1)
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("the child hangs")


def test_tables_and_times(executable) -> None:
    rows = executable.describe()
    conv = next(row for row in rows if row.op == "conv")
    assert (conv.weights, conv.nonzeros) == (432, 432)
    assert conv.format == "dense/8" and "density 1.00" in conv.reason
    times = executable.profile(torch.randn(4, 3, 10, 10))
    assert set(times) == {row.step for row in rows} and all(ms >= 0 for ms in times.values())


def test_graphs_compile_and_go_back_to_modules(network, assert_close) -> None:
    x = torch.randn(2, 3, 10, 10)
    executable = compile(capture(network, x), threads=1)
    assert_close(executable(x), network(x))
    assert_close(executable.to_module()(x), network(x))
    assert executable.graph.inputs == ("input",)


def test_a_missing_library_says_how_to_build_it(monkeypatch) -> None:
    monkeypatch.setenv("ESPALIER_LIBRARY", "/nowhere/lib.so")
    with pytest.raises(EngineError, match="no such file"):
        engine.library_path()
    monkeypatch.delenv("ESPALIER_LIBRARY")
    monkeypatch.setattr(engine, "_NAME", "missing.so")
    with pytest.raises(EngineError, match=r"cmake --build build"):
        engine.library_path()


def test_a_program_names_its_ends(executable) -> None:
    loaded = executable._runners[0].loaded
    assert loaded.inputs == [("input", (3, 10, 10))]
    assert [shape for _, shape in loaded.outputs] == [(5,)]
    assert "density 1.00" in loaded.notes[1]
