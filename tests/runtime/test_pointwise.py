"""Pooling, means, softmax and arithmetic on every instruction set, around the edges of vectors and tiles."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espalier.runtime.executable import compile

WIDTH = {"avx512": 16, "avx2": 8, "baseline": 4}


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def sizes(isa: str) -> list[tuple[int, int]]:
    w = WIDTH[isa]
    return [(4, w - 1), (5, w), (7, w + 1), (8, 2 * w + 1), (9, 3 * w - 1), (10, 5 * w + 3)]


POOLS = {
    "largest 2/2": lambda x: F.max_pool2d(x, 2),
    "largest 2/1": lambda x: F.max_pool2d(x, 2, 1),
    "largest 3/1, padded": lambda x: F.max_pool2d(x, 3, 1, 1),
    "largest 3/2, padded": lambda x: F.max_pool2d(x, 3, 2, 1),
    "largest 3/2, ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "largest 5/1, padded": lambda x: F.max_pool2d(x, 5, 1, 2),
    "largest, of negative numbers": lambda x: F.max_pool2d(x.sigmoid() - 2, 3, 2, 1),
    "largest 4/3": lambda x: F.max_pool2d(x, 4, 3, 1),
    "mean 2/2": lambda x: F.avg_pool2d(x, 2),
    "mean 3/1, padding counts": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "mean 3/2, image only": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "mean 3/2, ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "mean 5/1, image only": lambda x: F.avg_pool2d(x, 5, 1, 2, count_include_pad=False),
    "mean of all": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean of all, as a mean": lambda x: x.mean((2, 3)),
    "means": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_around_the_edges_of_vectors(isa, name, check_network) -> None:
    for size in sizes(isa):
        check_network(Function(POOLS[name]), (3, *size), batches=(2,))
    conv = nn.Conv2d(3, 5, 3, padding=1)  # rows with margins between them, and margins for what follows
    behind = [] if "as a mean" in name else [nn.Conv2d(5, 4, 3, padding=1)]
    check_network(nn.Sequential(conv, Function(POOLS[name]), *behind), (3, 11, 2 * WIDTH[isa] + 5), batches=(2,))


def test_a_nan_wins(isa) -> None:
    x = torch.randn(1, 2, 9, 37)
    x[0, 1, 4, 20] = float("nan")
    for pool in (lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 4, 3, 1)):
        network = Function(pool)
        assert torch.equal(compile(network, x, threads=1)(x).isnan(), network(x).isnan())


def test_softmax_around_the_edges_of_vectors(isa, check_network) -> None:
    w = WIDTH[isa]
    for length in (1, w - 1, w, w + 1, 3 * w + 2):
        for function in (torch.softmax, torch.log_softmax):
            check_network(Function(lambda x, f=function: f(x * 9, -1)), (2, 3, length), batches=(2,))
            check_network(Function(lambda x, f=function: f(x * 9, 1)), (5, 3, length), batches=(2,))
            check_network(Function(lambda x, f=function: f(x * 9, 2)), (5, length, 2), batches=(2,))
        check_network(nn.Softmax(1), (length,), batches=(2,))


def test_softmax_of_large_and_infinite_numbers(isa) -> None:
    x = torch.randn(3, 40)
    x[0] += 1e4
    x[1, :7] = float("-inf")
    x[2, 5:39] = -1e5
    for function in (torch.softmax, torch.log_softmax):
        got = compile(Function(lambda x, f=function: f(x, 1)), x, threads=1)(x)
        expected = function(x.double(), 1)
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-30)


ARITHMETIC = {
    "of tensors": lambda x: (x + 2 * x) * (x - x * x),
    "with rows": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid() + x,
    "with columns": lambda x: x / (2 + x[:, :, :1].sigmoid()) - x[:, :, :, :1],
    "apart": lambda x: (x[:, :, :, ::2] + x[:, :, :, 1::2].tanh()).clamp(-0.2, 0.6),
    "turned": lambda x: F.silu(x.transpose(2, 3)) * x.transpose(2, 3),
    "curved": lambda x: F.gelu(x + x.sigmoid()) + F.hardswish(x) * F.hardsigmoid(x),
}  # fmt: skip


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_around_the_edges_of_vectors(isa, name, check_network) -> None:
    for height, width in sizes(isa):
        check_network(Function(ARITHMETIC[name]), (3, height, width // 2 * 2), batches=(2,))
    check_network(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), Function(ARITHMETIC[name])), (3, 6, 38), batches=(2,))


@pytest.mark.parametrize("name", ["largest 3/2, padded", "mean 3/1, padding counts", "mean of all"])
def test_results_do_not_depend_on_the_number_of_threads(name) -> None:
    x = torch.randn(1, 33, 41, 53)
    results = [compile(Function(POOLS[name]), x, threads=threads)(x) for threads in (1, 2, 3, 4)]
    assert all(torch.equal(results[0], r) for r in results)


def test_a_wrong_pool_is_found(assert_close) -> None:
    x = torch.randn(1, 3, 9, 40)
    got = compile(Function(POOLS["mean 3/1, padding counts"]), x, threads=1)(x)
    assert_close(got, F.avg_pool2d(x.double(), 3, 1, 1))
    with pytest.raises(AssertionError):
        assert_close(got, F.avg_pool2d(x.double(), 3, 1, 1, count_include_pad=False))
