"""Targets through the commands: plan, compress, sensitivity and search as a user meets them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import espalier as es
from espalier.cli import main
from espalier.mapping import Log, Sensitivity
from espalier.planning import OneShot, target_rows
from espalier.train import Recipe, build, fit, load_data


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet on the digits, well enough trained to have something to lose."""
    torch.manual_seed(0)
    network, file = build("lenet_digits"), tmp_path_factory.mktemp("weights") / "lenet.safetensors"
    fit(network, load_data("digits"), Recipe(epochs=6, batch_size=64), progress=False)
    save_file(network.state_dict(), file)
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path_factory.getbasetemp() / "espalier_cache"))


def test_plan_writes_a_plan_that_explains_itself(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "plan.toml"
    asked = ["plan", "lenet_digits", "--data", "digits", "--weights", str(weights), "--macs", "0.4", "--out", str(file)]
    assert main([*asked, "--check-model=true"]) == 0
    told = capsys.readouterr().out
    assert "reachable" in told and "smallest block" in told and "mean error" in told
    plan = es.Plan.load(file)
    sites = es.capture(build("lenet_digits"), torch.zeros(1, 1, 8, 8)).sites()
    schemes = plan.resolve(sites)
    kept = sum(site.macs * (schemes[s].density if s in schemes else 1) for s, site in sites.items())
    assert kept <= 0.4 * sum(site.macs for site in sites.values()) and "conv1" in es.explain(plan, "conv1")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["plan", "lenet_digits"], "ask for something"),
        (["plan", "lenet_digits", "--speedup", "1000"], "reachable"),
        (["plan", "lenet_digits", "--speedup", "0.5"], "slower than dense"),
        (["plan", "lenet_digits", "--data", "digits", "--speedup", "2"], "random weights"),
        (["plan", "lenet_digits", "--speedup", "2", "--sensitivity", "nowhere.json"], "nowhere.json"),
        (["plan", "lenet_digits", "--macs", "0.5", "--out", "/"], "cannot be written"),
        (["plan", "lenet_digits", "--macs", "0.5", "--out", "/dev/null/plan.toml"], "cannot be made"),
        (["plan", "lenet_digits", "--speedup", "2", "--threads", "0"], "1 thread or more"),
        (["plan", "lenet_digits", "--speedup", "2", "--beta", "-1"], "beta is -1"),
        (["sensitivity", "lenet_digits"], "needs data"),
        (["search", "lenet_digits", "--speedup", "2"], "needs data"),
        (["search", "lenet_digits", "--data", "digits"], "needs a latency to aim at"),
        (["compress", "lenet_digits", "--data", "digits", "--speedup", "2", "--density", "0.1"], "say either"),
        (["compress", "lenet_digits", "--data", "digits"], "say either"),
    ],
)
def test_what_cannot_be_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_compress_under_targets(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    asked = ["compress", "lenet_digits", "--data", "digits", "--weights", str(weights), "--macs", "0.4"]
    asked += ["--max-drop", "3", "--epochs", "4", "--recipe.batch_size", "64", "--threads", "1", "--out", str(out)]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "reachable" in told and told.index("reachable") < told.index("dense against compressed")
    report = json.loads((out / "report.json").read_text())
    (macs, drop) = report["targets"]["rows"]
    assert macs["target"] == "macs" and macs["achieved"] == report["compressed"]["useful_macs"]
    assert macs["met"] and macs["achieved"] <= 0.4 * report["dense"]["macs"] * 1.05
    assert drop["requested"] == 3 and report["targets"]["reachable"]["latency_ms"] > 0
    assert "smallest block" in (out / "plan.toml").read_text()
    assert main([*asked, "--resume"]) == 0
    assert "reachable" not in capsys.readouterr().out  # the plan was made once and kept


def test_sensitivity_as_data_and_picture(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    asked = ["sensitivity", "lenet_digits", "--data", "digits", "--weights", str(weights), "--out", str(file)]
    assert main([*asked, "--schemes", "column,weight", "--images", "60"]) == 0
    found = Sensitivity.load(file)
    assert {p.scheme for p in found.points} == {"column", "weight"} and len({p.site for p in found.points}) == 4
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    plan = ["plan", "lenet_digits", "--macs", "0.5", "--sensitivity", str(file), "--out", str(tmp_path / "p.toml")]
    assert main(plan) == 0


def test_without_matplotlib_only_the_picture_is_missing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises ImportError
    asked = ["sensitivity", "lenet_digits", "--data", "digits", "--weights", str(weights), "--schemes", "column"]
    asked += ["--images", "20", "--out", str(tmp_path / "s.json")]
    assert main(asked) == 0 and "no picture: matplotlib" in capsys.readouterr().out
    assert main([*asked, "--picture", str(tmp_path / "s.png")]) == 2 and "plots" in capsys.readouterr().err
    assert Sensitivity.load(tmp_path / "s.json").points


def test_nothing_to_score_on(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sensitivity", "lenet_digits", "--data", "digits", "--weights", str(weights)]
    for images in ("0", "-3"):
        assert main([*asked, "--images", images]) == 2 and "nothing to score on" in capsys.readouterr().err


def test_search_goes_on_where_it_was(weights: Path, tmp_path: Path) -> None:
    asked = ["search", "lenet_digits", "--data", "digits", "--weights", str(weights), "--speedup", "1.05"]
    asked += ["--images", "200", "--final-epochs", "1", "--out", str(tmp_path)]
    assert main([*asked, "--trials", "2", "--finalists", "0"]) == 0
    assert not list(tmp_path.glob("finals*"))
    first = (tmp_path / "trials.jsonl").read_bytes()
    assert main([*asked, "--trials", "3", "--sampler", "tpe", "--finalists", "1"]) == 0
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(first)
    space = json.loads(first.splitlines()[0])["space"]
    assert [t.source for t in Log(tmp_path / "trials.jsonl", space).trials] == ["policy"] * 2 + ["tpe"] * 3
    assert {t.source for t in Log(tmp_path / "finals-1.jsonl", space).trials} == {"final"}
    assert es.Plan.load(tmp_path / "plan.toml").entries and (tmp_path / "front.png").exists()


def test_a_search_begins_again_where_it_began(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the rule's plan is measured at is never the same twice: it is kept, and no trial is made again."""
    asked = ["search", "lenet_digits", "--data", "digits", "--weights", str(weights), "--speedup", "1.05"]
    asked += ["--images", "200", "--finalists", "0", "--trials", "2", "--out", str(tmp_path)]
    assert main(asked) == 0
    trials, start = (tmp_path / "trials.jsonl").read_bytes(), (tmp_path / "rule.json").read_bytes()
    assert main(asked) == 0
    assert (tmp_path / "trials.jsonl").read_bytes() == trials and (tmp_path / "rule.json").read_bytes() == start
    assert main([*asked, "--speedup", "1.1"]) == 0 and len(json.loads((tmp_path / "rule.json").read_text())) == 2
    (tmp_path / "rule.json").write_text('{"x": 3}')
    capsys.readouterr()
    assert main(asked) == 2 and "rule.json is not what a search wrote" in capsys.readouterr().err
    assert main([*asked[:-1], str(tmp_path / "new"), "--speedup", "1e-3"]) == 2


def test_a_trial_scores_what_it_prunes(weights: Path) -> None:
    score = OneShot("lenet_digits", "digits", str(weights), epochs=0)
    whole, empty = score(es.Plan(())), score(es.Plan.of({"conv2": es.scheme("column", 0.01)}))
    again = OneShot("lenet_digits", "digits", str(weights), epochs=2)(es.Plan.of({"conv2": es.scheme("column", 0.01)}))
    assert whole > 90 > empty and again > empty


def test_a_trial_that_diverges_scores_nothing(weights: Path) -> None:
    score = OneShot("lenet_digits", "digits", str(weights), recipe=Recipe(lr=1e30, warmup_epochs=0))
    assert score(es.Plan(())) == 0.0


# -- the table at the end ---------------------------------------------------------------------------


def ended(**changes: float) -> tuple[dict, dict]:
    """What was known of a plan for 2x and 0.4 of the MACs, and how it ended."""
    known = {
        "requested": {"speedup": 2.0, "latency_ms": 5.0, "macs": 0.4, "size_mb": 1.0, "max_drop": 1.0},
        "dense": {"latency_ms": 10.0, "macs": 1000.0},
        "predicted": {"latency_ms": 5.0, "macs": 400.0, "size_mb": 1.0, "speedup": 2.0, "drop": None},
        "random_weights": {"speedup": changes.get("random", 2.0)},
    }
    report = {
        "latency_ms": {
            "dense": {"engine": changes.get("dense", 10.0)},
            "compressed": {"engine": changes.get("ms", 5.0)},
        },
        "compressed": {"file_bytes": 1_000_000, "useful_macs": changes.get("macs", 400), "accuracy": 90.0},
        "dense": {"accuracy": 90.5, "macs": 1000},
    }
    return known, report


@pytest.mark.parametrize(
    "changes,target,met,reason",
    [
        ({}, "speedup", True, ""),
        ({"ms": 6.0}, "speedup", False, "slower than random"),
        ({"ms": 6.0, "random": 1.7}, "speedup", False, "came closer"),
        ({"ms": 3.0, "macs": 200}, "speedup", True, "purification"),
        ({"ms": 10.0, "dense": 20.0}, "latency_ms", False, "2.00 times as long"),
        ({"macs": 500}, "macs", False, "whole groups"),
        ({}, "max_drop", True, ""),
    ],
)
def test_requested_and_achieved(changes: dict[str, float], target: str, met: bool, reason: str) -> None:
    row = next(row for row in target_rows(*ended(**changes)) if row.target == target)
    assert row.met == met and reason in row.reason and bool(row.reason) == bool(reason)
