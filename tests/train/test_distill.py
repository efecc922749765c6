"""Learning from a teacher: the formula, a teacher that stays as it is, exact resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import TrainingError
from espalier.train import Data, Recipe, evaluate, fit, load_data, seed_everything
from espalier.train.objective import objective

RECIPE = Recipe(epochs=3, batch_size=32, distill=0.7, temperature=3.0, seed=4)


@pytest.fixture(scope="module")
def simple() -> Data:
    return load_data("synthetic:2x6x6:4")


def network(seed: int) -> nn.Sequential:
    seed_everything(seed)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(96, 4)]
    return nn.Sequential(*layers)


def test_the_formula_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    out, taught, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    p, q = torch.softmax(taught / 3, 1), torch.softmax(out / 3, 1)
    apart = (p * (p / q).log()).sum(1).mean()
    want = 0.3 * F.cross_entropy(out, labels) + 0.7 * 9 * apart
    torch.testing.assert_close(objective(out, labels, taught, RECIPE), want)
    torch.testing.assert_close(objective(out, labels, None, RECIPE), F.cross_entropy(out, labels))
    assert not torch.isclose(objective(out, labels, taught, replace(RECIPE, temperature=2.0)), want)


def test_a_student_comes_close_to_its_teacher_which_stays_as_it_is(simple: Data) -> None:
    teacher, labels = network(0), replace(simple.train, labels=simple.train.labels.roll(1))
    fit(teacher, simple, Recipe(epochs=4, batch_size=32), progress=False)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher.zero_grad()
    teacher.train()  # the loop must not listen to that
    wrong = replace(simple, train=labels)  # labels that are noise: only the teacher knows
    student = network(1)
    fit(student, wrong, replace(RECIPE, epochs=6, distill=1.0), teacher=teacher, progress=False)
    assert evaluate(student, simple.test).accuracy > 0.9
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_run_with_a_teacher_resumes_exactly(simple: Data, tmp_path: Path) -> None:
    teacher = network(0)

    def go(path: Path | None, stop: bool) -> dict[str, Tensor]:
        student = network(1)

        def after(row: Any) -> None:
            if stop and row.epoch == 2:
                raise InterruptedError

        options: dict[str, Any] = {"checkpoint": path, "resume": True, "progress": False, "on_epoch": after}
        fit(student, simple, RECIPE, teacher=teacher, **options)
        return student.state_dict()

    want = go(None, False)
    with pytest.raises(InterruptedError):
        go(tmp_path / "run.pt", True)
    got = go(tmp_path / "run.pt", False)
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())


def test_what_is_missing_is_said(simple: Data) -> None:
    with pytest.raises(TrainingError, match="no teacher"):
        fit(network(1), simple, RECIPE, progress=False)
    with pytest.raises(TrainingError, match=r"distill is 1\.5"):
        Recipe(distill=1.5)
    with pytest.raises(TrainingError, match="temperature"):
        Recipe(temperature=0.0)
