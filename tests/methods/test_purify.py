"""Purification removes what costs nothing, keeps within its budget, and puts back what cost too much."""

import copy

import torch
from torch import nn

from espalier.graph import capture
from espalier.methods import METHODS, purify, start
from espalier.methods.ramps import RAMPS, ramp, staircase
from espalier.sparsity import Plan, scheme
from espalier.train import Recipe, build, evaluate, fit, load_data


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
    before = copy.deepcopy(model.state_dict())
    state = {name: value.clone() for name, value in before.items()}

    def changed() -> float:  # any change at all costs everything
        return 100.0 if all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) else 0.0

    report = purify(run, changed, max_drop=0.5, emptiness=0.0)
    assert not report.removed and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert report.evaluations > 1 and capture(model, torch.zeros(1, 8)).sites()


def test_ramps_start_and_end_where_they_say() -> None:
    for name in RAMPS:
        assert ramp(name, 1.0, 0.1, 1.0) == 0.1 or abs(ramp(name, 1.0, 0.1, 1.0) - 0.1) < 1e-12
        values = [ramp(name, 1.0, 0.1, t / 10) for t in range(11)]
        assert values == sorted(values, reverse=True)
    assert [round(staircase(1e-4, 1e-1, 4, t), 6) for t in (0, 0.3, 0.6, 0.9, 1)] == [1e-4, 1e-3, 1e-2, 1e-1, 1e-1]
    assert set(METHODS) >= {"admm", "magnitude"}
