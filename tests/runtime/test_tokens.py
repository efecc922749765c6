"""Ops over tokens and up-sampling against float64, on every instruction set, around the edges of vectors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from espalier.runtime.executable import compile

WIDTH = {"avx512": 16, "avx2": 8, "baseline": 4}


class Function(nn.Module):
    def __init__(self, function, *modules) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, *x):
        return self.function(self, *x)


def kernels(executable) -> set[str]:
    return {row.kernel.split("/")[0] for row in executable.describe()}


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_linear_layers_over_tokens(isa, check_network, density) -> None:
    for tokens in (max(4, WIDTH[isa] - 1), WIDTH[isa], WIDTH[isa] + 1, 6 * WIDTH[isa] + 3):
        layers = [nn.Linear(19, 33), nn.GELU(), nn.Linear(33, 19, bias=False)]
        with torch.no_grad():
            for layer in (layers[0], layers[2]):
                layer.weight.mul_(torch.rand_like(layer.weight) < density)
        executable = check_network(Function(lambda m, x: x + m.inner[0](x), nn.Sequential(*layers)), (tokens, 19))
        assert "conv" in kernels(executable)  # not token by token


@pytest.mark.parametrize("shape", [(3, 4, 12), (5, 12), (2, 3, 4, 12), (2, 12)])
def test_linear_layers_over_other_dimensions(check_network, shape) -> None:
    check_network(nn.Sequential(nn.Linear(12, 7), nn.LayerNorm(7), nn.Linear(7, 5)), shape)


def test_linear_layers_over_pixels(check_network) -> None:
    """As in ConvNeXt: channels last between convolutions whose planes have margins."""

    def block(m, x):
        y = m.inner[0](x).permute(0, 2, 3, 1)
        y = m.inner[3](F.gelu(m.inner[2](m.inner[1](y)))).permute(0, 3, 1, 2)
        return m.inner[4](x + y)

    parts = [nn.Conv2d(6, 6, 7, padding=3, groups=6), nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)]
    check_network(Function(block, *parts, nn.Conv2d(6, 4, 3, padding=1)), (6, 9, 10))


@pytest.mark.parametrize("width", [1, 7, 16, 65])
def test_norms_and_softmax(isa, check_network, width) -> None:
    for tokens in (1, WIDTH[isa] - 1, WIDTH[isa], WIDTH[isa] + 1):
        norm = nn.LayerNorm(width)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

        def function(m, x):
            y = m.inner[0](x)
            return (
                m.inner[1](y),
                F.layer_norm(x * 3, (x.shape[-1],)),
                y.softmax(-1),
                (x * 9).log_softmax(-1),
                y.softmax(1),
            )

        if width > 1:
            check_network(Function(function, nn.Linear(width, width), norm), (tokens, width))
        else:
            check_network(Function(lambda m, x: x.softmax(1) + x.softmax(-1)), (tokens, width))


@pytest.mark.parametrize("tokens,others", [(1, 1), (7, 16), (16, 7), (17, 33), (48, 49)])
def test_products_of_activations(isa, check_network, tokens, others) -> None:
    check_network(Function(lambda m, x, y: x @ y), (tokens, 9), (9, others))
    check_network(Function(lambda m, x, y: (x @ y.transpose(-1, -2)).softmax(-1) @ y), (3, tokens, 8), (3, others, 8))


def attend(**options):
    return Function(lambda m, q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **options))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_attention(isa, check_network, tokens) -> None:
    shape, other = (2, tokens, 8), (2, 5, 8)
    check_network(attend(), shape, other, other)
    check_network(attend(scale=0.3), shape, shape, shape)
    check_network(attend(is_causal=True), shape, shape, shape)
    check_network(attend(), shape, other, other, (1, tokens, 5))
    constant = torch.randn(tokens, 5)
    fixed = Function(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, constant.to(q.dtype)))
    check_network(fixed, shape, other, other)


def test_pytorchs_own_attention(check_network) -> None:
    for batch_first in (True, False):
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=batch_first, norm_first=batch_first)
        if batch_first:
            check_network(layer, (7, 12))
        else:
            check_network(Function(lambda m, x: m.inner[0](x.transpose(0, 1)).transpose(0, 1), layer), (7, 12))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    check_network(Function(lambda m, x: m.inner[0](x, x, x, need_weights=False)[0], attention), (6, 8))


def test_samples_are_not_mixed_up(check_network) -> None:
    """What looks like a movement of the batch but takes numbers of one sample to another runs through PyTorch."""
    mixing = Function(lambda m, x: x.transpose(0, 1).reshape(x.shape) * 2)
    executable = check_network(mixing, (3, 4), native=False, batches=(2,))
    assert executable.fallbacks
    turned = Function(lambda m, x: (m.inner[0](x.permute(2, 0, 1)) * 2).relu().permute(1, 0, 2), nn.Linear(5, 3))
    check_network(turned, (5, 7))


@pytest.mark.parametrize("width", [5, 8, 16, 17])
def test_up_sampling(isa, check_network, width) -> None:
    for options in (
        {"scale_factor": 2},
        {"scale_factor": (1.5, 3), "recompute_scale_factor": False},
        {"size": (7, 31)},
        {"size": (3, 3)},
        {"scale_factor": 2, "mode": "bilinear"},
        {"size": (9, 20), "mode": "bilinear", "align_corners": True},
        {"size": (1, 1), "mode": "bilinear", "align_corners": True},
        {"scale_factor": 1.7, "mode": "bilinear"},
    ):
        check_network(Function(lambda m, x, o=options: F.interpolate(x, **o)), (3, 4, width))
    between = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3, padding=1))
    check_network(between, (3, 6, width))
    check_network(nn.Upsample(scale_factor=2, mode="linear"), (3, width))


@pytest.mark.parametrize(
    "window,stride,padding,extra", [(2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0), (3, 1, 1, 0), (5, 3, 2, 1)]
)
def test_transposed_convolutions(isa, check_network, window, stride, padding, extra) -> None:
    layer = nn.ConvTranspose2d(5, 6, window, stride, padding, extra)
    check_network(nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)), (5, 7, 9))


def test_other_transposed_convolutions_run_through_pytorch(check_network) -> None:
    for layer in (nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3, 2, dilation=2)):
        assert "transposed" in check_network(layer, (4, 5, 5), native=False).fallbacks[0]


def test_pixel_shuffle(check_network) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 18, 3, padding=1), nn.PixelShuffle(3), nn.Conv2d(2, 4, 3, padding=1))
    check_network(layers, (3, 5, 6))


def test_a_constant_among_what_is_joined() -> None:
    """At a batch of one, a repeated token is a constant."""
    token = nn.Parameter(torch.randn(1, 1, 6))
    joined = Function(
        lambda m, x: torch.cat([token.expand(1, -1, -1), m.inner[0](x).view(1, 5, 6)], 1), nn.Linear(6, 6)
    )
    x = torch.randn(1, 5, 6)
    executable = compile(joined, x, threads=1)
    assert executable.fallbacks == ()
    torch.testing.assert_close(executable(x), joined(x))


def test_compiling_in_inference_mode() -> None:
    layer, x = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval(), torch.randn(2, 5, 12)
    with torch.inference_mode():
        torch.testing.assert_close(compile(layer, x, threads=1)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_weights_that_are_computed(check_network) -> None:
    check_network(weight_norm(nn.Linear(9, 5)), (9,))
    check_network(nn.Sequential(weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU()), (3, 8, 8))
    assert compile(weight_norm(nn.Linear(9, 5)).eval(), torch.randn(2, 9)).fallbacks == ()
