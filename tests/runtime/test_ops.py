"""Every op that the engine runs against PyTorch in float64, in each instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from espalier.runtime.executable import compile

CONVS = [
    # in, out, window, stride, padding, dilation, conv_groups, size
    (3, 8, 3, 1, 1, 1, 1, (9, 11)),
    (5, 7, 1, 1, 0, 1, 1, (7, 7)),
    (4, 9, 1, 2, 0, 1, 1, (8, 7)),
    (4, 6, 3, 2, 1, 1, 1, (15, 16)),
    (3, 16, 7, 2, 3, 1, 1, (33, 31)),
    (4, 4, 3, 1, 0, 1, 1, (12, 12)),
    (4, 4, 5, 1, 4, 2, 1, (12, 10)),
    (4, 4, 3, 3, 1, 2, 1, (20, 17)),
    (6, 6, 3, 1, 1, 1, 6, (14, 14)),
    (6, 12, 3, 2, 1, 1, 6, (14, 13)),
    (8, 12, 3, 1, 1, 1, 4, (7, 7)),
    (8, 8, 5, 2, 2, 1, 2, (11, 11)),
    (6, 10, (1, 7), 1, (0, 3), 1, 1, (17, 17)),
    (6, 10, (7, 1), (1, 2), (3, 0), (2, 1), 1, (17, 17)),
    (6, 10, 4, 4, 0, 1, 1, (16, 16)),
    (6, 10, 5, 1, 0, 1, 1, (5, 5)),
    (6, 10, 3, 1, 1, 1, 1, (1, 1)),
    (6, 10, 3, 2, 2, 1, 2, (1, 2)),
    (3, 5, 3, 1, 5, 1, 1, (3, 4)),
]


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_convolutions(isa, case, check_network) -> None:
    i, o, window, stride, padding, dilation, groups, size = case
    check_network(nn.Conv2d(i, o, window, stride, padding, dilation, groups), (i, *size))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_convolution(data) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    i, o = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 9))
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    window, stride, padding, dilation = pair(1, 5), pair(1, 3), pair(0, 3), pair(1, 2)
    size = tuple(draw(st.integers(max(1, d * (w - 1) + 1 - 2 * p), 20)) for w, p, d in zip(window, padding, dilation))
    conv = nn.Conv2d(i, o, window, stride, padding, dilation, groups, bias=draw(st.booleans())).requires_grad_(False)
    conv.weight *= torch.rand_like(conv.weight) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    x = torch.randn(2, i, *size)
    got, expected = compile(conv, x, threads=2)(x), conv.double()(x.double())
    assert (got - expected).abs().max() <= 1e-4 * max(1e-6, expected.abs().max())


@pytest.mark.parametrize("kind", ["block", "row", "column", "weight", "none"])
def test_convolutions_with_zeros(isa, kind, check_network) -> None:
    conv = nn.Conv2d(16, 24, 3, padding=1).requires_grad_(False)
    shape = {"block": (3, 1, 4, 1, 3, 3), "row": (24, 1, 1, 1, 1, 1), "column": (1, 1, 16, 1, 3, 3)}.get(kind)
    if shape is None:
        mask = torch.rand_like(conv.weight) < (0.1 if kind == "weight" else 0.0)
    else:
        fits = (torch.rand(shape) < 0.3).expand(shape[0], 24 // shape[0], shape[2], 16 // shape[2], *shape[4:])
        mask = fits.reshape(24, 16, *shape[4:]).expand(24, 16, 3, 3)
    conv.weight *= mask
    check_network(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(24, 4, 1)), (16, 13, 13))


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.3, 0.7),
    nn.LeakyReLU(0.1),
    nn.ELU(0.7),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: repr(a).lower())
def test_activations(isa, activation, check_network) -> None:
    class Wide(nn.Module):
        def forward(self, x):
            return activation(x * 8), activation(x * 100), activation(x * 1e-3)

    check_network(Wide(), (3, 5, 7))
    check_network(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), activation), (3, 5, 7))
    check_network(nn.Sequential(nn.Linear(9, 21), activation), (9,))


class Function(nn.Module):
    def __init__(self, function, *modules) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x):
        return self.function(self, x)


OPS = {
    "max pool": lambda m, x: F.max_pool2d(x, 2),
    "max pool, padded": lambda m, x: F.max_pool2d(x, 3, 2, 1),
    "max pool, ceil": lambda m, x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max pool, dilated": lambda m, x: F.max_pool2d(x, (2, 3), (1, 2), (1, 1), 2),
    "avg pool": lambda m, x: F.avg_pool2d(x, 3, 2, 1),
    "avg pool, image only": lambda m, x: F.avg_pool2d(x, (3, 2), 2, 1, count_include_pad=False),
    "avg pool, ceil": lambda m, x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, (3, 4)),
    "global": lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "mean": lambda m, x: x.mean((2, 3)),
    "mean, kept": lambda m, x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "mean, rows": lambda m, x: x.flatten(2).mean(2),
    "arithmetic": lambda m, x: (x + 2 * x - x / 3) * x / (x * x + 1) - 1.5,
    "broadcast": lambda m, x: x * m.scale + m.scale,
    "softmax": lambda m, x: (x.softmax(1), x.softmax(-1), F.log_softmax(x, 2), x.flatten(1).softmax(1)),
    "concat": lambda m, x: torch.cat([x.relu(), x, (x * 2).sigmoid()], 1),
    "concat, rows": lambda m, x: torch.cat([x.relu(), x], 2),
    "slices": lambda m, x: torch.cat([x[:, 3:], x[:, :3] * 2, x[:, ::2]], 1),
    "strides": lambda m, x: x[:, ::2, 1:, :-2].relu() + x[:, 1::2, :-1, 2:],
    "expand": lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 5).relu(),
    "split": lambda m, x: [part.relu() for part in x.split([1, 2, 3], 1)],
    "pad": lambda m, x: F.pad(x.relu(), (1, 2, 0, 3), value=0.5),
    "pad channels": lambda m, x: F.pad(x.relu(), (0, 0, 0, 0, 1, 2), value=0.5),
    "pad channels behind": lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 3)),
    "permute": lambda m, x: x.permute(0, 2, 3, 1).relu().reshape(x.shape[0], -1),
    "shuffle": lambda m, x: x.reshape(x.shape[0], 2, 3, *x.shape[2:]).transpose(1, 2).flatten(1, 2).relu(),
    "flatten": lambda m, x: (x * 2).flatten(1),
    "turned": lambda m, x: x.transpose(2, 3).relu(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_ops(name, isa, check_network) -> None:
    check_network(Function(OPS[name]), (6, 10, 11))


@pytest.mark.parametrize("name", OPS)
def test_ops_between_convolutions(name, check_network) -> None:
    """The same behind a padded layout and, where they give planes, before one."""
    front = nn.Conv2d(3, 6, 3, padding=1)
    with torch.no_grad():
        probe = Function(OPS[name])(torch.randn(1, 6, 10, 11))
    if not isinstance(probe, torch.Tensor) or probe.ndim != 4:
        check_network(nn.Sequential(front, nn.ReLU(), Function(OPS[name])), (3, 10, 11))
        return
    behind = nn.Conv2d(probe.shape[1], 5, 3, padding=1)
    net = nn.Sequential(front, nn.Conv2d(6, 6, 3, padding=2, dilation=2), Function(OPS[name]), behind)
    check_network(net, (3, 10, 11))


def test_linear_layers(isa, check_network) -> None:
    check_network(nn.Linear(33, 17), (33,))
    check_network(nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 12, bias=False)), (7, 12))
    check_network(nn.Linear(12, 5), (3, 4, 12))
    check_network(nn.Sequential(nn.Linear(9, 30), nn.BatchNorm1d(30), nn.Dropout(), nn.Linear(30, 2)), (9,))
    residual = Function(lambda m, x: x + m.inner[1](m.inner[0](x).relu()), nn.Linear(8, 24), nn.Linear(24, 8))
    check_network(residual, (8,))
    check_network(residual, (5, 8))


def test_one_dimensional_convolutions(isa, check_network) -> None:
    layers = [nn.Conv1d(4, 8, 5, 2, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2)]
    check_network(
        nn.Sequential(*layers, nn.BatchNorm1d(8), nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(24, 3)), (4, 50)
    )
