"""Purification removes what costs nothing, keeps within its budget, and puts back what cost too much."""

import copy

import torch
from torch import nn

from espalier.graph import capture
from espalier.methods import METHODS, purify, remove_unused, start
from espalier.methods.base import Run
from espalier.methods.ramps import RAMPS, ramp, staircase
from espalier.sparsity import Plan, scheme
from espalier.train import Recipe, build, evaluate, fit, load_data
from espalier.train.score import Score


def test_useless_channels_go_and_useful_ones_stay() -> None:
    data = load_data("digits")
    torch.manual_seed(0)
    model = build("lenet_digits", width=16)
    example = torch.zeros(1, *data.shape)
    fit(model, data, Recipe(epochs=8, batch_size=64), progress=False)
    run = start(model, Plan.of({"conv*": scheme("column", 0.5), "fc1": scheme("column", 0.5)}), "magnitude", example)
    run.finish()
    fit(model, data, Recipe(epochs=4, batch_size=64, lr=0.02), hooks=run, progress=False)
    with torch.no_grad():  # five channels that nearly nobody listens to
        mask = run.masks["conv2.weight"].clone()
        mask[:, :5, 0:2] = False
        run.tighten({"conv2.weight": mask})
        model.conv2.weight[:, :5] *= 1e-6

    def accuracy() -> float:
        return 100 * evaluate(model, data.holdout).accuracy

    before, density = accuracy(), run.density()
    report = purify(run, accuracy, max_drop=1.0)
    assert report.before == before and accuracy() == report.after >= before - 1.0
    assert run.density() < density and not model.conv2.weight[:, :5].any()
    assert set(report.removed) <= {t.site for t in run.targets}


def test_nothing_goes_when_everything_costs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    run = start(model, Plan.of({"*": scheme("weight", 0.5)}), "magnitude", torch.zeros(1, 8))
    run.finish()
    remove_unused(run)
    x, state = torch.randn(64, 8), copy.deepcopy(model.state_dict())
    want = model(x)

    def changed() -> float:  # any change at all costs everything
        return 100.0 if torch.allclose(model(x), want, atol=1e-6) else 0.0

    report = purify(run, changed, max_drop=0.5)
    assert not report.removed and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert report.evaluations > 1 and capture(model, torch.zeros(1, 8)).sites()


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small network that has learnt to add up halves of its input, with units to spare."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.randn(400, 8)
    y = (x[:, :4].sum(1) > x[:, 4:].sum(1)).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def scored(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Score:
    out = model(x).detach()
    return Score(float((out.argmax(1) == y).float().mean()), float(nn.functional.cross_entropy(out, y)), len(y))


def test_a_small_hold_out_is_trusted_less() -> None:
    budgets = []
    for n in (50, 400):
        model, x, y = trained()
        run = start(model, Plan.of({"*": scheme("weight", 0.9)}), "magnitude", x[:1])
        run.finish()
        budgets.append(purify(run, lambda m=model, x=x[:n], y=y[:n]: scored(m, x, y), 3.0).budget)
    assert 0 <= budgets[0] < budgets[1] < 3.0


def begun() -> tuple[nn.Module, Run, torch.Tensor, torch.Tensor]:
    model, x, y = trained()
    run = start(model, Plan.of({"*": scheme("weight", 0.9)}), "magnitude", x[:1])
    run.finish()
    return model, run, x, y


def limited(max_loss: float | None) -> float:
    model, run, x, y = begun()
    before = scored(model, x, y).loss
    purify(run, lambda: scored(model, x, y), 20.0, errors=0.0, max_loss=max_loss)
    assert max_loss is None or scored(model, x, y).loss <= before * (1 + max_loss) + 1e-6
    return run.density()


def test_the_loss_is_a_limit_too() -> None:
    assert limited(None) < limited(0.05)


def in_rounds(rounds: int) -> float:
    model, run, x, y = begun()

    def gradients() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    def retrain() -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            gradients()
            optimizer.step()
            run.step()

    report = purify(
        run,
        lambda: scored(model, x, y),
        2.0,
        errors=0.0,
        max_loss=None,
        rounds=rounds,
        gradients=gradients,
        retrain=retrain,
    )
    assert report.after >= report.before - 2.0 and report.after == 100 * scored(model, x, y).accuracy
    assert report.rounds <= rounds
    return run.density()


def test_rounds_with_retraining_go_further_and_never_below_the_floor() -> None:
    assert in_rounds(6) < in_rounds(1) < 0.9


def test_unused_paths_go_without_changing_the_outputs() -> None:
    model, x, _ = trained()
    run = start(model, Plan.of({"*": scheme("weight", 1.0)}), "magnitude", x[:1])
    run.finish()
    mask = run.masks["2.weight"].clone()
    mask[:, :5] = False  # nobody reads five units
    run.tighten({"2.weight": mask})
    want = model(x).detach()
    assert remove_unused(run) == 5 * 8
    assert not model[0].weight[:5].any()
    torch.testing.assert_close(model(x).detach(), want)


def test_ramps_start_and_end_where_they_say() -> None:
    for name in RAMPS:
        assert ramp(name, 1.0, 0.1, 1.0) == 0.1 or abs(ramp(name, 1.0, 0.1, 1.0) - 0.1) < 1e-12
        values = [ramp(name, 1.0, 0.1, t / 10) for t in range(11)]
        assert values == sorted(values, reverse=True)
    assert [round(staircase(1e-4, 1e-1, 4, t), 6) for t in (0, 0.3, 0.6, 0.9, 1)] == [1e-4, 1e-3, 1e-2, 1e-1, 1e-1]
    assert set(METHODS) >= {"admm", "magnitude"}
