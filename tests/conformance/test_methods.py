"""Every method with every scheme: it lands in the plan, its penalty has the gradient it says, and a stopped run goes on
bit for bit."""

import copy
import io
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from tests.methods import networks
from tests.methods.networks import EXAMPLE
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import MethodError, UnknownNameError
from espalier.graph import Graph, capture
from espalier.methods import METHODS, Method, Run, get, start
from espalier.methods.base import Progress, State, pull
from espalier.methods.targets import Target
from espalier.sparsity import CATALOG, Frozen, Plan, Scheme, ceiling, scheme

STEPS = 24
SCHEMES = [*CATALOG, "filter+column", "pattern+kernel", "weight+unify"]
# Every method, and those of its settings that take another way through its code.
CASES: dict[str, Method] = {name: get(name) for name in METHODS} | {
    "magnitude, jump": get("magnitude", ramp="jump"),
    "magnitude, taylor": get("magnitude", ramp="linear", score="taylor"),
    "magnitude, l1, regrow": get("magnitude", ramp="cubic", score="l1", regrow=True),
    "magnitude, batch_norm": get("magnitude", score="batch_norm"),
    "structure_parameters, l1": get("structure_parameters", kind="l1"),
    "structure_parameters, fixed": get("structure_parameters", kind="fixed"),
}
FINDERS = [name for name in CASES if name in ("primal_proximal", "reweighted", "structure_parameters")]
train = partial(networks.train, end=STEPS)


class Net(nn.Module):
    """conv2 and conv3 meet in an add: their filters are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.fc(F.relu(x + self.conv3(F.relu(x))).mean((2, 3)))


@cache
def prototype() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.norm2.weight, 0.5, 1.5)
    return model, capture(model, EXAMPLE)


def asked(name: str, found: bool = False) -> Scheme:
    if found or (name in CATALOG and CATALOG[name].own):
        return scheme(name)
    return scheme(name, 0.2 if "pattern" in name else 0.25)


def begin(method: str | Method, name: str, sites: tuple[str, ...] = ("conv2",), found: bool = False, seed: int = 0):
    model, graph = copy.deepcopy(prototype())
    if seed:
        for tensor in model.parameters():
            nn.init.normal_(tensor, std=0.1)
    plan = Plan.of({site: asked(name, found) for site in sites}, unfit="dense").resolve(graph.sites())
    run = Run(graph, plan, CASES[method] if isinstance(method, str) else method, STEPS)
    return model, run, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def check_lands(method: str | Method, name: str) -> None:
    model, run, optimizer = begin(method, name)
    train(model, run, optimizer, 0, STEPS)
    (target,) = run.targets
    weight = target.weight.detach().clone()
    torch.testing.assert_close(target.scheme.project(weight), weight)
    mask = run.masks["conv2.weight"]
    assert not weight[~mask].any()
    if target.scheme.density < ceiling(target.scheme) or ceiling(target.scheme) < 1:
        group = max(float(r.structure.group_sizes(weight.shape).max()) for r in target.scheme.rules) / weight.numel()
        assert float(mask.float().mean()) <= target.scheme.density + group + 0.02
    (row,) = run.densities()
    assert row.requested == target.scheme.density or (row.requested is None and target.scheme.density == 1)
    train(model, run, optimizer, STEPS, STEPS + 3)
    assert not target.weight.detach()[~mask].any(), "retraining left the support"
    assert not torch.equal(target.weight.detach(), weight), "retraining changed nothing"


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("method", CASES)
def test_finish_lands_in_the_plan_and_retraining_stays_there(method: str, name: str) -> None:
    check_lands(method, name)


@dataclass(frozen=True)
class Careless(Method):
    """The broken method: it hands over a support that is not the scheme's, and its penalty has another gradient."""

    def begin(self, targets: list[Target], progress: Progress) -> State:
        return {}

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor:
        (target,) = targets
        return pull([target.weight], [target.weight.detach()], target.weight.detach().square().sum())

    def step(self, targets: list[Target], state: State, progress: Progress) -> None: ...

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        return {t.site: Frozen(torch.rand(t.weight.shape) < 0.9) for t in targets}


def test_a_method_that_does_not_land_is_found() -> None:
    with pytest.raises(AssertionError):
        check_lands(Careless(), "filter")


@pytest.mark.parametrize("name", ["column", "filter+column", "block_punched", "weight", "pattern+kernel"])
@pytest.mark.parametrize("method", FINDERS)
def test_without_a_density_the_method_finds_one(method: str, name: str) -> None:
    strong = {"primal_proximal": {"threshold": 1.2}, "reweighted": {"strength": 2.0, "threshold": 0.9}}
    made = replace(CASES[method], **strong.get(method, {"decay": 1.0, "eps": 0.9}))
    model, run, optimizer = begin(made, name, found=True)
    train(model, run, optimizer, 0, STEPS)
    (row,) = run.densities()
    assert row.requested is None and 0 < row.achieved < (4 / 9 if "pattern" in name else 1)
    weight = run.targets[0].weight.detach()
    for lane in run.targets[0].lanes():
        if lane.open:
            assert (lane.sum(weight.abs()) == 0).any(), "no whole group died"
    assert run.masks["conv2.weight"].any()


