"""The allowed loss is kept to: read with its standard error, retrained for, and purification undone for it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from espalier import compress
from espalier import phases as phases_module
from espalier.densities import Split
from espalier.errors import MethodError
from espalier.methods import PurifyReport, get
from espalier.phases import Job, _Way, seen
from espalier.report import achieved
from espalier.train import Drop, Recipe, build, correct, drop, evaluate, fit, load_data, recalibrate_if_better
from espalier.workspace import Workspace


def test_a_drop_counts_the_images_that_only_one_gets_right() -> None:
    torch.manual_seed(0)
    before = torch.rand(1000) < 0.9
    after = before.clone()
    after[before.nonzero()[:30, 0]] = False
    after[(~before).nonzero()[:10, 0]] = True
    found = drop(before, after)
    assert found.points == pytest.approx(100 * float(before.float().mean() - after.float().mean()), abs=1e-4)
    samples = before.float() - after.float()  # the oracle: the deviation of a mean of paired differences
    assert found.error == pytest.approx(100 * float(samples.std(unbiased=False)) / 1000**0.5, rel=1e-4)
    assert drop(before, before) == Drop(0.0, 0.1, 1000)  # one image is what it can see at all
    assert drop(after, before).points == -found.points and found.bound == found.points + found.error


def test_recalibration_is_kept_only_where_it_helps() -> None:
    data = load_data("synthetic:3x8x8:4")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    assert not recalibrate_if_better(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), data.train, data.holdout)
    fit(model, data, Recipe(epochs=2, batch_size=64), progress=False)
    with torch.no_grad():
        model[1].running_mean.fill_(5.0)
    before = evaluate(model, data.holdout).loss
    assert recalibrate_if_better(model, data.train, data.holdout, seed=3)
    assert evaluate(model, data.holdout).loss < before
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not recalibrate_if_better(model, data.train, data.holdout, seed=3)  # no better: all as it was
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


class Scripted:
    """A way whose networks lose what a script says; every phase is noted, nothing is trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, losses: dict[str, Drop], max_drop: float) -> None:
        self.done: list[str] = []
        self.phase, self.losses = "", losses
        monkeypatch.setattr(Job, "train", self.train)
        monkeypatch.setattr(_Way, "_drop", lambda way: self.losses[self.phase])
        torch.manual_seed(0)
        network, data = build("lenet_digits", width=8), load_data("digits")
        plan = phases_module.Plan.uniform("filter", 0.5)
        example, work = torch.zeros(1, 1, 8, 8), Workspace(folder, {}, resume=False)
        self.job = Job(network, data, plan, get("magnitude"), example, work, Recipe(), 0, 8, 0, max_drop)
        monkeypatch.setattr(phases_module, "purify", self.purify)

    def train(self, phase: str, epochs: int, run: Any, teacher: Any) -> None:
        self.done.append(phase)
        self.phase = phase

    def purify(self, run: Any, evaluate: Any, max_drop: float) -> Any:
        self.budget = max_drop
        mask = run.masks["conv2.weight"].clone()
        mask[:, 0] = False
        run.tighten({"conv2.weight": mask})
        return PurifyReport(evaluate(), evaluate(), {"conv2.weight": 1}, 1)


GOOD, FAIR, BAD = Drop(0.2, 0.3, 500), Drop(0.8, 0.3, 500), Drop(1.4, 0.3, 500)


