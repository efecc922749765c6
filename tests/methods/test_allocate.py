"""Allocation meets its target, spares what is sensitive, and treats coupled filters as one decision."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import PlanError, UnknownNameError
from espalier.graph import capture, shrink
from espalier.methods import allocate, start
from espalier.report import size
from espalier.sparsity import scheme, size_bytes
from espalier.train import build


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.fc(F.relu(x + self.b(F.relu(self.a(x)))).mean((2, 3)))


EXAMPLE = torch.zeros(1, 3, 8, 8)


def change(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """How far the outputs are from what they were."""
    want = model(x).detach()
    return lambda: float((model(x) - want).detach().square().mean())


def test_size_model_counts_flags_signs_and_magnitudes() -> None:
    site = capture(nn.Linear(8, 8), torch.zeros(1, 8)).sites()["weight"]
    assert size_bytes(site, None) == 8 * 8 * 4
    assert size_bytes(site, scheme("filter", 0.5)) == (32 * 32 + 8) / 8
    assert size_bytes(site, scheme("unify", r=1, c=4, free=0.0)) == (16 * 32 + 64 + 16) / 8
    both = scheme("micro_block+unify", 0.5, **{"micro_block.c": 4, "unify.c": 4, "unify.free": 0.0})
    assert size_bytes(site, both) == (8 * 32 + 32 + 16 + 16) / 8
    assert size_bytes(site, scheme("n_m")) == (32 * 32 + 16 * math.log2(6)) / 8


@pytest.mark.parametrize(
    "kind,target", [("density", 0.3), ("macs", 0.3), ("macs", 80_000), ("weights", 2000), ("bytes", 0.25)]
)
def test_the_target_is_met(kind: str, target: float) -> None:
    torch.manual_seed(0)
    model = Residual()
    x = torch.randn(64, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = allocate(capture(model, EXAMPLE), change(model, x), target, kind=kind)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert 0.8 * made.requested <= made.predicted <= made.requested
    run = start(model, made.plan, "magnitude", EXAMPLE)
    run.finish()
    counted = size(capture(model, EXAMPLE))
    got = {"density": counted.density, "weights": counted.nonzero, "macs": counted.useful_macs}.get(
        kind, made.predicted
    )
    assert got == pytest.approx(made.predicted, rel=0.15)  # groups are whole


def test_what_is_sensitive_is_spared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(128, 32)
    with torch.no_grad():
        model[2].weight.copy_(torch.diag(torch.ones(64)) + 1e-3 * torch.randn(64, 64))  # 63 of 64 weights do nothing
    made = allocate(capture(model, x[:1]), change(model, x), 0.5, "weight")
    kept = {e.match: 1.0 if e.scheme is None else e.scheme.density for e in made.plan.entries}
    assert kept["2.weight"] < 0.2 < 0.7 < min(kept["0.weight"], kept["4.weight"])


def test_coupled_filters_go_together_so_that_channels_go() -> None:
    torch.manual_seed(0)
    model = build("resnet20")
    example = torch.zeros(1, 3, 32, 32)
    graph = capture(model, example)
    made = allocate(graph, change(model, torch.randn(16, 3, 32, 32)), 0.4, "filter", densities=(0.5, 0.2))
    shares = {e.match: e.scheme.density if e.scheme else 1.0 for e in made.plan.entries}
    stage = ["conv1.weight", "layer1.0.conv2.weight", "layer1.1.conv2.weight", "layer1.2.conv2.weight"]
    assert len({shares[s] for s in stage}) == 1
    start(model, made.plan, "magnitude", example).finish()
    small = shrink(model.eval(), example)
    assert size(capture(small, example)).weights < 0.6 * size(graph).weights


def test_what_cannot_be_is_said() -> None:
    graph = capture(Residual(), EXAMPLE)
    with pytest.raises(PlanError, match="cannot be reached"):
        allocate(graph, lambda: 0.0, 0.001)
    with pytest.raises(UnknownNameError, match="Known"):
        allocate(graph, lambda: 0.0, 0.5, kind="flops")
