"""Fusing changes no output."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espalier.compiler.fuse import fuse
from espalier.compiler.reference import run_fused
from espalier.graph import capture
from espalier.train import ZOO, build
from tests.graph.networks import NETWORKS, Residual, stirred


@pytest.mark.parametrize("kind", NETWORKS)
def test_fused_computes_the_same(kind: type[nn.Module]) -> None:
    model, example = stirred(kind)
    before = copy.deepcopy(model.state_dict())
    graph = fuse(capture(model, example))
    x = torch.randn(3, *kind.shape)
    with torch.no_grad():
        torch.testing.assert_close(run_fused(graph, [x]), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [node for node in graph.nodes if node.op in ("batch_norm", "dropout", "identity")]


def test_a_residual_block_is_two_convs() -> None:
    model, example = stirred(Residual)
    graph = fuse(capture(model, example))
    assert "add" not in [node.op for node in graph.nodes] and "relu" not in [node.op for node in graph.nodes]
    assert sum(len(node.inputs) == 4 for node in graph.nodes) == 4


def test_a_result_with_two_readers_is_not_fused_away() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return F.relu(self.norm(y)), y + y

    model = Model().eval()
    nn.init.uniform_(model.norm.weight)
    x = torch.randn(2, 3, 5, 5)
    graph = fuse(capture(model, x))
    assert "affine" in [node.op for node in graph.nodes]
    with torch.no_grad():
        torch.testing.assert_close(run_fused(graph, [x]), model(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_the_zoo_fuses_to_one_step_per_layer(name: str) -> None:
    model = build(name).eval()
    graph = fuse(capture(model, torch.randn(1, *ZOO[name].shape[:1], 64, 64)))
    layers = [node for node in graph.nodes if node.op in ("conv", "linear")]
    assert len(graph.nodes) - len(layers) <= 4
