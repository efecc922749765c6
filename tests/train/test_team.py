"""Two processes (gloo, on the CPU) are one: the same masks, all alike, resumed alike; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from espalier.errors import DataError, TrainingError
from espalier.methods import METHODS
from espalier.train import Processes, Recipe, Team, fit, launch
from tests.train.processes import ran
from tests.train.together import data, every_method, network, together

REPOSITORY = Path(__file__).parents[2]


def two(folder: Path, strategy: str, precision: str = "32-true", *more: str) -> list[dict[str, Any]]:
    arguments = [str(folder / "result"), strategy, "2", precision, *more]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] if more else []  # or Fabric's
    ran(["-m", *launcher, "tests.train.together", *arguments], REPOSITORY)
    return [torch.load(folder / f"result.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return together("auto", 1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(strategy: str, one: dict[str, Any], tmp_path: Path) -> None:
    """Weights of five rows: FSDP deals them out as three and two."""
    results = two(tmp_path, strategy)
    check_methods_alike(*(result["methods"] for result in results))
    for name, alone in every_method("auto", 1).items():
        for site, mask in alone["masks"].items():
            assert torch.equal(results[0]["methods"][name]["masks"][site], mask), f"{name}: {site} is not one process's"
    first, second = (result["whole"] for result in results)
    for site, mask in one["masks"].items():
        assert torch.equal(first["masks"][site], mask), site
        weight = first["model"][site if site in first["model"] else f"{site}.weight"]
        assert not weight[~mask].any() and weight[mask].all()
    for name, tensor in one["model"].items():
        torch.testing.assert_close(first["model"][name], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(first["model"][name], second["model"][name]), f"{name}: the processes differ"
    torch.testing.assert_close(torch.tensor(first["history"]), torch.tensor(one["history"]), rtol=1e-3, atol=1e-3)


def check_methods_alike(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Every method holds the same in both processes, bit for bit."""
    assert list(first) == list(METHODS) == list(second)
    for name, found in first.items():
        for part in ("state", "masks", "model"):
            assert found[part].keys() == second[name][part].keys()
            for key, value in found[part].items():
                assert torch.equal(value, second[name][part][key]), f"{name}: {part} {key} differs"
        assert not all(mask.all() for mask in found["masks"].values()), f"{name} removed nothing"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_team_resumes_from_a_file_of_one_process_in_mixed_precision_with_norms(strategy: str, tmp_path: Path) -> None:
    results = two(tmp_path, strategy, "bf16-mixed", str(tmp_path / "run.pt"))
    for name, tensor in results[0]["whole"]["model"].items():
        assert torch.equal(tensor, results[1]["whole"]["model"][name]), f"{name}: the processes differ"
        torch.testing.assert_close(tensor, results[0]["resumed"]["model"][name], rtol=1e-4, atol=1e-5)
    for site, mask in results[0]["whole"]["masks"].items():
        assert torch.equal(results[0]["resumed"]["masks"][site], mask)
    statistics = results[0]["whole"]["model"]["1.running_mean"]
    assert statistics.any() and sorted(p.name for p in tmp_path.glob("run.*")) == ["run.half", "run.other", "run.pt"]
    alone = together("auto", 1, "bf16-mixed", tmp_path / "run.half")["model"][
        "4.weight"
    ]  # the last epoch by one process
    fresh = together("auto", 1, "bf16-mixed", tmp_path / "run.none", seed=5)["model"]["4.weight"]
    whole = results[0]["whole"]["model"]["4.weight"]
    assert (alone - whole).norm() < 0.01 * whole.norm() < 0.1 * (fresh - whole).norm()


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(TrainingError, match="0 devices"):
        Processes(devices=0)
    with pytest.raises(TrainingError, match="expected auto, ddp or fsdp"):
        Processes(strategy="dpp")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="cannot train on 1 x 1 x abacus"):
        launch(Processes(accelerator="abacus"))
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="cannot train on 1 x 1 x cuda"):
            fit(network(False), data(), Recipe(), accelerator="cuda", progress=False)


def test_a_team_of_one_is_no_team() -> None:
    team = Team.alone()
    assert team.leads and team.any(True, False) == [True, False] and team.sums({"a": 2.0}) == {"a": 2.0}

    def fail() -> None:
        raise DataError("no such file")

    with pytest.raises(DataError, match="no such file"):
        team.first(fail)
    with pytest.raises(AssertionError, match="inside"):
        team.first(lambda: team.first(lambda: 1))
    assert team.first(lambda: 1) == 1
