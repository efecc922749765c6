"""Damaged and hostile files, checksums made right again: from `load` comes a network or a FileFormatError, no more."""

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import espalier as es
from espalier.errors import FileFormatError
from espalier.graph import OPS
from espalier.store import container
from espalier.store.coding import CODINGS

HEAD = 48
ODD = [None, -1, 0, 1, 2, 3, 2**31, 2**63, 2**70, 0.5, float("nan"), float("inf"), "x", "", [], {}, [[]], [1, 1], True]


class Small(nn.Module):
    """A bit of everything that a file can hold, and little to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.deep = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1, groups=4)
        self.fc, self.last = nn.Linear(16, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = torch.relu(self.norm(self.conv(x)))
        z = torch.cumsum(torch.cat([self.deep(y), torch.max_pool2d(y, 3, 2, 1)], 1), 1)
        return {"logits": self.last(self.fc(z[:, ::2].flatten(1))), "more": [z.mean((2, 3)), y + 1]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path, model = tmp_path_factory.mktemp("sound") / "m.esp", Small().eval()
    with torch.no_grad():
        model.conv.weight[torch.rand_like(model.conv.weight) < 0.7] = 0
        model.fc.weight[:, torch.rand(16) < 0.8] = 0
        blocks = torch.rand(32, 8).repeat_interleave(8, 1)
        model.last.weight.copy_(blocks * torch.randn(32, 64).sign())
    es.save(model, torch.randn(1, 2, 6, 6), path, metadata={"top1": 0.5})
    assert {row.coding for row in es.info(path).tensors} == set(CODINGS)
    return path.read_bytes()


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytearray]:
    length = int.from_bytes(data[12:16], "little")
    return json.loads(data[HEAD : HEAD + length]), bytearray(data[HEAD + length :])


def put_together(sound: bytes, manifest: Any, body: bytes) -> bytes:
    """A file with these parts; every checksum that can be right is right."""
    rows = manifest.get("tensors") if isinstance(manifest, dict) else None
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and type(row.get("offset")) is int and type(row.get("size")) is int:
            row["sha256"] = hashlib.sha256(body[row["offset"] : row["offset"] + row["size"]]).hexdigest()
    text = json.dumps(manifest).encode()
    return sound[:12] + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest() + text + bytes(body)


def refused(path: Path, data: bytes) -> bool:
    """Whether loading is refused; anything but a network or a FileFormatError that names the file fails the test."""
    path.write_bytes(data)
    try:
        es.load(path, threads=1)
    except FileFormatError as error:
        assert error.path == str(path) and str(error).startswith(str(path))
        return True
    return False


# -- what may be done to a file ------------------------------------------------------------------------


def any_byte(rng: random.Random, manifest: Any, body: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 4])):
        body[rng.randrange(len(body))] = rng.randrange(256)


def any_length(rng: random.Random, manifest: Any, body: bytearray) -> None:
    """A section grows or shrinks, and the places of the others follow."""
    rows = manifest["tensors"]
    k, change = rng.randrange(len(rows)), rng.choice([-5, -1, 1, 7])
    end = rows[k]["offset"] + rows[k]["size"]
    change = max(change, -rows[k]["size"])
    body[end + min(0, change) : end] = rng.randbytes(max(0, change))
    rows[k]["size"] += change
    for row in rows[k + 1 :]:
        row["offset"] += change


def any_place(rng: random.Random, manifest: Any, body: bytearray) -> None:
    """Something, anywhere in the manifest, becomes something odd, vanishes, or is copied from elsewhere."""
    tree: Any = manifest
    while True:
        key = rng.choice(list(tree) if isinstance(tree, dict) else list(range(len(tree))))
        if not (isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.85):
            break
        tree = tree[key]
    kind = rng.random()
    if kind < 0.2:
        del tree[key]
    elif kind < 0.4:
        tree[key] = copy.deepcopy(tree[rng.choice(list(tree) if isinstance(tree, dict) else list(range(len(tree))))])
    elif kind < 0.6 and type(tree[key]) in (int, float):
        tree[key] += rng.choice([-1, 1])
    else:
        tree[key] = copy.deepcopy(rng.choice(ODD))


def any_node(rng: random.Random, manifest: Any, body: bytearray) -> None:
    """A node with another op, other inputs or other attributes."""
    nodes = manifest["graph"]["nodes"]
    node, other = rng.choice(nodes), rng.choice(nodes)
    kind = rng.choice(["op", "attrs", "inputs", "input", "attr", "target"])
    if kind == "op":
        node["op"] = rng.choice([*OPS, "opaque"])
    elif kind == "input" and node["inputs"]:
        node["inputs"][rng.randrange(len(node["inputs"]))] = rng.choice([None, *manifest["graph"]["values"]])
    elif kind == "attr" and node["attrs"]:
        node["attrs"][rng.choice(list(node["attrs"]))] = copy.deepcopy(rng.choice([*ODD, [2, 2], [0, 0], [-1, 2**40]]))
    elif kind == "target":
        node["target"] = rng.choice(["aten.from_file.default", "aten.add_.Tensor", "os.system.x", "aten.relu.default"])
    elif kind in ("attrs", "inputs"):
        node[kind] = copy.deepcopy(other[kind])


def any_shape(rng: random.Random, manifest: Any, body: bytearray) -> None:
    """A tensor of another shape or dtype, in both places where it is said."""
    row = rng.choice(manifest["tensors"])
    value = manifest["graph"]["values"][row["name"]]
    if rng.random() < 0.3:
        row["dtype"] = value[1] = rng.choice(["float64", "float16", "int32", "bool", "uint8", "complex64"])
    elif row["shape"]:
        row["shape"][rng.randrange(len(row["shape"]))] = rng.choice([0, 1, 2, 2**20, 2**33, -1])
        value[0] = list(row["shape"])
    if rng.random() < 0.3:
        row["coding"] = rng.choice([*CODINGS, "pickle"])


CHANGES: list[Callable[[random.Random, Any, bytearray], None]] = [
    any_byte,
    any_length,
    any_place,
    any_node,
    any_shape,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_hostile_inside_of_sound_checksums(
    change: Callable[[random.Random, Any, bytearray], None], sound: bytes, tmp_path: Path
) -> None:
    rng, refusals, path = random.Random(1), 0, tmp_path / "m.esp"
    for _ in range(700):
        manifest, body = taken_apart(sound)
        for _ in range(rng.choice([1, 1, 1, 3])):
            try:
                change(rng, manifest, body)
            except (
                KeyError,
                IndexError,
                TypeError,
                ValueError,
                AttributeError,
            ):  # a second change met what the first one left
                break
        refusals += refused(path, put_together(sound, manifest, body))
    assert refusals > 100


def test_random_damage(sound: bytes, tmp_path: Path) -> None:
    """Checksums as they were: nothing but metadata of the header can go unseen, and that is compared too."""
    rng, path = random.Random(2), tmp_path / "m.esp"
    for _ in range(1500):
        data = bytearray(sound)
        kind = rng.random()
        if kind < 0.3:
            data = data[: rng.randrange(len(data))]
        elif kind < 0.8:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        assert bytes(data) == sound or refused(path, bytes(data))


def test_newer_and_older_versions_say_what_to_do(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.esp"
    for version, remedy in [(container.VERSION + 1, "upgrade espalier"), (0, "save it again")]:
        path.write_bytes(sound[:8] + version.to_bytes(4, "little") + sound[12:])
        with pytest.raises(FileFormatError, match=f"version {version}, .*{remedy}"):
            es.load(path)


def bomb(size: int) -> bytes:
    """A few bytes that unpack to `size` zeros, for the dense coding."""
    return CODINGS["dense"].encode(np.zeros(size, np.uint8))


@pytest.mark.parametrize("kind", ["shape", "empty", "together"])
def test_bombs_are_refused_before_they_go_off(kind: str, sound: bytes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(container, "_UNPACKED", 2**20)
    monkeypatch.setattr(container, "_EXPANSION", 10)
    manifest, body = taken_apart(sound)
    shape, count = {"shape": ([2**24], 1), "empty": ([0], 1), "together": ([2**19], 3)}[kind]
    data = bomb(2**19 if kind == "together" else 2**24)
    for k in range(count):
        place = {"offset": len(body), "size": len(data)}
        manifest["tensors"].append({"name": f"b{k}", "shape": shape, "dtype": "uint8", "coding": "dense", **place})
        manifest["graph"]["values"][f"b{k}"] = [shape, "uint8", False]
        body += data
    path = tmp_path / "m.esp"
    path.write_bytes(put_together(sound, manifest, body))
    cause = "another size" if kind == "empty" else "more than a file of this size may unpack to"
    with pytest.raises(FileFormatError, match=cause):
        container.load_graph(path)


def test_names_that_stand_twice(sound: bytes, tmp_path: Path) -> None:
    path, (manifest, body) = tmp_path / "m.esp", taken_apart(sound)
    manifest["tensors"][1]["name"] = manifest["tensors"][0]["name"]
    manifest["tensors"][1].update({k: manifest["tensors"][0][k] for k in ("shape", "dtype")})
    manifest["tensors"][1].update(coding="dense", size=manifest["tensors"][1]["size"])
    assert refused(path, put_together(sound, manifest, body))
    text = json.dumps(taken_apart(sound)[0])
    text = text.replace('"metadata":', '"metadata": {}, "metadata":').encode()
    head = sound[:12] + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest()
    path.write_bytes(head + text + bytes(body))
    with pytest.raises(FileFormatError, match="a key stands twice"):
        es.load(path)


def test_a_reader_that_believes_the_file_is_found(
    sound: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check on shapes, other errors than FileFormatError come out."""
    monkeypatch.setattr(container, "check_sound", lambda graph: None)
    rng = random.Random(1)
    with pytest.raises(Exception) as found:  # any, as long as it is another
        for _ in range(700):
            manifest, body = taken_apart(sound)
            any_node(rng, manifest, body)
            refused(tmp_path / "m.esp", put_together(sound, manifest, body))
    assert not isinstance(found.value, FileFormatError)
