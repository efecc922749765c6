"""The file: what is loaded is what was saved; whatever else a file holds, only FileFormatError comes out."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import espalier as es
from espalier.errors import FileFormatError
from espalier.graph import capture
from espalier.store import container
from espalier.store.coding import CODINGS
from tests.graph.networks import NETWORKS, Several, stirred


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_loaded_is_what_was_saved(kind: type[nn.Module], tmp_path: Path) -> None:
    model, example = stirred(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.masked_fill_(torch.rand_like(parameter) < 0.7, 0)
    es.save(model, example, tmp_path / "m.esp", metadata={"made": "here"})
    loaded = es.load(tmp_path / "m.esp")
    x = torch.randn(3, *kind.shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
        module = loaded.to_module()
        assert torch.equal(module(x), es.graph.to_module(capture(model, example))(x))
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.named_parameters() if name in state)
    assert all(p.requires_grad for p in module.parameters())
    assert es.info(tmp_path / "m.esp").metadata == {"made": "here"}


def test_a_weight_that_is_computed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Flatten(), weight_norm(nn.Linear(24, 2))
    ).eval()
    x = torch.randn(2, 3, 4, 4)
    es.save(model, x, tmp_path / "m.esp")
    with torch.no_grad():
        torch.testing.assert_close(es.load(tmp_path / "m.esp")(x), model(x), rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    model, inputs = Several().eval(), (torch.randn(1, 8), torch.randn(1, 6))
    es.save(model, inputs, tmp_path / "m.esp")
    got, want = es.load(tmp_path / "m.esp")(*inputs), model(*inputs)
    torch.testing.assert_close(got["logits"], want["logits"].detach())


WORDS = [
    np.zeros(0, np.uint32),
    np.zeros(1000, np.uint32),
    np.arange(1, 1001, dtype=np.uint16),
    np.where(np.arange(5000) % 700 == 3, 7, 0).astype(np.uint32),
    (np.random.default_rng(0).integers(0, 2**32, 3000) * (np.random.default_rng(1).random(3000) < 0.2)).astype(
        np.uint32
    ),
    np.array([0, 0, 5], np.uint8),
    np.array([2**63], np.uint64),
]


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("words", WORDS, ids=lambda w: f"{w.dtype}-{len(w)}")
def test_every_coding_is_exact(name: str, words: np.ndarray) -> None:
    data = CODINGS[name].encode(words)
    assert np.array_equal(CODINGS[name].decode(data, words.dtype, len(words)), words)


def test_odd_numbers_survive(tmp_path: Path) -> None:
    graph = capture(nn.Linear(4, 2), torch.zeros(1, 4))
    with torch.no_grad():
        graph.tensors["weight"].copy_(torch.tensor([[0.0, -0.0, float("nan"), float("inf")], [1e-45, -1, 0, 0]]))
    es.save(graph, None, tmp_path / "m.esp")
    back = container.load_graph(tmp_path / "m.esp").tensors["weight"]
    assert torch.equal(back.view(torch.int32), graph.tensors["weight"].detach().view(torch.int32))


def test_zeros_cost_next_to_nothing(tmp_path: Path) -> None:
    model = nn.Linear(512, 512)
    es.save(model, torch.zeros(1, 512), tmp_path / "dense.esp")
    with torch.no_grad():
        model.weight.masked_fill_(torch.rand_like(model.weight) > 0.05, 0)
    es.save(model, torch.zeros(1, 512), tmp_path / "sparse.esp")
    sparse, dense = ((tmp_path / f"{name}.esp").stat().st_size for name in ("sparse", "dense"))
    assert sparse < 0.09 * dense  # 5 % of the values and 0.29 bits a position


# -- files that are not what they claim to be -------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "m.esp"
    model, example = stirred(NETWORKS[3])
    with torch.no_grad():
        model.expand.weight[3:9] = 0
    es.save(model, example, path)
    return path.read_bytes()


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(FileFormatError) as error:
        container.load_graph(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_damage_is_named(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.esp"
    assert "is no .esp file" in refused(path, b"PK\x03\x04" + sound)
    assert "cut off" in refused(path, sound[:30])
    assert "cut off" in refused(path, sound[:-1])
    assert "padded" in refused(path, sound + b"x")
    assert "version 9" in refused(path, sound[:8] + (9).to_bytes(4, "little") + sound[12:])
    assert "checksum of its manifest" in refused(path, sound[:60] + b"#" + sound[61:])
    assert "checksum is wrong" in refused(path, sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:])
    with pytest.raises(FileFormatError, match="cannot be read"):
        es.load(tmp_path / "nowhere.esp")


def rebuilt(sound: bytes, change) -> bytes:
    """The file with its manifest changed and every checksum made right again."""
    length = int.from_bytes(sound[12:16], "little")
    manifest, body = json.loads(sound[48 : 48 + length]), bytearray(sound[48 + length :])
    change(manifest, body)
    for row in manifest["tensors"]:
        if isinstance(row, dict) and isinstance(row.get("offset"), int) and isinstance(row.get("size"), int):
            row["sha256"] = hashlib.sha256(body[row["offset"] : row["offset"] + row["size"]]).hexdigest()
    text = json.dumps(manifest).encode()
    return sound[:12] + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest() + text + bytes(body)


def test_a_sound_file_with_a_hostile_inside_is_refused_or_harmless(sound: bytes, tmp_path: Path) -> None:
    path, rng = tmp_path / "bad.esp", random.Random(0)
    odd = [None, -1, 0, 1, 2**70, 3.5, "x", "", [], {}, [[]], True, "aten.from_file.default", "conv", 10**9]

    def spoil(tree, depth: int = 0):
        """Replace something, somewhere in a tree of lists and dicts."""
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.85:
            spoil(tree[key], depth + 1)
        else:
            tree[key] = rng.choice(odd)

    def change(manifest, body) -> None:
        if rng.random() < 0.3:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        else:
            spoil(manifest)

    refusals = 0
    for _ in range(1500):
        try:
            path.write_bytes(rebuilt(sound, change))
            container.load_graph(path)
        except FileFormatError:
            refusals += 1
        except (TypeError, KeyError) as error:  # the test's own rebuilding met a manifest without tensors
            assert "rebuilt" in str([f.name for f in __import__("traceback").extract_tb(error.__traceback__)])
    assert refusals > 500


def test_a_tensor_that_unpacks_to_more_is_refused(sound: bytes, tmp_path: Path) -> None:
    bomb = CODINGS["dense"].encode(np.zeros(10_000_000, np.uint32))

    def change(manifest, body) -> None:
        row = manifest["tensors"][-1]
        body[row["offset"] :] = bomb
        row["size"] = len(bomb)

    assert "unpacks to another size" in refused(tmp_path / "bomb.esp", rebuilt(sound, change))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.esp"
    es.save(nn.Linear(4, 2), torch.zeros(1, 4), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(FileFormatError, match="No space left"):
        es.save(nn.Linear(4, 3), torch.zeros(1, 4), path)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.part"))
