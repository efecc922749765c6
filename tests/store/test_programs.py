"""Compiled networks in files: loaded without compiling, refused when damaged, compiled again for another engine."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import espalier as es
from espalier.errors import EspalierError, FileFormatError
from espalier.runtime import executable as executable_file
from espalier.store import container
from tests.networks.pictures import ShuffleNet
from tests.networks.tokens import Bert, ViT


@pytest.fixture(scope="module", params=[ShuffleNet, ViT, Bert])
def program(request: pytest.FixtureRequest) -> es.Executable:
    torch.manual_seed(0)
    kind = request.param
    x = torch.randint(0, 50, (2, 12)) if kind is Bert else torch.randn(2, *kind.shape)
    return es.compile(kind().eval(), x, threads=1)


def example(program: es.Executable, batch: int) -> torch.Tensor:
    value = program.graph.values[program.graph.inputs[0]]
    shape = (batch, *value.shape[1:])
    return torch.randn(shape) if value.dtype.is_floating_point else torch.randint(0, 50, shape)


def refuse_to_compile(*_: object) -> object:
    raise AssertionError("compiled again")


def test_nothing_is_compiled_again(program: es.Executable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    es.save(program, None, tmp_path / "net.esp", metadata={"top1": 0.5})
    monkeypatch.setattr(executable_file, "split", refuse_to_compile)
    loaded = es.load(tmp_path / "net.esp", threads=2)
    assert loaded.threads == 2 and loaded.fallbacks == program.fallbacks
    assert loaded.describe() == program.describe()
    for batch in (1, 3):
        x = example(program, batch)
        for a, b in zip(leaves(loaded(x)), leaves(program(x)), strict=True):
            assert torch.equal(a, b)
    assert loaded.profile(example(program, 1)).keys() == program.profile(example(program, 1)).keys()
    es.save(loaded, None, tmp_path / "again.esp", metadata={"top1": 0.5})
    assert (tmp_path / "again.esp").read_bytes() == (tmp_path / "net.esp").read_bytes()


def leaves(tree: Any) -> list[torch.Tensor]:
    return [tree] if isinstance(tree, torch.Tensor) else [leaf for part in tree for leaf in leaves(part)]


def test_another_engine_compiles_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    monkeypatch.setattr(container, "fingerprint", lambda: "of another engine")
    es.save(es.compile(model, x), None, tmp_path / "net.esp")
    monkeypatch.undo()
    calls: list[object] = []
    whole = executable_file.split
    monkeypatch.setattr(executable_file, "split", lambda graph, threads: calls.append(graph) or whole(graph, threads))
    torch.testing.assert_close(es.load(tmp_path / "net.esp")(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


def altered(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the manifest of a file, checksum and all."""
    data = path.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    manifest, body = json.loads(data[48 : 48 + length]), data[48 + length :]
    change(manifest)
    text = json.dumps(manifest).encode()
    head = data[:12] + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest()
    path.write_bytes(head + text + body)


def _swap(manifest: dict[str, Any]) -> None:
    pieces = manifest["programs"]["pieces"]
    for key in ("nodes", "reasons", "steps"):
        pieces[0][key], pieces[-1][key] = pieces[-1].get(key), pieces[0].get(key)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no pieces": lambda m: m["programs"].pop("pieces"),
    "no engine": lambda m: m["programs"].pop("engine"),
    "a word": lambda m: m.update(programs="many"),
    "a node too many": lambda m: m["programs"]["pieces"][0]["nodes"].append("linear"),
    "a node too few": lambda m: m["programs"]["pieces"][0]["nodes"].pop(),
    "nodes of another piece": _swap,
    "a number for a node": lambda m: m["programs"]["pieces"][0]["nodes"].append(3),
    "a step too few": lambda m: m["programs"]["pieces"][-1]["steps"].pop(),
    "an unknown step": lambda m: m["programs"]["pieces"][-1]["steps"][0].update(op="format disk"),
    "a wrong size": lambda m: m["programs"]["pieces"][-1]["steps"][0].update(out=[1, 2]),
    "a bomb": lambda m: m["programs"]["pieces"][-1].update(unpacked=2**50),
    "another checksum": lambda m: m["programs"]["pieces"][-1].update(sha256="0" * 64),
    "another place": lambda m: m["programs"]["pieces"][-1].update(offset=0),
    "another input": lambda m: (
        m["graph"]["values"][0].update(shape=[2, 9]) if isinstance(m["graph"]["values"], list) else m.pop("graph")
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_programs_are_refused(name: str, tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).cumsum(1))

    path = tmp_path / "net.esp"
    es.save(es.compile(Parts().eval(), torch.randn(2, 4), threads=1), None, path)
    altered(path, CHANGES[name])
    with pytest.raises(FileFormatError, match=r"net\.esp"):
        es.load(path)


def test_a_hostile_program_is_an_error_or_runs(tmp_path: Path) -> None:
    """Bytes that the engine must judge: all checksums are right."""
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval(),
        torch.randn(1, 3, 4, 4),
    )
    program, rng, path = es.compile(model, x, threads=1), random.Random(0), tmp_path / "net.esp"
    whole = program.loaded()[0][1].to_bytes()
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(16, len(damaged))] ^= 1 << rng.randrange(8)
        pieces = container.dump(program)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(container, "dump", lambda _, p=pieces, d=damaged: [(p[0][0], bytes(d))])
            es.save(program, None, path)
        try:
            es.load(path, threads=1)(x)
        except EspalierError:
            refused += 1
    assert refused > 10


def test_the_most_samples(program: es.Executable) -> None:
    assert program.max_batch == 2**31 - 1
    fixed = es.compile(nn.Flatten(0), torch.randn(1, 3), threads=1)
    assert fixed.max_batch in (1, 2**31 - 1)