def check_gradient(run: Run) -> bool:
    """The gradient of the penalty against its difference along a line, in float64 values of float32 weights."""
    (target,) = run.targets
    target.weight.grad = None
    penalty = run.penalty()
    if not penalty.requires_grad:
        return False
    penalty.backward()
    gradient = target.weight.grad
    assert gradient is not None and float(gradient.norm()) > 0, "a penalty without a gradient does nothing"
    start = target.weight.detach().clone()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            target.weight.copy_(start + sign * 1e-3 * gradient / gradient.norm() * start.norm())
        values.append(float(run.penalty().detach()))
    with torch.no_grad():
        target.weight.copy_(start)
    slope = (values[0] - values[1]) / (2e-3 * float(start.norm()))
    assert slope == pytest.approx(float(gradient.norm()), rel=0.02)
    return True


@pytest.mark.parametrize("name", ["filter", "block_punched", "filter+column", "pattern", "weight+unify"])
def test_penalties_have_the_gradient_of_their_value(name: str) -> None:
    with_penalty = set()
    for method in CASES:
        model, run, optimizer = begin(method, name)
        train(model, run, optimizer, 0, 5)
        if check_gradient(run):
            with_penalty.add(method)
    assert with_penalty == {"admm", "reweighted"}


def test_a_wrong_gradient_is_found() -> None:
    with pytest.raises(AssertionError):
        check_gradient(begin(Careless(), "filter")[1])


def check_resumes(method: str, name: str, stops: list[int]) -> None:
    end = STEPS + 3
    model, run, optimizer = begin(method, name)
    saved = {}
    for stop in range(end):
        train(model, run, optimizer, stop, stop + 1)
        if stop + 1 in stops:
            saved[stop + 1] = io.BytesIO()
            torch.save([model.state_dict(), run.state_dict(), optimizer.state_dict()], saved[stop + 1])
    for stop, file in saved.items():
        file.seek(0)
        states = torch.load(file, weights_only=True)
        second = begin(method, name, seed=5)
        for part, state in zip(second, states):
            part.load_state_dict(state)
        train(*second, stop, end)
        same = [torch.equal(a, b) for a, b in zip(model.state_dict().values(), second[0].state_dict().values())]
        assert all(same), f"stopped after step {stop}"


@pytest.mark.parametrize("method", CASES)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(method: str) -> None:
    check_resumes(method, "filter+column", list(range(1, STEPS + 3)))  # at any step
    for name in ("block_punched", "pattern+kernel", "weight+unify"):
        check_resumes(method, name, [7, STEPS])


@pytest.mark.parametrize("method", CASES)
def test_coupled_filters_are_one_decision(method: str) -> None:
    model, run, optimizer = begin(method, "filter", sites=("conv2", "conv3"))
    train(model, run, optimizer, 0, STEPS)
    rows = [run.masks[f"{site}.weight"].flatten(1).any(1) for site in ("conv2", "conv3")]
    assert torch.equal(*rows) and int(rows[0].sum()) == 3


@pytest.mark.parametrize("method", CASES)
def test_any_optimizer_will_do(method: str) -> None:
    for make in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        model, run, _ = begin(method, "filter+column")
        train(model, run, make(model.parameters(), lr=1e-3), 0, STEPS + 2)
        weight = run.targets[0].weight.detach()
        assert torch.isfinite(weight).all() and not weight[~run.masks["conv2.weight"]].any() and weight.any()


def test_a_state_of_another_plan_or_method_is_refused() -> None:
    _, run, _ = begin("admm", "filter")
    for name, method, told in (
        ("column", "admm", r"another plan: conv2\.weight was filter .*, is column "),
        ("filter", "magnitude", r"another method: method was ADMM\(.*, is Magnitude\("),
        ("column", "magnitude", "another plan and method: "),
    ):
        _, other, _ = begin(method, name)
        with pytest.raises(MethodError, match=told):
            other.load_state_dict(run.state_dict())


def test_a_state_of_another_network_is_refused() -> None:
    example, whole = torch.zeros(1, 3, 8, 8), Plan.uniform("filter", 0.5)
    state = start(_two_convs(4), whole, get("magnitude"), example, steps=1).state_dict()
    for width, plan, told in (
        (6, whole, r"another network: 0\.weight was .*\[4, 3, 3, 3\], is .*\[6, 3, 3, 3\]"),
        (4, Plan.of({"0.weight": scheme("filter", 0.5)}), r"another plan: 1\.weight was filter .*, is dense$"),
    ):
        run = start(_two_convs(width), plan, get("magnitude"), example, steps=1)
        with pytest.raises(MethodError, match=told):
            run.load_state_dict(state)


def _two_convs(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, 3))


@pytest.mark.parametrize(
    "name,options", [("magnitude", {"score": "l3"}), ("structure_parameters", {"kind": "l2"}), ("admn", {})]
)
def test_unknown_settings_list_the_known_ones(name: str, options: dict[str, str]) -> None:
    with pytest.raises(UnknownNameError, match="Known"):
        get(name, **options)


@pytest.mark.parametrize("name", ["column", "filter+column", "block_punched", "weight"])
@pytest.mark.parametrize("method", FINDERS)
def test_one_density_for_the_whole_network_is_met(method: str, name: str) -> None:
    """Layers get what they need of it: the one whose weights differ most loses most."""
    made = replace(CASES[method], density=0.4)
    model, run, optimizer = begin(made, name, sites=("conv2", "conv3"), found=True)
    train(model, run, optimizer, 0, STEPS)
    rows = run.densities()
    total = sum(row.achieved * row.weights for row in rows) / sum(row.weights for row in rows)
    assert total == pytest.approx(0.4, abs=0.06) and all(row.requested is None for row in rows)
    assert len({row.achieved for row in rows}) == 2
