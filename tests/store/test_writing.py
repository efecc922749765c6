"""Saving: whole or not at all, to the bit for every dtype."""

import builtins
import errno
import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import espalier as es
from espalier.errors import FileFormatError, ShapeError
from espalier.graph import Graph, Node, Value
from espalier.graph.serial import DTYPES
from espalier.store import container, load_graph
from espalier.store.coding import CODINGS, encode

EXAMPLE = torch.zeros(1, 4)


class Dying(io.FileIO):
    """A file that takes `room` bytes and then raises `error`."""

    room, error = 300, OSError(errno.ENOSPC, "No space left on device")

    def write(self, data: Any) -> int:
        if self.room < len(data):
            raise self.error
        self.room -= len(data)
        return super().write(data)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_whole(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.esp"
    es.save(nn.Linear(4, 2), EXAMPLE, path)
    before, ordinary = path.read_bytes(), builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        if not str(file).endswith(".part"):
            return ordinary(file, mode, *args, **named)
        made = Dying(file, mode)
        made.error = error
        return made

    monkeypatch.setattr(builtins, "open", opened)
    expected = FileFormatError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as found:
        es.save(nn.Linear(4, 3), EXAMPLE, path)
    assert isinstance(error, KeyboardInterrupt) or "No space left on device" in str(found.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.esp"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ordinary = tmp_path / "m.esp", builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        return ordinary("/dev/full", "wb") if str(file).endswith(".part") else ordinary(file, mode, *args, **named)

    monkeypatch.setattr(builtins, "open", opened)
    with pytest.raises(FileFormatError, match=r"m\.esp: cannot be written: No space left on device"):
        es.save(nn.Linear(4, 3), EXAMPLE, path)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in [tmp_path, tmp_path / "nowhere" / "m.esp", tmp_path / "file" / "m.esp", Path("/dev/null")]:
        with pytest.raises(FileFormatError, match="cannot be written"):
            es.save(nn.Linear(4, 3), EXAMPLE, path)
    for path in [tmp_path, Path("/dev/zero")]:
        with pytest.raises(FileFormatError, match="cannot be read"):
            es.load(path)
    assert not Path("/dev/null").is_file()


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link.esp").symlink_to(tmp_path / "real.esp")
    es.save(nn.Linear(4, 3), EXAMPLE, tmp_path / "link.esp")
    assert (tmp_path / "link.esp").is_symlink() and load_graph(tmp_path / "real.esp").sites()


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    graph = es.graph.capture(nn.Linear(4, 3), EXAMPLE)
    writers = [threading.Thread(target=es.save, args=(graph, None, tmp_path / "m.esp")) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert os.listdir(tmp_path) == ["m.esp"] and load_graph(tmp_path / "m.esp").sites()


def test_what_cannot_be_stored_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.esp"
    with pytest.raises(ShapeError, match="needs example inputs"):
        es.save(nn.Linear(4, 3), None, path)
    with pytest.raises(FileFormatError, match="not plain JSON values"):
        es.save(nn.Linear(4, 3), EXAMPLE, path, metadata={"model": nn.Linear(4, 3)})
    with pytest.raises(FileFormatError, match="tensor odd of dtype complex64 cannot be stored"):
        es.save(holding({"odd": torch.zeros(2, dtype=torch.complex64)}), None, path)
    assert not path.exists()


def holding(tensors: dict[str, torch.Tensor]) -> Graph:
    """A graph that adds two inputs, and has these tensors besides."""
    values = {n: Value(n, tuple(t.shape), t.dtype) for n, t in tensors.items()}
    values |= {n: Value(n, (1, 2), torch.float32, True) for n in ("x", "y", "sum")}
    return Graph(("x", "y"), ("sum",), (Node("add", "add", ("x", "y"), ("sum",), {}),), values, tensors)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    """Random bits, so every kind of number is there; the rest zeros, half of them with a sign."""
    rng, item = np.random.default_rng(seed), torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.from_numpy(np.asarray(rng.random(shape) < density))
    count = int(np.prod(shape))
    words = np.frombuffer(rng.bytes(count * item), f"<u{item}")
    zeros = (rng.random(count) < 0.5).astype(words.dtype) << np.array(8 * item - 1, words.dtype)
    words = np.where(rng.random(count) < density, words, zeros)
    return (
        torch.from_numpy(words.view(np.uint8).copy()).view(dtype).reshape(shape) if count else torch.empty(0).to(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_every_dtype_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    cases = [
        ((), 1.0),
        ((1,), 0.0),
        ((0,), 1.0),
        ((3, 0, 2), 1.0),
        ((700, 3), 0.03),
        ((64, 9), 0.5),
        ((2, 3, 4, 5), 1.0),
    ]
    tensors = {f"t{k}": random_tensor(dtype, shape, density, k) for k, (shape, density) in enumerate(cases)}
    tensors["t3"] = torch.empty((3, 0, 2), dtype=dtype)
    es.save(holding(tensors), None, tmp_path / "m.esp")
    back = load_graph(tmp_path / "m.esp").tensors
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape and back[name].dtype == tensor.dtype
        assert bits(back[name]) == bits(tensor), name


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def test_tensors_of_any_strides(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors = {"t": base.t(), "part": base[::2, 1:5], "wide": torch.randn(1, 4).expand(3, 4)}
    es.save(holding(tensors), None, tmp_path / "m.esp")
    back = load_graph(tmp_path / "m.esp").tensors
    assert all(torch.equal(back[name], x) for name, x in tensors.items())


@pytest.mark.parametrize("scheme", ["punched", "filter", "unstructured"])
def test_positions_of_structure_cost_little(scheme: str) -> None:
    """Bytes beyond those of the values alone; unstructured ones within 2 % of their entropy."""
    rng, shape = np.random.default_rng(0), (128, 576)
    alive = {
        "punched": np.repeat(np.repeat(rng.random((16, 144)) < 0.1, 8, 0), 4, 1),
        "filter": np.repeat(rng.random((128, 1)) < 0.1, 576, 1),
        "unstructured": rng.random(shape) < 0.1,
    }[scheme]
    words = np.where(alive, rng.standard_normal(shape), 0).astype(np.float32).ravel().view("<u4")
    spent = len(encode(words)[1]) - len(CODINGS["dense"].encode(words[words != 0]))
    p = alive.mean()
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8 * alive.size
    assert spent < {"punched": 0.09, "filter": 0.02, "unstructured": 1.02}[scheme] * entropy + 40


@pytest.mark.parametrize("r,c,free", [(1, 4, 0.0), (2, 4, 0.0), (4, 1, 0.5), (1, 8, 0.5)])
def test_tied_blocks_cost_a_magnitude_and_signs(r: int, c: int, free: float) -> None:
    """Half of all blocks are pruned. Four bytes a magnitude, a bit a sign, and a few bits a block."""
    rng, (rows, columns) = np.random.default_rng(0), (64, 576)
    blocks, tied = rng.standard_normal((rows // r, columns // c)), rng.random((rows // r, columns // c)) >= free
    alive = rng.random(tied.shape) < 0.5

    def spread(block: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(block, r, 0), c, 1)

    loose = rng.standard_normal((rows, columns))
    weight = np.where(spread(tied), np.abs(spread(blocks)) * np.sign(loose), loose) * spread(alive)
    words = weight.astype(np.float32).ravel().view("<u4")
    coding, data = encode(words)
    magnitudes = (tied & alive).sum() + (~tied & alive).sum() * r * c
    assert coding == "tied" and np.array_equal(CODINGS[coding].decode(data, words.dtype, words.size), words)
    assert len(data) < 1.05 * (4 * magnitudes + spread(alive).sum() / 8) + 6 * tied.size / 8
    assert len(data) < 0.96 * min(len(CODINGS[name].encode(words)) for name in ("sparse", "gaps"))


def test_zeros_with_a_sign_cost_a_bit_each() -> None:
    rng = np.random.default_rng(0)
    weight, mask = rng.standard_normal(50_000).astype(np.float32), rng.random(50_000) < 0.1
    plain, signed = (
        len(encode(w.view("<u4"))[1]) for w in (np.where(mask, weight, 0).astype(np.float32), weight * mask)
    )
    assert signed < plain + 45_000 / 8 + 100


def test_info_counts(tmp_path: Path) -> None:
    model = nn.Linear(100, 10)
    with torch.no_grad():
        model.weight[:, 20:] = 0
    es.save(model, torch.zeros(1, 100), tmp_path / "m.esp", metadata={"top1": 0.9, "classes": ["a", "b"]})
    facts = es.info(tmp_path / "m.esp")
    assert facts.metadata == {"top1": 0.9, "classes": ["a", "b"]} and facts.version == container.VERSION
    row = {t.name: t for t in facts.tensors}["weight"]
    assert (row.shape, row.dtype, row.coding) == ((10, 100), "float32", "gaps") and row.density == pytest.approx(0.2)
    assert facts.size_bytes == (tmp_path / "m.esp").stat().st_size > sum(t.stored_bytes for t in facts.tensors)
