"""Stripes: large random weights are packed once, and run as if they were packed as a whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import espalier as es
from espalier.compiler.blocks import choosing
from espalier.compiler.formats import unpack
from espalier.graph.interpret import run
from espalier.graph.ir import Site
from espalier.mapping import stripes as stripes_module
from espalier.mapping.candidates import POINTWISE, Candidate, find
from espalier.mapping.clock import _programs
from espalier.mapping.layers import layers
from espalier.mapping.probe import Probe
from espalier.mapping.stripes import packed_once, repeated, stripes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers count as large from 4000 weights on."""
    monkeypatch.setattr(stripes_module, "LARGE", 4_000)
    monkeypatch.setattr(stripes_module, "_LEAST", 500)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.one, self.two, self.last = nn.Linear(128, 96), nn.Linear(96, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.last(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


def test_large_weights_are_made_of_equal_stripes() -> None:
    assert stripes(Site("fc6", "linear", (4096, 9216))) == 64
    assert stripes(Site("fc8", "linear", (1000, 4096))) == 1  # its rows make no whole blocks
    assert stripes(Site("small", "linear", (512, 512))) == stripes(Site("g", "conv", (4096, 4096), 2)) == 1
    torch.manual_seed(0)
    stripe = torch.randn(3, 2, 1, 1)
    assert torch.equal(repeated(stripe, 4), torch.cat([stripe] * 4))


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("candidate", POINTWISE, ids=lambda c: c.label)
def test_what_is_packed_once_is_the_matrix(small: None, candidate: Candidate, density: float) -> None:
    torch.manual_seed(0)
    matrix = repeated(candidate.at(density).project(torch.randn(32, 200)), 4).numpy()
    choice = packed_once(matrix, "linear")
    assert choice is not None and np.array_equal(unpack(choice.blocks), matrix)
    assert sorted(choice.blocks.row_order[choice.blocks.row_order >= 0]) == list(range(128))


def test_own_weights_are_packed_as_they_are(small: None) -> None:
    torch.manual_seed(0)
    own = torch.randn(128, 200)
    assert packed_once(own.numpy(), "linear") is None
    nearly = repeated(own[:32], 4)
    nearly[-1, -1] += 1
    assert packed_once(nearly.numpy(), "linear") is None
    assert packed_once(repeated(own[:2, :4], 2).numpy(), "linear") is None  # too small to be worth it


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("label", ["weight", "column", "filter", "block_punched m=8 n=4"])
def test_a_network_of_stripes_computes_what_it_says(small: None, label: str, own: bool) -> None:
    """And is packed in stripes, also where shrinking has taken rows and columns out of them."""
    torch.manual_seed(0)
    graph = es.capture(Net().eval(), torch.zeros(1, 3, 6, 6))
    probe = Probe(graph, layers(graph))
    wanted = {site: find(label).at(0.3) for site in ("one.weight", "two.weight")}
    made = probe.variant(wanted, own=own)
    asked: list[bool] = []

    def noted(matrix: np.ndarray, op: str):
        asked.append(packed_once(matrix, op) is not None)

    with choosing(noted):
        es.Executable(replace(made), 1)
    assert any(asked)
    (program,) = _programs(made, 1, 1)
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(program(x), run(made, [x]), atol=1e-4)
    assert own or 0.2 < made.tensors["one.weight"].count_nonzero() / (96 * 128) < 0.4


def test_equal_layers_share_their_weights() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 3))
    graph = es.capture(net, torch.zeros(1, 4, 8, 8))
    probe = Probe(graph, layers(graph))
    made = probe.variant({site: find("weight").at(0.5) for site in ("0.weight", "1.weight")})
    assert made.tensors["0.weight"] is made.tensors["1.weight"]
    assert int(made.tensors["0.weight"].count_nonzero()) == 72 and made.tensors["2.weight"].all()
    assert probe.variant({}).tensors["0.weight"].all()
