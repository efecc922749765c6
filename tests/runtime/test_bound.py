"""Bound calls: inputs and outputs that keep their places."""

import gc
import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.errors import EngineError, ShapeError
from espalier.runtime.executable import Executable, compile


@pytest.fixture
def executable() -> Executable:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1600, 5))
    return compile(network.eval(), torch.randn(1, 3, 10, 10), threads=2)


def test_reads_its_inputs_anew_and_writes_in_place(executable) -> None:
    x = torch.randn(2, 3, 10, 10)
    call = executable.bind(x)
    first = call()
    assert torch.equal(first, executable(x))
    x.copy_(torch.randn(2, 3, 10, 10))
    assert call() is first and torch.equal(first, executable(x))
    assert call.outputs is first and call.inputs[0] is x


def test_gives_the_kind_that_it_got(executable) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 10, 10)).astype(np.float32)
    call = executable.bind(x)
    assert isinstance(call(), np.ndarray) and (call() == executable(x)).all()
    assert isinstance(executable.bind(torch.from_numpy(x))(), Tensor)
    assert executable.bind(input=torch.from_numpy(x))().shape == (1, 5)
    assert executable.bind(torch.zeros(0, 3, 10, 10))().shape == (0, 5)


def test_what_pytorch_runs_can_be_bound(assert_close) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.relu(), x.cumsum(1)

    x = torch.randn(2, 3, 4)
    executable = compile(Sums().eval(), x)
    assert executable.fallbacks
    call = executable.bind(x)
    x.copy_(torch.randn(2, 3, 4))
    assert_close(call()[0], x.relu())
    assert_close(call.outputs[1], x.cumsum(1))
    assert set(call.profile()) == set(executable.profile(x))


def test_an_input_may_be_an_output() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.relu()

    x = torch.randn(2, 3, 4)
    call = compile(Both().eval(), x).bind(x)
    x.neg_()
    same, positive = call()
    assert torch.equal(same, x) and torch.equal(positive, x.relu())


def test_times_every_step(executable) -> None:
    call = executable.bind(torch.randn(1, 3, 10, 10))
    times = call.profile()
    assert set(times) == {row.step for row in executable.describe()} and all(ms >= 0 for ms in times.values())


def test_a_context_goes_back_when_a_call_is_dropped(executable) -> None:
    runner = executable.only_native
    first = runner.idle[0]
    call = executable.bind(torch.randn(1, 3, 10, 10))
    assert runner.idle == []
    executable(torch.randn(1, 3, 10, 10))  # has one of its own
    del call
    gc.collect()
    assert len(runner.idle) == 2 and first in runner.idle


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3, 10, 9), r"expected shape"),
        (torch.zeros(1, 3, 10, 10, dtype=torch.float64), "expected float32"),
        (torch.zeros(1, 10, 10, 3).permute(0, 3, 1, 2), "input input: bind needs one that lies in one piece"),
        (np.zeros((1, 10, 10, 3), np.float32).transpose(0, 3, 1, 2), "make it contiguous"),
        ([1.0], "got list"),
    ],
)
def test_wrong_inputs_are_refused(executable, bad, message) -> None:
    with pytest.raises(ShapeError, match=message):
        executable.bind(bad)


def test_a_forked_process_is_told_to_bind_again(executable) -> None:
    x = torch.randn(1, 3, 10, 10)
    call = executable.bind(x)
    child = os.fork()
    if child == 0:
        try:
            call()
        except EngineError as error:
            os._exit(0 if "bind again" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
