"""The run protocol: what single methods do, and what is said when something is missing (see also conformance/)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espalier.errors import MethodError, UnknownNameError
from espalier.graph import capture
from espalier.methods import METHODS, Method, Run, get, start
from espalier.sparsity import CATALOG, Plan, scheme
from tests.methods.networks import EXAMPLE, Net, train

STEPS = 24
SETTINGS = {"magnitude": {"ramp": "cubic"}}


def plan_for(name: str) -> dict:
    chosen = scheme(name, None if CATALOG.get(name) and CATALOG[name].own else 0.25 if "pattern" not in name else 0.2)
    sites = capture(Net(), EXAMPLE).sites()
    return Plan.of({"conv2": chosen}, unfit="dense").resolve(sites)


def begin(name: str, method: str | Method, seed: int = 0) -> tuple[nn.Module, Run, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    made = get(method, **SETTINGS.get(method, {})) if isinstance(method, str) else method
    run = start(model, plan_for(name), made, EXAMPLE, steps=STEPS)
    return model, run, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(MethodError, match="steps="):
        start(Net(), plan_for("filter"), "admm", EXAMPLE)
    with pytest.raises(UnknownNameError, match="did you mean 'admm'"):
        get("adm")
    with pytest.raises(UnknownNameError, match="option of method admm 'rho_strat': did you mean 'rho_start'"):
        get("admm", rho_strat=3)
    with pytest.raises(UnknownNameError, match="ramp of magnitude 'cubik': did you mean 'cubic'"):
        get("magnitude", ramp="cubik")
    with pytest.raises(UnknownNameError, match=r"option of method admm 'foo': Known: every, .*updates"):
        start(Net(), plan_for("filter"), "admm", EXAMPLE, steps=STEPS, foo=3)
    for options, message in (
        ({"updates": "many"}, "option updates of method admm is 'many', expected int"),
        ({"updates": True}, "is True, expected int"),
        ({"updates": 0}, "is 0, expected 1 or more"),
        ({"rho_end": float("nan")}, "is nan, expected a number from 0 on"),
        ({"residual": "none"}, r"is 'none', expected float \| None"),
    ):
        with pytest.raises(MethodError, match=message):
            get("admm", **options)
    assert get("admm", rho_max=5, residual=None).rho_max == 5
    with pytest.raises(MethodError, match="leave updates out"):
        start(Net(), plan_for("filter"), get("admm"), EXAMPLE, steps=STEPS, updates=3)
    with pytest.raises(MethodError, match="finish"):
        begin("filter", "admm")[1].tighten({})


def test_the_affine_part_dies_with_its_filter() -> None:
    torch.manual_seed(0)
    model = Net()
    run = start(model, Plan.of({"conv1": scheme("filter", 0.5)}), "magnitude", EXAMPLE)
    nn.init.normal_(model.norm.bias)
    run.finish()
    dead = ~run.masks["conv1.weight"].flatten(1).any(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, run, optimizer, 0, 5)
    assert int(dead.sum()) == 4
    assert not model.conv1.bias[dead].any() and not model.norm.bias[dead].any() and model.norm.bias[~dead].all()


def test_admm_by_hand() -> None:
    """Z = proj(W + U) and U += W - Z, and the gradient of the penalty is rho (W - Z + U)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    chosen = scheme("weight", 0.5)
    run = start(
        model,
        {"0.weight": chosen},
        get("admm", rho_start=0.5, rho_end=0.5, updates=4, every=1, residual=None, track=False),
        torch.zeros(1, 6),
        steps=4,
    )
    w = model[0].weight
    z, u = chosen.project(w.detach()), torch.zeros_like(w)
    for _ in range(3):
        w.grad = None
        run.penalty().backward()
        torch.testing.assert_close(w.grad, 0.5 * (w.detach() - z + u))
        with torch.no_grad():
            w.add_(torch.randn_like(w) * 0.1)
        run.step()
        z, u = chosen.project(w.detach() + u), u + w.detach() - chosen.project(w.detach() + u)


