"""The grids of experiments: every kind of cell of the methods' benchmarks runs, and none is done twice or mixed."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from espalier.train import load_data

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    for module in ("cells", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return import_module(name)


@dataclass(frozen=True)
class Cell:
    name: str
    number: int


def test_cells_are_done_once_under_the_same_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells, results, done = script("cells", monkeypatch), tmp_path / "grid.json", []
    monkeypatch.setattr(cells, "ProcessPoolExecutor", lambda n, context, begin: ThreadPoolExecutor(n))
    arguments = cells.options("").parse_args(["--only", "a/*"])

    def work(cell: Cell, _: argparse.Namespace) -> dict[str, Any]:
        done.append(cell.number)
        if cell.number == 9:
            raise ValueError("nine")
        return {"test": 90.0 + cell.number}

    grid = [Cell("a", 1), Cell("b", 2), Cell("a", 3)]
    cells.run_cells(grid, work, arguments, results, {"epochs": {"shape": 4}}, dense=99.1)
    cells.run_cells(grid, work, arguments, results, {"epochs": {"shape": 4}}, dense=99.2)
    assert sorted(done) == [1, 3] and "2 done before" in capsys.readouterr().out
    assert json.loads(results.read_text())["cells"]["a/3"]["test"] == 93.0
    cells.run_cells(grid, work, arguments, results, {"epochs": {"shape": 8}}, dense=99.2)  # other settings
    assert sorted(done) == [1, 1, 3, 3] and "set aside as grid.before1.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "grid.before1.json").read_text())["epochs"] == {"shape": 4}
    with pytest.raises(SystemExit):
        cells.run_cells([Cell("a", 9), Cell("a", 4)], work, arguments, results, {"epochs": {"shape": 8}})
    assert set(json.loads(results.read_text())["cells"]) == {"a/1", "a/3", "a/4"}  # one that fails stops no other


@pytest.fixture
def lenet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[ModuleType, argparse.Namespace]:
    grid = script("methods_lenet5", monkeypatch)
    small = load_data("synthetic:1x28x28:10")
    monkeypatch.setattr(grid, "load_data", lambda *_: small)
    monkeypatch.setattr(grid, "RECIPE", replace(grid.RECIPE, batch_size=16))
    monkeypatch.setattr(grid, "SHAPE_EPOCHS", 1)
    monkeypatch.setattr(grid, "RETRAIN_EPOCHS", 1)
    torch.save(grid.build("lenet5").state_dict(), tmp_path / "dense0.pt")
    return grid, argparse.Namespace(data="", out=str(tmp_path))


def test_every_method_and_every_scheme_of_the_lenet_grid(lenet: tuple[ModuleType, argparse.Namespace]) -> None:
    grid, arguments = lenet
    kinds = {(cell.method, cell.scheme) for cell in grid.CELLS}
    assert len(kinds) == len(grid.METHODS) * len(grid.SCHEMES)
    cells = [grid.Cell(method, "filter+column", 0.1, 0) for method in grid.METHODS]
    cells += [grid.Cell("admm", scheme, 0.1, 0) for scheme in grid.SCHEMES if scheme != "filter+column"]
    for cell in cells:
        found = grid.work(cell, arguments)
        assert 0.08 < found["density"] < 0.12, cell
        assert {"test", "holdout", "shaped", "fewer_weights"} <= set(found)


def test_every_way_to_split_a_density(
    lenet: tuple[ModuleType, argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = script("allocation", monkeypatch)
    assert ways.grid is lenet[0] and {cell.way for cell in ways.CELLS} == set(ways.WAYS)
    for way in ways.WAYS:
        assert 0.03 < ways.work(ways.Cell(way, "filter+column", 0.05), lenet[1])["density"] < 0.06, way


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(x)))
        return self.fc(torch.relu(self.norm3(self.conv3(x))).mean((2, 3)))


def test_ours_and_the_rivals_end_with_the_same_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = script("methods_resnet20", monkeypatch)
    small = load_data("synthetic:3x32x32:4")
    monkeypatch.setattr(grid, "load_data", lambda *_: small)
    monkeypatch.setattr(grid, "build", lambda *_, **__: Narrow())
    monkeypatch.setattr(grid, "load_weights", lambda *_: None)
    model, example = Narrow(), torch.zeros(1, 3, 32, 32)
    assert grid.macs(model, example) == grid.useful_macs(model, example)
    assert {cell.method for cell in grid.CELLS} == {*grid.METHODS, *grid.RIVALS, "one-shot, allocated"}
    recipe = {"lr": 0.01, "weight_decay": 1e-4, "distill": 0.5, "precision": "32-true", "epochs": 2}
    arguments = argparse.Namespace(data="", weights="", **recipe)
    ways = ("group_sl", "filter"), ("admm", "block_punched"), ("one-shot", "filter"), ("one-shot, allocated", "weight")
    for method, scheme in ways:
        found = grid.work(grid.Cell(method, scheme, 4), arguments)
        assert 0.5 * found["dense_macs"] / 4 < found["macs"] <= 1.02 * found["dense_macs"] / 4, (method, found)
