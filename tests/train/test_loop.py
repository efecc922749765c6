"""The loop learns, says what goes wrong, and leaves alone what is not its own."""

from __future__ import annotations

import copy
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import MissingExtraError, TrainingError, UnknownNameError
from espalier.train import Data, Recipe, Split, build, evaluate, fit, load_data, recalibrate, seed_everything
from espalier.train.recipe import OPTIMIZERS, SCHEDULES
from tests.train.processes import ran

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="module")
def simple() -> Data:
    return load_data("synthetic:2x6x6:4")


def linear(classes: int = 4) -> nn.Module:
    seed_everything(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, classes))


def quiet(model: nn.Module, data: Data, recipe: Recipe, **options: Any) -> Any:
    return fit(model, data, recipe, progress=False, **options)


def test_it_learns_the_digits(digits: Data) -> None:
    seed_everything(0)
    model = build("lenet_digits", width=16)
    history = quiet(model, digits, Recipe(epochs=8, batch_size=24))
    score = evaluate(model, digits.test)
    assert score.accuracy > 0.95 and score.n == len(digits.test)
    assert [row.epoch for row in history.epochs] == list(range(1, 9))
    assert history.epochs[-1].loss < 0.3 * history.epochs[0].loss
    assert history.epochs[-1].accuracy > 0.9 and history.epochs[-1].holdout_accuracy > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns(optimizer: Any, simple: Data) -> None:
    lr = 0.05 if optimizer == "sgd" else 0.005
    model = linear()
    quiet(model, simple, Recipe(epochs=4, batch_size=32, lr=lr, optimizer=optimizer))
    assert evaluate(model, simple.test).accuracy > 0.9


def by_hand(model: nn.Module, data: Data, recipe: Recipe) -> None:
    """The same training in twenty lines, as the oracle."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=recipe.momentum, nesterov=recipe.nesterov)
    steps, done = data.train.steps(recipe.batch_size), 0
    for epoch in range(recipe.epochs):
        options = {"seed": recipe.seed, "epoch": epoch, "shuffle": True, "augment": True}
        for x, y in data.train.batches(recipe.batch_size, **options):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(done, steps)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, label_smoothing=recipe.label_smoothing).backward()
            if recipe.clip:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            done += 1


def test_it_is_the_training_that_one_would_write_by_hand(simple: Data) -> None:
    recipe = Recipe(epochs=2, batch_size=32, lr=0.1, label_smoothing=0.1, clip=0.5, seed=5)
    ours, theirs = linear(), linear()
    quiet(ours, simple, recipe)
    by_hand(theirs, simple, recipe)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    wrong = linear()
    by_hand(wrong, simple, replace(recipe, clip=0.4))
    assert not all(torch.equal(a, b) for a, b in zip(ours.parameters(), wrong.parameters()))


def test_a_batch_worked_in_parts_is_the_same_batch(simple: Data) -> None:
    recipe = Recipe(epochs=2, batch_size=30)
    whole, parts = linear(), linear()
    first, second = quiet(whole, simple, recipe), quiet(parts, simple, replace(recipe, accumulate=4))
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b)
    assert first.epochs[-1].loss == pytest.approx(second.epochs[-1].loss, rel=1e-5)


class Counting:
    """Hooks that pull the weights towards zero and keep a row of them there."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.called = weight, ""

    def penalty(self) -> Tensor:
        self.called += "p"
        return 0.5 * self.weight.square().sum()

    def step(self) -> None:
        self.called += "s"
        with torch.no_grad():
            self.weight[0] = 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_hooks_are_called_once_a_step_in_their_order(simple: Data) -> None:
    free, held = linear(), linear()
    hooks = Counting(held[1].weight)
    recipe = Recipe(epochs=2, batch_size=64, accumulate=2)
    quiet(free, simple, recipe)
    history = quiet(held, simple, recipe, hooks=hooks)
    assert hooks.called == "ps" * (2 * simple.train.steps(64))
    assert history.epochs[0].penalty > 0
    assert not held[1].weight[0].any() and held[1].weight.norm() < free[1].weight.norm()


