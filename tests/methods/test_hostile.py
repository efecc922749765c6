"""Networks and uses that no method may stumble over: odd dtypes, dead and shared layers, no steps, nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier as es
from espalier.errors import MethodError, PlanError, SchemeError
from espalier.graph import shrink
from espalier.methods import METHODS, Run, get, remove_unused, start
from espalier.sparsity import Plan, scheme

STEPS = 12
SETTINGS = {"magnitude": {"ramp": "cubic"}}


class Shared(nn.Module):
    """One conv at work twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.first(x))))))
        return self.fc(x.mean((2, 3)))


def zeroed() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.zeros_(model[2].weight)
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].weight.requires_grad_(False)
    return model


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "an all-zero layer": (zeroed, (3, 6, 6)),
    "a layer that is not trained": (frozen, (3, 6, 6)),
    "one layer at work twice": (Shared, (3, 6, 6)),
    "grouped": (lambda: pooled(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)), (4, 6, 6)),
    "in one dimension": (lambda: pooled(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 5)), (3, 12)),
    "in three dimensions": (lambda: pooled(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 8, 2)), (2, 6, 6, 6)),
    "one filter": (lambda: pooled(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 8, 1)), (3, 6, 6)),
}


def train(model: nn.Module, run: Run, shape: tuple[int, ...], dtype: torch.dtype, steps: int) -> None:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, *shape, generator=generator).to(dtype)
        out = model(x)
        y = torch.randint(0, out.shape[1], (8,), generator=generator)
        optimizer.zero_grad()
        (F.cross_entropy(out.float(), y) + run.penalty()).backward()
        optimizer.step()
        run.step()


def check(model: nn.Module, run: Run) -> None:
    for target in run.targets:
        weight, mask = target.weight.detach(), run.masks[target.site]
        assert torch.isfinite(weight).all() and not weight[~mask].any(), target.site
        assert not mask.all(), f"{target.site}: nothing was pruned"


@pytest.mark.parametrize(
    "network,name",
    [*((n, "filter+column") for n in NETWORKS), *((n, "micro_block+unify") for n in list(NETWORKS)[:3])],
)
@pytest.mark.parametrize("method", METHODS)
def test_odd_networks(method: str, network: str, name: str) -> None:
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, example = build(), torch.zeros(1, *shape)
    plan = Plan.uniform(name, 0.5, dense=["fc"] if network == "one layer at work twice" else [])
    run = start(model, plan, get(method, **SETTINGS.get(method, {})), example, steps=STEPS)
    assert run.targets
    train(model, run, shape, torch.float32, STEPS)
    run.finish()
    train(model, run, shape, torch.float32, 2)
    if network != "one filter":
        check(model, run)
    remove_unused(run)
    x = torch.randn(2, *shape)
    torch.testing.assert_close(shrink(model.eval(), example)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_other_dtypes(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = pooled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).to(dtype)
    plan = Plan.uniform("filter+column", 0.5)
    run = start(model, plan, get(method, **SETTINGS.get(method, {})), torch.zeros(1, 3, 6, 6).to(dtype), steps=STEPS)
    train(model, run, (3, 6, 6), dtype, STEPS)
    run.finish()
    train(model, run, (3, 6, 6), dtype, 2)
    check(model, run)
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_length_that_cannot_be_is_told(method: str) -> None:
    for steps in (0, -3):
        with pytest.raises(MethodError, match=f"steps is {steps}"):
            start(nn.Linear(4, 4), Plan.uniform("weight", 0.5), method, torch.zeros(1, 4), steps=steps)


@pytest.mark.parametrize("method", METHODS)
def test_more_steps_than_were_told_and_finishing_at_once(method: str) -> None:
    for steps in (0, 3 * STEPS):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        made = get(method, **SETTINGS.get(method, {}))
        run = start(model, Plan.uniform("weight", 0.5), made, torch.zeros(1, 6), steps=STEPS)
        train(model, run, (6,), torch.float32, steps)
        run.finish()
        check(model, run)
        assert run.density() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_that_leaves_everything_dense(method: str) -> None:
    model = nn.Linear(4, 4)
    run = start(model, Plan.of({"*": None}), method, torch.zeros(1, 4), steps=STEPS)
    train(model, run, (4,), torch.float32, 3)
    run.finish()
    assert run.masks == {} and float(run.penalty()) == 0 and run.density() == 1 and run.densities() == []


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_no_numbers_are_told(method: str) -> None:
    model = nn.Linear(4, 4)
    run = start(
        model, {"weight": scheme("weight", 0.5)}, get(method, **SETTINGS.get(method, {})), torch.zeros(1, 4), steps=4
    )
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises((MethodError, SchemeError), match="NaN"):
        for _ in range(4):
            run.step()
        run.finish()


class Hollow(nn.Module):
    """Two of its layers have no width: one makes nothing, the next makes its bias of it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.side = nn.Linear(6, 0), nn.Linear(0, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x)) + self.side(x)


@pytest.mark.parametrize("make,width", [(Hollow, 6), (lambda: nn.Sequential(nn.Linear(0, 5), nn.Linear(5, 3)), 0)])
def test_layers_of_no_width_are_left_alone(make: Callable[[], nn.Module], width: int, tmp_path: Path) -> None:
    model, x = make().eval(), torch.randn(2, width)
    assert all(site.weights for site in es.capture(model, x).sites().values())
    run = start(model, Plan.uniform("column", 0.5), "admm", x, steps=4)
    run.penalty()
    run.step()
    run.finish()
    want = model(x).detach()
    torch.testing.assert_close(shrink(model, x)(x).detach(), want)
    torch.testing.assert_close(torch.as_tensor(es.compile(model, x)(x)), want)
    es.save(model, x, tmp_path / "hollow.esp")
    torch.testing.assert_close(torch.as_tensor(es.load(tmp_path / "hollow.esp")(x)), want)


def test_a_plan_for_a_layer_of_no_width_names_those_that_have_one() -> None:
    with pytest.raises(PlanError, match=r"into.*side"):
        start(Hollow(), Plan.of({"into": scheme("filter", 0.5)}), "admm", torch.randn(2, 6), steps=4)
