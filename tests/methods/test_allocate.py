"""Allocation meets its target, spares what is sensitive, and treats coupled filters as one decision."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import MethodError, PlanError, UnknownNameError
from espalier.graph import capture, shrink
from espalier.methods import allocate, open_plan, start
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
    "name,options,error",
    [
        ("weight+unify", {"r": 2, "c": 4, "free": 0.0}, 0.05),
        ("filter+unify", {"r": 4, "c": 4, "free": 0.0}, 0.1),
        ("pattern+kernel+unify", {"r": 1, "c": 8, "free": 0.0}, 0.3),  # patterns are no chance: all hold the centre
    ],
)
def test_living_blocks_are_counted_as_chance_leaves_them(name: str, options: dict, error: float) -> None:
    """The model's magnitudes against those of random weights, where pruning and blocks do not match."""
    torch.manual_seed(0)
    site = capture(nn.Conv2d(32, 64, 3), torch.zeros(1, 32, 8, 8)).sites()["weight"]
    chosen = scheme(name, 0.2, **options)
    shared = chosen.project(torch.randn(64, 32, 3, 3))
    assert float((shared != 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    flags = sum(len(rule.structure.group_sizes(torch.Size(site.shape))) for rule in chosen.rules)
    patterns = 0.45 * 64 * 32 * (3 - 1) if "pattern" in name else 0  # bits: not flags, but an index
    magnitudes = (8 * size_bytes(site, chosen) - flags - patterns - 0.2 * site.weights) / 32
    assert magnitudes == pytest.approx(len(shared[shared != 0].abs().unique()), rel=error)


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


def test_a_sensitivity_serves_another_target() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(64, 3, 8, 8)
    graph, loss, asked = capture(model, EXAMPLE), change(model, x), []

    def counted() -> float:
        asked.append(1)
        return loss()

    first = allocate(graph, loss, 0.3, kind="macs")
    again = allocate(graph, counted, 0.5, kind="macs", sensitivity=first.sensitivity)
    assert len(asked) == 1 and again == allocate(graph, loss, 0.5, kind="macs")
    assert again.predicted > first.predicted
    with pytest.raises(PlanError, match=r"does not know .*another network or scheme"):
        allocate(graph, loss, 0.5, sensitivity={})


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


def unified(target: float, **options: float) -> tuple[dict[str, tuple | None], float]:
    """Each site's density and its unified blocks under a size target; two of the layers hold equal magnitudes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        for k, block in ((0, (2, 4)), (2, (1, 8))):  # single outliers, and blocks of one magnitude each
            rows, columns = model[k].weight.shape
            tied = torch.rand(rows // block[0], columns // block[1]).repeat_interleave(block[0], 0)
            model[k].weight.mul_(0).add_(tied.repeat_interleave(block[1], 1) * torch.randn(rows, columns).sign())
    x = torch.randn(128, 32)
    made = allocate(capture(model, x[:1]), change(model, x), target, "micro_block+unify", "bytes", **options)
    assert made.predicted <= made.requested
    run = start(model, made.plan, "magnitude", x[:1])
    run.finish()
    sites = run.graph.sites()
    held = {t.site: t.scheme for t in run.targets}
    assert sum(size_bytes(sites[s], held.get(s)) for s in sites) == pytest.approx(made.predicted)
    blocks = {
        e.match: e.scheme and tuple(e.scheme.options.get(f"unify.{key}") for key in ("r", "c", "free"))
        for e in made.plan.entries
    }
    return blocks, made.predicted


def test_a_size_target_chooses_blocks_and_shares_of_unification() -> None:
    blocks, _ = unified(0.3)
    assert blocks["0.weight"] == (2, 4, 0.0) and blocks["2.weight"] == (1, 8, 0.0)  # what the layers hold
    assert unified(0.95)[0]["4.weight"] in (None, (None, None, None))  # nothing is unified that need not be
    with pytest.raises(PlanError, match="cannot be reached"):
        unified(0.001)


def test_blocks_given_by_hand_are_kept() -> None:
    blocks, _ = unified(0.3, **{"unify.r": 1, "unify.c": 4, "unify.free": 0.25})
    assert set(blocks.values()) == {(1, 4, 0.25)}


def test_patterns_are_judged_as_the_patterns_they_are() -> None:
    """Between dense and the density of the patterns there is nothing: no layer gets them as if they cost nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
    example = torch.randn(4, 3, 8, 8)
    made = allocate(capture(model, example), change(model, example), 0.95, "pattern+kernel")
    kept = sorted(1.0 if e.scheme is None else e.scheme.density for e in made.plan.entries)
    assert kept == [pytest.approx(4 / 9), 1.0]  # one of both suffices
    assert [at.density for at in made.sensitivity["0.weight"]][:2] == [1.0, pytest.approx(4 / 9)]


class Odd(nn.Module):
    """A depthwise conv, and a weight that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.register_buffer("fixed", torch.randn(8, 8, 1, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.conv2d(self.deep(self.first(x)), self.fixed).mean((2, 3)))


def test_an_open_plan_leaves_alone_what_cannot_be_pruned() -> None:
    graph = capture(Odd(), EXAMPLE)
    schemes = {e.match: e.scheme and (e.scheme.name, e.scheme.density) for e in open_plan(graph).entries}
    both, column = ("filter+column", 1.0), ("column", 1.0)
    assert schemes == {"first.weight": both, "deep.weight": None, "fixed": None, "fc.weight": column}
    assert allocate(graph, lambda: 0.0, 0.9).plan.resolve(graph.sites())  # nor does allocation touch them
    with pytest.raises(PlanError, match="no layer"):
        open_plan(capture(nn.Linear(4, 4), torch.zeros(1, 4)), "pattern")
    with pytest.raises(UnknownNameError, match="did you mean"):
        open_plan(graph, "colum")


def test_a_network_that_makes_no_numbers_is_told_and_one_that_breaks_on_the_way_is_no_reason_to_stop() -> None:
    torch.manual_seed(0)
    model = Residual()
    graph, x = capture(model, EXAMPLE), torch.randn(8, 3, 8, 8)
    with pytest.raises(MethodError, match="loss is nan"):
        allocate(graph, lambda: float("nan"), 0.5)
    fine = change(model, x)

    def breaks() -> float:
        return math.inf if not model.stem.weight.flatten(1).any(1).all() else fine()

    made = allocate(graph, breaks, 0.6, "filter")
    kept = {e.match: 1.0 if e.scheme is None else e.scheme.density for e in made.plan.entries}
    assert kept["stem.weight"] == 1.0 and made.predicted <= 0.6


def test_what_cannot_be_is_said() -> None:
    graph = capture(Residual(), EXAMPLE)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(PlanError, match="above 0"):
            allocate(graph, lambda: 0.0, wrong)
    with pytest.raises(PlanError, match="cannot be reached"):
        allocate(graph, lambda: 0.0, 1e-5)
    with pytest.raises(UnknownNameError, match="Known"):
        allocate(graph, lambda: 0.0, 0.5, kind="flops")
