"""Sensitivity: points that are those of the pruned network, weights put back, and a file that goes on."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import espalier as es
from espalier.errors import DataError
from espalier.mapping import Sensitivity, measure_sensitivity, scored
from espalier.mapping.sensitivity import quick_harms


class Stop(Exception):
    pass


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


@pytest.fixture
def batches(net: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(64, 12)
    return [(x, net.eval()(x).argmax(1))]  # its own answers: it scores 100


def test_points(net: nn.Module, batches, tmp_path: Path) -> None:
    graph = es.capture(net, torch.zeros(1, 12))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    made = measure_sensitivity(
        graph, net, scored(batches), tmp_path / "s.json", densities=(0.5, 0.1), schemes=["column"]
    )
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert made.accuracy == 100 and len(made.points) == 4
    point = made.points[1]
    with torch.no_grad():
        net[0].weight.copy_(es.scheme("column", 0.1).project(net[0].weight))
    accuracy, loss = scored(batches)(net)
    assert (point.site, point.density) == ("0.weight", 0.1)
    assert point.accuracy == accuracy and point.loss == pytest.approx(loss) and point.drop == 100 - accuracy > 0
    assert {h.error for h in made.harms()["0.weight"]} == {made.points[0].error, point.error}
    assert Sensitivity.load(tmp_path / "s.json") == made


def test_it_goes_on_where_it_was_stopped(net: nn.Module, batches, tmp_path: Path) -> None:
    graph, file = es.capture(net, torch.zeros(1, 12)), tmp_path / "s.json"
    evaluate, calls = scored(batches), []

    def counted(model: nn.Module) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 9:
            raise Stop
        return evaluate(model)

    whole = measure_sensitivity(graph, net, evaluate, tmp_path / "whole.json", densities=(0.5, 0.1))
    with pytest.raises(Stop):
        measure_sensitivity(graph, net, counted, file, densities=(0.5, 0.1))
    stored = len(json.loads(file.read_text())["points"])
    assert 0 < stored < len(whole.points)
    calls.extend([1] * 100)
    seen = len(calls)
    again = measure_sensitivity(graph, net, counted, file, densities=(0.5, 0.1))
    assert again == whole and len(calls) - seen == 1 + len(whole.points) - stored


def test_other_weights_are_refused(net: nn.Module, batches, tmp_path: Path) -> None:
    graph, file = es.capture(net, torch.zeros(1, 12)), tmp_path / "s.json"
    measure_sensitivity(graph, net, scored(batches), file, densities=(0.5,), schemes=["column"])
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(DataError, match="other weights"):
        measure_sensitivity(graph, net, scored(batches), file, densities=(0.5,), schemes=["column"])
    file.write_text('{"accuracy": 1}')
    with pytest.raises(DataError, match="no sensitivity file"):
        Sensitivity.load(file)


def test_quick_harms_grow_with_the_error(net: nn.Module, batches) -> None:
    harms = quick_harms(es.capture(net, torch.zeros(1, 12)), net, scored(batches), ["0.weight"])["0.weight"]
    assert [h.error for h in harms] == sorted(h.error for h in harms) and harms[-1].loss > harms[0].loss


def test_no_batches() -> None:
    with pytest.raises(DataError, match="no batch"):
        scored([])
