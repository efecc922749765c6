"""Batches: whole samples on different threads, large weights read once per wave, the same bits whatever the way."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from espalier.runtime.executable import Executable, compile
from espalier.runtime.runners import array_of


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """With weights that a wave shares out (more than 2^18) in the middle and at the end, and steps of every size."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.Conv2d(16, 24, 1)]
    heavy = [nn.Flatten(), nn.Linear(24 * 100, 130), nn.Tanh(), nn.Linear(130, 2100), nn.ReLU(), nn.Linear(2100, 7)]
    return nn.Sequential(*convs, *heavy).eval()


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    return torch.randn(13, 3, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def alone(network, samples) -> torch.Tensor:
    """One sample at a time on one thread."""
    executable = compile(network, samples[:1], threads=1)
    return torch.cat([executable(x[None]) for x in samples])


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_batches_give_the_bits_of_single_samples(network, samples, alone, threads) -> None:
    executable = compile(network, samples[:1], threads=threads)
    for batch in (1, 2, 3, 4, 5, 7, 8, 13):
        assert torch.equal(executable(samples[:batch]), alone[:batch]), f"batch {batch}"


def test_the_network_is_right(network, samples, alone, assert_close) -> None:
    with torch.no_grad():
        assert_close(alone, network.double()(samples.double()))
    network.float()


def test_callers_at_once_with_batches_of_every_size(network, samples, alone) -> None:
    executable = compile(network, samples[:1], threads=3)
    sizes = [1, 6, 13, 2, 4, 9, 3, 12]
    with ThreadPoolExecutor(4) as pool:
        for got, batch in zip(pool.map(lambda n: executable(samples[:n]), sizes * 3), sizes * 3, strict=True):
            assert torch.equal(got, alone[:batch])


def test_contexts_are_used_again(network, samples) -> None:
    executable = compile(network, samples[:1], threads=2)
    runner = executable._runners[0]
    first = runner.idle[0]
    for _ in range(3):
        executable(samples)
    assert runner.idle == [first]


def test_steps_are_timed_in_batches_too(network, samples) -> None:
    executable = compile(network, samples[:1], threads=2)
    expected = executable(samples)
    times = executable.profile(samples)
    assert set(times) == {row.step for row in executable.describe()}
    assert sum(times.values()) > 0
    assert torch.equal(executable(samples), expected)


def test_tensors_and_arrays_are_read_where_they_lie() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert np.shares_memory(array_of(x), x.numpy())
    assert np.shares_memory(array_of(x.numpy()), x.numpy())
    assert np.shares_memory(array_of(x[1:]), x.numpy())  # part of a batch
    last = x.to(memory_format=torch.channels_last)
    assert not np.shares_memory(array_of(last), last.permute(0, 2, 3, 1).numpy())  # must be turned
    assert (array_of(last) == x.numpy()).all()


def test_results_belong_to_the_caller(network, samples) -> None:
    """A later call does not write into an earlier result."""
    executable: Executable = compile(network, samples[:1], threads=1)
    first = executable(samples[:2])
    kept = first.clone()
    executable(samples[2:4])
    assert torch.equal(first, kept)
