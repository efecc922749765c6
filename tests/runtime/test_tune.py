"""Choosing formats by measuring: what was fastest is used, kept, and measured once."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from espalier.cli import main
from espalier.compiler import blocks
from espalier.runtime import tune
from espalier.runtime.cache import Shelf, folder, identity
from espalier.runtime.executable import compile


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 32, 1),
    ]
    net = nn.Sequential(*layers, nn.Conv2d(32, 16, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(16 * 25, 40)).eval()
    with torch.no_grad():
        net[3].weight *= torch.rand(8, 24, 1, 1).repeat_interleave(4, 0) < 0.3
        net[6].weight *= torch.rand_like(net[6].weight) < 0.1
    return net


X = torch.randn(2, 3, 10, 10)


def formats(executable) -> dict[str, str]:
    return {row.step: row.format for row in executable.describe() if row.op in ("conv", "linear")}


def preferring(name: str):
    """Measurements in which one format takes half of the time of all others."""

    def measured(graph, node, matrix, op, key, formats, threads) -> dict[str, float]:
        return {f"{key} {f}": 1.0 if f.startswith(name) else 2.0 for f in formats}

    return measured


def test_results_stay_right(network, assert_close) -> None:
    executable = compile(network, X, threads=1, tune=True)
    with torch.no_grad():
        assert_close(executable(X), network(X))


@pytest.mark.parametrize("name", ["blocks/1", "blocks/4", "blocks/8", "dense"])
def test_the_fastest_format_is_used(network, monkeypatch, assert_close, name) -> None:
    monkeypatch.setattr(tune, "_measured", preferring(name))
    executable = compile(network, X, threads=1, tune=True)
    found = formats(executable)
    assert set(found) == {"conv2d", "conv2d_2", "conv2d_3", "linear"}
    height = name.partition("/")[2]
    assert all(f.startswith(name) for step, f in found.items() if step != "conv2d_3"), found
    assert found["conv2d_3"].startswith("grouped") and found["conv2d_3"].endswith(height)
    if name != "dense":  # which is also what the estimate takes for full weights
        rows = {row.step: row.reason for row in executable.describe()}
        assert "fastest of those measured here" in rows["conv2d"]
    with torch.no_grad():
        assert_close(executable(X), network(X))


def test_what_is_hardly_faster_changes_nothing(network, monkeypatch) -> None:
    def measured(graph, node, matrix, op, key, formats, threads) -> dict[str, float]:
        return {f"{key} {f}": 0.97 if f == "blocks/1" else 1.0 for f in formats}

    monkeypatch.setattr(tune, "_measured", measured)
    assert formats(compile(network, X, threads=1, tune=True)) == formats(compile(network, X, threads=1))


def test_a_layer_is_measured_once(network, monkeypatch, cache) -> None:
    first = compile(network, X, threads=1, tune=True)
    assert list(cache.rglob("*.json"))
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_measured", lambda *a: pytest.fail("measured again"))
        assert formats(compile(network, X, threads=1, tune=True)) == formats(first)
    asked = []
    monkeypatch.setattr(tune, "_measured", lambda *a: asked.append(a) or preferring("dense")(*a))
    compile(network, X, threads=2, tune=True)  # another number of threads is another measurement
    assert len(asked) == 4


def test_a_damaged_cache_is_measured_anew(network, cache) -> None:
    compile(network, X, threads=1, tune=True)
    (path,) = cache.rglob("*.json")
    for text in ("{", json.dumps({"who": {}, "ms": {}}), json.dumps({"who": identity(1), "ms": {"a": "b"}})):
        path.write_text(text)
        with pytest.warns(UserWarning, match="measured anew"):
            compile(network, X, threads=1, tune=True)
        assert len(json.loads(path.read_text())["ms"]) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(network, X, threads=1, tune=True)


def test_a_cache_that_cannot_be_written_costs_no_result(network, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "file" / "deeper"))
    assert folder() == tmp_path / "file" / "deeper"
    with pytest.warns(UserWarning, match="cannot be kept"):
        executable = compile(network, X, threads=1, tune=True)
    assert formats(executable)


def test_shelves_join_what_others_wrote(tmp_path) -> None:
    one, other = (Shelf("formats", {"a": 1}, tmp_path) for _ in range(2))
    one.add({"x": 1.0})
    other.add({"y": 2})
    assert one.read() == {"x": 1.0, "y": 2.0}
    assert Shelf("formats", {"a": 2}, tmp_path).read() == {}


def test_a_chooser_decides_only_while_it_is_set() -> None:
    matrix = np.eye(16, dtype=np.float32)
    usual = blocks.choose(matrix, "conv").format
    with blocks.choosing(lambda m, op: "dense/4"):
        assert blocks.choose(matrix, "conv").format == "dense/4"
        with blocks.choosing(None):
            assert blocks.choose(matrix, "conv").format == usual
    assert blocks.choose(matrix, "conv").format == usual
    for op in ("conv", "linear"):
        for name in blocks.formats(matrix, op):
            assert blocks.stored(matrix, name, "").blocks.height == int(name.partition("/")[2])


def test_the_command_line_tunes(cache, capsys) -> None:
    assert main(["bench", "lenet_digits", "--density", "0.3", "--rounds", "2", "--tune", "true"]) == 0
    assert "espalier, uncut" in capsys.readouterr().out
    (path,) = cache.rglob("*.json")
    assert len(json.loads(path.read_text())["ms"]) > 10
