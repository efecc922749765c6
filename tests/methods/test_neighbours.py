"""Schemes whose neighbours lose whole channels choose from what those leave."""

import pytest
import torch
from torch import Tensor, nn

import espalier as es
from espalier.graph import needed
from espalier.mapping.layers import layers
from espalier.mapping.probe import Probe

EXAMPLE = torch.zeros(1, 8, 6, 6)
SCHEMES = {
    "expand": es.scheme("block_column", 0.3, m=4),
    "depthwise": es.scheme("filter", 0.125),
    "project": es.scheme("block_column", 0.125, m=4),
}


class Block(nn.Module):
    """An inverted residual, its middle channels alike: each layer on its own keeps others of them."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.first = nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.depthwise, self.second = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64)
        self.project, self.last = nn.Conv2d(64, 8, 1, bias=False), nn.Linear(8, 4)
        for norm in (self.first, self.second):
            nn.init.uniform_(norm.bias, 0.5, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.second(self.depthwise(torch.relu(self.first(self.expand(x))))))
        return self.last((x + self.project(inner)).mean((2, 3)))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def test_what_nobody_misses(block: Block) -> None:
    graph = es.capture(block, EXAMPLE)
    cut = block.depthwise.weight.detach().clone()
    cut[:5] = 0
    found = needed(graph, {"depthwise.weight": cut})
    assert not found["expand.weight"][:5].any() and found["expand.weight"][5:].all()
    assert not found["project.weight"][:, :5].any() and found["project.weight"][:, 5:].all()
    assert not found["depthwise.weight"][:5].any() and found["last.weight"].all()
    assert all(mask.all() for mask in needed(graph, {}).values())


def test_neighbours_of_a_narrow_depthwise_conv_keep_its_channels(block: Block) -> None:
    run = es.start(block, es.Plan.of(SCHEMES, unfit="dense"), "magnitude", EXAMPLE)
    run.finish()
    living = run.masks["depthwise.weight"].flatten(1).any(1)
    assert int(living.sum()) == 8
    read, made = run.masks["project.weight"].flatten(1).any(0), run.masks["expand.weight"].flatten(1).any(1)
    assert torch.equal(read, living) and bool(made[living].all())
    assert {d.site: round(d.achieved, 3) for d in run.densities()}["project.weight"] == 0.125  # as was asked
    x = torch.randn(4, *EXAMPLE.shape[1:])
    with torch.no_grad():
        assert float(block(x).std(0).min()) > 1e-3  # all answers depend on the input
        small = es.shrink(block, EXAMPLE)
        assert small.depthwise.weight.shape[0] == 8 and torch.allclose(small(x), block(x), atol=1e-5)


def test_a_measured_plan_keeps_them_too(block: Block) -> None:
    graph = es.capture(block, EXAMPLE)
    variant = Probe(graph, layers(graph)).variant(es.Plan.of(SCHEMES, unfit="dense").resolve(graph.sites()), own=True)
    assert variant.tensors["depthwise.weight"].shape[0] == 8
    assert float((variant.tensors["project.weight"] != 0).float().mean()) == 1.0


def test_columns_are_chosen_from_what_filters_leave() -> None:
    """Filters of the first conv go by their size; the largest columns of the second read one of those."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 3))
    with torch.no_grad():
        net[0].weight[:4] *= 0.1
        net[2].weight[:, :4] *= 10
    schemes = {"0": es.scheme("filter", 0.5), "2": es.scheme("column", 0.5)}
    run = es.start(net, es.Plan.of(schemes, unfit="dense"), "magnitude", torch.zeros(1, 2, 6, 6))
    run.finish()
    assert not run.masks["2.weight"][:, :4].any() and run.masks["2.weight"][:, 4:].all()