def test_flags_and_place_are_as_before(simple: Data) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 4))
    model[1].eval()
    parameters = [id(p) for p in model.parameters()]
    quiet(model, simple, Recipe(epochs=1))
    assert [m.training for m in model] == [True, False, True] and model.training
    assert [id(p) for p in model.parameters()] == parameters
    evaluate(model, simple.test)
    assert [m.training for m in model] == [True, False, True]


def test_convs_train_as_by_hand_and_their_weights_come_back_contiguous() -> None:
    images, recipe = load_data("synthetic:3x8x8:3"), Recipe(epochs=1, batch_size=32, weight_decay=0.01)
    seed_everything(0)
    ours = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    theirs = copy.deepcopy(ours)
    seen = []
    quiet(ours, images, recipe, on_epoch=lambda _: seen.append(ours[0].weight.is_contiguous()))
    by_hand(theirs, images, recipe)
    assert seen == [False] and all(p.is_contiguous() for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


def test_mixed_precision_keeps_the_weights_as_they_are(simple: Data) -> None:
    model = linear()
    quiet(model, simple, Recipe(epochs=3, batch_size=32, precision="bf16-mixed"))
    assert model[1].weight.dtype == torch.float32
    assert evaluate(model, simple.test).accuracy > 0.9


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_told_with_its_place(simple: Data, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    class Poison(Counting):
        def penalty(self) -> Tensor:
            super().penalty()
            bad = self.called.count("p") == 5
            return torch.tensor(float("nan") if bad else 0.0)

    model = linear()
    steps = simple.train.steps(64)
    words = rf"shape: .*penalty nan.*epoch 2, step {5 - steps} of {steps}.*lower learning rate than 0.05.*clip=1"
    with pytest.raises(TrainingError, match=words):
        quiet(model, simple, Recipe(epochs=3, batch_size=64), hooks=Poison(model[1].weight), phase="shape")
    assert model[1].weight.isfinite().all()
    with pytest.raises(TrainingError, match=r"run\.pt holds what was before"):
        quiet(model, simple, Recipe(epochs=3, batch_size=64), hooks=Poison(model[1].weight), checkpoint=path)
    with pytest.raises(TrainingError, match=r"the loss is (inf|nan)"):
        quiet(linear(), simple, Recipe(epochs=30, lr=1e30, batch_size=32))


def test_a_network_of_another_number_of_classes(simple: Data) -> None:
    with pytest.raises(TrainingError, match=r"has 4 classes: build it with classes=4"):
        quiet(linear(3), simple, Recipe())
    with pytest.raises(TrainingError, match="nothing to train"):
        quiet(nn.Flatten(), simple, Recipe())


@pytest.mark.parametrize(
    "options,words",
    [
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"schedule": "cos"}, "cosine"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1.0, expected a number of 0.0 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
    ],
)
def test_recipes_that_are_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TrainingError, UnknownNameError), match=words):
        Recipe(**options)


def test_a_precision_or_device_that_there_is_not(simple: Data) -> None:
    with pytest.raises(TrainingError, match=r"in 33-true"):
        quiet(linear(), simple, Recipe(precision="33-true"))
    with pytest.raises(TrainingError, match="abacus"):
        quiet(linear(), simple, Recipe(), accelerator="abacus")