def test_admm_leaves_what_stays_free_to_learn() -> None:
    """Weights that the projection keeps have no penalty, however far they move between updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    chosen = scheme("weight", 0.5)
    run = start(model, {"0.weight": chosen}, get("admm", rho_start=0.5, rho_end=0.5), torch.zeros(1, 6), steps=400)
    kept = chosen.project(model[0].weight.detach()) != 0
    with torch.no_grad():
        model[0].weight.add_(1.0)
    run.penalty().backward()
    assert not model[0].weight.grad[kept].any() and model[0].weight.grad[~kept].all()


def test_admm_in_a_short_run_ends_close_to_its_projection() -> None:
    """The published ramp alone leaves far too much for the cut; a layer that is behind gets more rho."""
    left = {}
    for residual in (None, 0.05):
        torch.manual_seed(0)
        model, x, y = nn.Sequential(nn.Linear(12, 8, bias=False)), torch.randn(64, 12), torch.randn(64, 8)
        run = start(model, {"0.weight": scheme("column", 0.5)}, get("admm", residual=residual), x[:1], steps=200)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            (F.mse_loss(model(x), y) + run.penalty()).backward()
            optimizer.step()
            run.step()
        before = model[0].weight.detach().clone()
        run.finish()
        left[residual] = float((before - model[0].weight.detach()).norm() / before.norm())
    assert left[0.05] < 0.1 < 0.4 < left[None]


def test_admm_does_not_diverge_under_momentum() -> None:
    """Between two updates the weights cannot follow a strong draw: what is left of it must not add up."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(64, 12), torch.randn(64, 8)
    chosen = scheme("block_column", 0.25, m=4)
    run = start(model, {"0.weight": chosen, "2.weight": chosen}, "admm", x[:1], steps=200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    highest = 0.0
    for _ in range(200):
        optimizer.zero_grad()
        penalty = run.penalty()
        highest = max(highest, float(penalty.detach()))
        (F.mse_loss(model(x), y) + penalty).backward()
        optimizer.step()
        run.step()
    assert 0.1 < highest < 10, "it was 180 with U kept at a large rho"


def test_admm_beats_one_shot_magnitude_where_features_go_together() -> None:
    """Least squares with correlated features: the largest weights are not the best ones to keep."""

    def loss_after(method: Method) -> float:
        torch.manual_seed(1)
        base = torch.randn(256, 4)
        x = torch.cat([base, base + 0.3 * torch.randn(256, 4), torch.randn(256, 8)], 1)
        y = x @ torch.randn(16, 1)
        model = nn.Sequential(nn.Linear(16, 1, bias=False))
        run = start(model, {"0.weight": scheme("weight", 0.25)}, method, x[:1], steps=2000)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(3000):
            if step == 2000:
                run.finish()
            optimizer.zero_grad()
            (F.mse_loss(model(x), y) + run.penalty()).backward()
            optimizer.step()
            run.step()
        return float(F.mse_loss(model(x), y))

    assert loss_after(get("admm")) <= loss_after(get("magnitude", ramp="jump")) * 1.0001


def test_runs_follow_the_module_and_its_optimizer() -> None:
    """Frozen supports hold under Adam's momentum, after deepcopies of state and with torch.compile around the model."""
    model, run, _ = begin("block_punched", "magnitude")
    run.finish()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = copy.deepcopy(run.state_dict())
    train(model, run, optimizer, 0, 4)
    assert not model.conv2.weight[~run.masks["conv2.weight"]].any()
    run.load_state_dict(before)
    assert run.density() < 1


@pytest.mark.parametrize("method", METHODS)
def test_rows_stand_in_blocks_with_their_like_and_a_resumed_run_knows_which(method: str) -> None:
    def begun(seed: int) -> tuple[nn.Module, Run]:
        torch.manual_seed(seed)
        model = Net()
        plan = Plan.of({"conv2": scheme("block_punched", 0.25, m=2, n=1, permute=True)}, unfit="dense")
        return model, start(model, plan, get(method, **SETTINGS.get(method, {})), EXAMPLE, steps=STEPS)

    model, run = begun(0)
    order = run.targets[0].scheme.rules[0].structure.order
    assert order.tolist() != list(range(len(order)))
    other, resumed = begun(1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(run.state_dict()))
    for each, at in ((model, run), (other, resumed)):
        train(each, at, torch.optim.SGD(each.parameters(), lr=0.05), 0, STEPS)
        at.finish()
    mask = run.masks["conv2.weight"]
    pairs = mask[order].unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0], pairs[:, 1]) and 0 < float(mask.float().mean()) < 1
    assert torch.equal(mask, resumed.masks["conv2.weight"])
    again = begun(2)[1]
    again.load_state_dict(resumed.state_dict())
    assert torch.equal(again.masks["conv2.weight"], mask)


def test_structure_parameters_of_pruned_groups_stay_within_reach() -> None:
    """However long a pruned group is pushed: when it comes back, it is not larger than what lives by far."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False))
    run = start(model, {"0.weight": scheme("weight", 0.1)}, "structure_parameters", torch.zeros(1, 12), steps=400)
    push, largest = torch.randn(8, 12), 0.0
    for _ in range(400):
        with torch.no_grad():
            model[0].weight.add_(0.05 * push)
        run.step()
        state = run.state_dict()["method"]
        a, alive = state["0.weight/a0"].abs(), state["0.weight/alive0"]
        if not alive.all():
            largest = max(largest, float(a[~alive].max() / a[alive].min()))
    assert 1 < largest < 4, "chosen anew every fourth step, what lives may have shrunk since"