@pytest.mark.parametrize(
    "retrain,retrain2,retrain3,undo,trained,chosen,undone",
    [
        (GOOD, None, None, None, ["retrain"], GOOD, False),
        (FAIR, GOOD, None, None, ["retrain", "retrain2"], GOOD, False),
        (FAIR, FAIR, None, None, ["retrain", "retrain2"], FAIR, False),
        (BAD, BAD, GOOD, None, ["retrain", "retrain2", "retrain3"], GOOD, False),
        (BAD, BAD, BAD, GOOD, ["retrain", "retrain2", "retrain3", "undo"], GOOD, True),
        (BAD, Drop(1.2, 0.3, 500), BAD, BAD, ["retrain", "retrain2", "retrain3", "undo"], Drop(1.2, 0.3, 500), False),
    ],
)
def test_more_epochs_and_then_a_step_back_until_the_allowance_is_met(
    retrain: Drop,
    retrain2: Drop | None,
    retrain3: Drop | None,
    undo: Drop | None,
    trained: list[str],
    chosen: Drop,
    undone: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    given = {"retrain": retrain, "retrain2": retrain2, "retrain3": retrain3, "undo": undo}
    losses = {"shape": GOOD, "recover": GOOD, **{k: v for k, v in given.items() if v is not None}}
    script = Scripted(monkeypatch, tmp_path / "out", losses, 1.0)
    outcome = script.job.run()
    assert script.done == ["dense", "shape", "recover", *trained]
    assert script.budget == pytest.approx(0.5)  # what is left of 1.0 by the careful reading of GOOD
    assert outcome.holdout == chosen and outcome.facts["purification_undone"] == undone
    assert outcome.facts["extra_epochs"] == 2 * (len(trained) - 1)
    assert bool(script.job.network.conv2.weight[:, 0].any()) == undone


def test_nothing_is_purified_when_shaping_has_spent_the_allowance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses = dict.fromkeys(("shape", "recover", "recover2", "retrain", "retrain2"), BAD)
    script = Scripted(monkeypatch, tmp_path / "out", losses, 1.0)
    outcome = script.job.run()
    assert script.done == ["dense", "shape", "recover", "recover2", "retrain", "retrain2"]
    assert not outcome.facts["purify"]  # nothing was removed: nothing to undo
    assert outcome.facts["extra_epochs"] == 4 and outcome.holdout == BAD


def test_a_network_that_recovers_late_is_purified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    losses = {"shape": BAD, "recover": BAD, "recover2": GOOD, "retrain": GOOD}
    script = Scripted(monkeypatch, tmp_path / "out", losses, 1.0)
    outcome = script.job.run()
    assert script.done == ["dense", "shape", "recover", "recover2", "retrain"]
    assert outcome.facts["purify"]["removed"] and outcome.facts["extra_epochs"] == 2


def test_a_network_that_had_seen_the_holdout_is_compared_by_a_copy_that_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, model = load_data("synthetic:1x8x8:4", holdout=0.4), build("lenet_digits", width=8, classes=4)
    assert not seen(model, data)  # it knows nothing
    fit(model, data, Recipe(epochs=12, batch_size=16), progress=False)
    assert seen(model, data)
    forgotten = replace(data, holdout=replace(data.holdout, labels=data.holdout.labels.roll(1)))
    assert not seen(model, forgotten)
    script = Scripted(monkeypatch, tmp_path / "a", dict.fromkeys(("shape", "recover", "retrain"), GOOD), 1.0)
    job = replace(script.job, network=model, data=data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def train(self: Job, phase: str, *_: Any) -> None:
        script.train(phase, 0, None, None)
        if phase == "reference":
            with torch.no_grad():
                self.network.fc2.weight.zero_()
        if phase == "shape":
            assert all(torch.equal(tensor, before[name]) for name, tensor in self.network.state_dict().items())

    monkeypatch.setattr(Job, "train", train)
    outcome = job.run()
    assert script.done == ["dense", "reference", "shape", "recover", "retrain"]
    assert outcome.facts["dense_had_seen_the_holdout"] and outcome.facts["dense"] < 60  # the copy's answers
    model.load_state_dict(before)
    again = replace(job, dense_epochs=1, work=Workspace(tmp_path / "b", {}, resume=False))
    assert not again.run().facts["dense_had_seen_the_holdout"], "trained here, without them"


def test_a_gap_is_told_with_its_reason() -> None:
    report: dict[str, Any] = {
        "requested": {"density": None, "max_drop": 1.0},
        "dense": {"accuracy": 99.0, "weights": 100},
        "compressed": {"accuracy": 97.8, "nonzero": 10},
        "phases": {"dense": 99.0, "recovered": 96.0, "extra_epochs": 4},
        "drop": {"test": {"n": 500, "points": 1.2, "error": 0.4}, "holdout": {"n": 300, "points": 0.6, "error": 0.3}},
    }
    assert "within their noise" in achieved(report)["notes"][0] and not achieved(report)["met"]
    report["drop"]["holdout"]["points"] = 1.5
    assert "4 extra epochs (training into the plan alone had lost 3.00)" in achieved(report)["notes"][0]
    report["compressed"]["accuracy"] = 98.5
    assert achieved(report)["met"]


def test_compress_distils_from_the_dense_network_and_tells_its_noise(tmp_path: Path) -> None:
    options: dict[str, Any] = {"density": 0.3, "epochs": 4, "dense_epochs": 3, "max_drop": 3.0, "seed": 2}
    recipe = Recipe(batch_size=128, distill=0.5)
    made = compress("lenet_digits", "digits", out=tmp_path / "a", recipe=recipe, **options)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    data = load_data("digits")
    held = correct(made.module, data.holdout)
    assert report["drop"]["holdout"]["n"] == len(held) and report["drop"]["holdout"]["error"] > 0
    lost = report["phases"]["dense"] - 100 * float(held.float().mean())
    assert report["drop"]["holdout"]["points"] == pytest.approx(lost, abs=1e-4)
    plain = compress("lenet_digits", "digits", out=tmp_path / "b", recipe=replace(recipe, distill=0.0), **options)
    weights = [dict(result.module.named_parameters())["fc2.weight"] for result in (made, plain)]
    assert weights[0].shape != weights[1].shape or not torch.equal(*weights)


def test_a_resumed_run_keeps_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where this version would choose another; where it cannot be kept, what differs is told, and what to do."""
    asked: dict[str, Any] = {"out": tmp_path, "density": 0.3, "scheme": "filter", "epochs": 2, "dense_epochs": 1}
    first = compress("lenet_digits", "digits", **asked)
    plan = (tmp_path / "plan.toml").read_text()
    (tmp_path / "work" / "purify.pt").unlink()
    other = phases_module.Plan.uniform("filter", 0.6)
    monkeypatch.setattr(Split, "measured", lambda *_: (other, None))
    again = compress("lenet_digits", "digits", resume=True, **asked)
    assert "this version would choose another" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "plan.toml").read_text() == plan
    assert again.report["compressed"]["nonzero"] == first.report["compressed"]["nonzero"]
    (tmp_path / "plan.toml").unlink()
    with pytest.raises(MethodError, match=r"cannot be resumed: .*another plan: conv\S+ was filter .*another --out"):
        compress("lenet_digits", "digits", resume=True, **asked)