def test_without_the_extra(simple: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(MissingExtraError, match=r"lightning-fabric.*espalier\[train\]"):
        quiet(linear(), simple, Recipe())


# -- schedules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_rise_first_and_never_after(schedule: Any) -> None:
    recipe = Recipe(epochs=10, lr=0.4, schedule=schedule, warmup_epochs=2)
    rates = [recipe.lr_at(step, 7) for step in range(70)]
    assert rates[:14] == sorted(rates[:14]) and rates[14:] == sorted(rates[14:], reverse=True)
    assert min(rates) > 0 and max(rates) == pytest.approx(0.4)
    last = {"cosine": 0.01, "constant": 0.41, "step": 0.0041}
    assert rates[-1] < last[schedule]


# -- what is said ----------------------------------------------------------------------------------


def test_a_line_an_epoch_where_there_is_no_terminal(simple: Data, capsys: pytest.CaptureFixture[str]) -> None:
    fit(linear(), simple, Recipe(epochs=2), phase="shape")
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert told.out == "" and len(lines) == 2
    assert re.fullmatch(r"shape 1/2  loss \d\.\d{4}  holdout \d+\.\d\d %  \d+\.\d s  0:00:\d\d left", lines[0])
    quiet(linear(), simple, Recipe(epochs=2))
    assert capsys.readouterr().err == ""


# -- scores ----------------------------------------------------------------------------------------


def test_scores_are_the_accuracy_and_the_mean_loss(simple: Data) -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.9))
    x = simple.test.normalised(simple.test.images)
    out = model.eval()(x).detach()
    model.train()
    for batch_size in (1, 63, 64, 65, 1000):
        score = evaluate(model, simple.test, batch_size=batch_size, device="cpu")
        assert score.n == 64
        assert score.accuracy == float((out.argmax(1) == simple.test.labels).float().mean())
        assert score.loss == pytest.approx(float(F.cross_entropy(out, simple.test.labels)), rel=1e-5)


def test_recalibration_takes_plain_means(simple: Data) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(72, 4))
    model[0].running_mean.fill_(50)
    recalibrate(model, simple.train, batches=10**6, batch_size=len(simple.train))
    x = simple.train.normalised(simple.train.images)
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, x.var((0, 2, 3)))
    assert model[0].momentum == 0.1 and all(m.training for m in model)
    recalibrate(linear(), Split(x[:0], torch.zeros(0), simple.train.norm))  # no batch norm: nothing to do


# -- several processes -----------------------------------------------------------------------------


def test_small_steps_take_few_threads(simple: Data) -> None:
    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(torch.get_num_threads())
            return super().forward(x)

    before, seen = torch.get_num_threads(), set[int]()
    try:
        torch.set_num_threads(2)
        quiet(nn.Sequential(nn.Flatten(), Watched(72, 4)), simple, Recipe(epochs=1))
        assert seen == {1, 2} and torch.get_num_threads() == 2  # two only to count the work
        seen.clear()
        wide = nn.Sequential(nn.Flatten(), nn.Linear(72, 60_000), nn.Linear(60_000, 4), Watched(4, 4))
        quiet(wide, simple, Recipe(epochs=1, batch_size=32))
        assert seen == {2}
    finally:
        torch.set_num_threads(before)


def test_two_processes_come_to_what_one_comes_to(simple: Data, tmp_path: Path) -> None:
    """torchrun with gloo: every batch is shared, the gradients are averaged, one checkpoint is written."""
    recipe = Recipe(epochs=2, batch_size=32)
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, torch
            from espalier.train import *
            from torch import nn
            torch.set_num_threads(1)
            seed_everything(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
            history = fit(model, load_data("synthetic:2x6x6:4"), {recipe!r}, devices=2, accelerator="cpu",
                          checkpoint="run.pt", progress=False)
            torch.save([model[1].weight.detach(), history.epochs[-1].loss], f"rank{{os.environ['RANK']}}.pt")
            """
        )
    )
    ran(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)], tmp_path)
    model = linear()
    history = quiet(model, simple, recipe)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(ranks[0][0], ranks[1][0])
    torch.testing.assert_close(ranks[0][0], model[1].weight.detach())
    assert ranks[0][1] == pytest.approx(history.epochs[-1].loss, rel=1e-5)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 2
