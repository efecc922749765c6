"""One target for the whole network, or none: by rule, by sensitivity, by the method; what cannot be is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import espalier as es
from espalier.cli import main
from espalier.densities import WAYS, finders, split_of
from espalier.errors import PlanError, UnknownNameError
from espalier.mapping import Targets
from espalier.methods import get
from espalier.train import Recipe

# No epoch of shaping, nothing to purify: what is looked at is the plan.
QUICK: dict[str, Any] = {"epochs": 0, "dense_epochs": 2, "recipe": Recipe(batch_size=64), "max_drop": 0.0, "seed": 1}


def compressed(out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report of a quick compression of the digits' network, and the row of its target."""
    report = es.compress("lenet_digits", "digits", out=out, **{**QUICK, **options}).report
    assert json.loads((out / "report.json").read_text())["targets"] == report["targets"]
    (row,) = report["targets"]["rows"]
    for site in report["phases"]["densities"]:
        assert set(site) == {"site", "weights", "requested", "achieved"} and 0 <= site["achieved"] <= 1
    return report, row


@pytest.mark.parametrize(
    "target,options",
    [
        ("density", {"density": 0.3, "allocation": "sensitivity"}),
        ("weights", {"nonzero": 5000}),
        ("weights", {"nonzero": 5000, "allocation": "method", "method": "structure_parameters", "scheme": "column"}),
        ("macs", {"macs": 0.3, "scheme": "block_punched"}),
        ("bytes", {"size_mb": 0.03, "scheme": "micro_block+unify"}),
    ],
)
def test_every_target_is_met(target: str, options: dict[str, Any], tmp_path: Path) -> None:
    report, row = compressed(tmp_path / "a", **options)
    split = report["targets"]["split"]
    assert row["target"] == target == split["target"] and split["way"] in WAYS
    assert row["achieved"] <= 1.05 * row["requested"], row
    if split["way"] in ("error", "sensitivity"):
        assert 0.7 * row["requested"] < row["predicted"] <= row["requested"]
    if target == "bytes":
        assert row["achieved"] == (tmp_path / "a" / "model.esp").stat().st_size
        assert "unify" in (tmp_path / "a" / "plan.toml").read_text()
    if target == "macs":
        again = es.compress("lenet_digits", "digits", out=tmp_path / "a", resume=True, **{**QUICK, **options})
        assert again.report["targets"] == report["targets"]  # the plan is made once


@pytest.mark.parametrize("method", finders())
def test_nothing_is_asked_for_and_the_method_finds_it(method: str, tmp_path: Path) -> None:
    report, row = compressed(tmp_path / "a", method=method, scheme="column", epochs=3)
    assert report["targets"]["split"]["way"] == "method" and row["target"] == "density"
    assert 0 < row["achieved"] < 0.95 and "found by the method" in row["reason"]
    assert all(site["requested"] is None for site in report["phases"]["densities"])


def test_the_command_line_tells_requested_predicted_and_achieved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "compress lenet_digits --data digits --macs 0.4 --scheme filter --epochs 0 --dense-epochs 1 --max-drop 0"
    assert main([*given.split(), "--recipe.batch_size", "64", "--out", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "requested" in told and "predicted" in told and "split by sensitivity" in told.replace("\n", " ")


def asked(method: str = "admm", plan: object = None, targets: dict[str, float] | None = None, **options: Any) -> Any:
    given = {"density": None, "nonzero": None, "scheme": None, "options": None, "allocation": None, **options}
    return split_of(Targets(**(targets or {})), plan=plan, method=get(method), **given)


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, "either density .* or nothing, with a method that finds .*primal_proximal"),
        ({"density": 0.1, "plan": "a.toml"}, "either density"),
        ({"plan": "a.toml", "allocation": "sensitivity"}, "either density"),
        ({"density": 0.1, "nonzero": 100}, "one target, got density, weights"),
        ({"targets": {"macs": 0.2, "size_mb": 1}, "scheme": "filter"}, "one target, got macs, bytes"),
        ({"targets": {"speedup": 2}, "scheme": "filter"}, "leave --scheme"),
        ({"targets": {"speedup": 2}, "density": 0.1}, "either density"),
        ({"density": 0.1, "allocation": "method"}, "finds densities itself: .*reweighted"),
        ({"allocation": "sensitivity", "method": "reweighted"}, "either density"),
        ({"targets": {"macs": 0.1}, "allocation": "rule"}, "leave --allocation rule out"),
    ],
)
def test_what_cannot_be_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        asked(**options)


def test_who_splits_what() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'rule'"):
        asked(density=0.1, allocation="rul")
    assert asked(plan="a.toml") is None and asked(targets={"speedup": 2.0, "macs": 0.5}) is None
    assert asked(targets={"macs": 0.5}) is None  # mapping chooses the schemes
    assert asked(targets={"macs": 0.5}, scheme="filter").way == "sensitivity"
    assert asked(density=0.5).way == "error" and asked("reweighted").way == "method"
    assert asked("reweighted").target is None


def test_the_method_is_told_what_its_own_layers_are_to_keep() -> None:
    """A layer that cannot take the scheme stays whole: the others must make up for it."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3), torch.nn.Conv2d(16, 16, 1), torch.nn.Flatten())
    graph = es.capture(model, torch.zeros(1, 4, 8, 8))
    split = asked("reweighted", density=0.7, allocation="method", scheme="pattern+kernel")
    told = split.method(graph, get("reweighted"))
    assert told.density == pytest.approx((0.7 * (576 + 256) - 256) / 576)
    with pytest.raises(PlanError, match="cannot be reached"):
        asked("reweighted", density=0.2, allocation="method", scheme="pattern").method(graph, get("reweighted"))
