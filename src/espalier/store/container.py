"""One file for a network: structure and tensors, compressed, without pickle, checked before anything of it is used.

    "ESPALIER" | version u32 | length of the manifest u32 | SHA-256 of the manifest | manifest (JSON) | sections

The manifest holds the graph's structure and, for every tensor, shape, dtype, coding, place, size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, FileFormatError
from espalier.graph import ExampleInputs, Graph, capture
from espalier.graph.serial import DTYPES, from_json, to_json
from espalier.runtime import Executable, compile
from espalier.store.coding import CODINGS, encode

MAGIC, VERSION = b"ESPALIER", 1
_HEAD = len(MAGIC) + 8 + 32
_LARGEST = 2**36  # bytes that one tensor may unpack to


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: what it is, the share of it that is not zero, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    density: float
    coding: str
    stored_bytes: int


@dataclass(frozen=True)
class FileInfo:
    """What a file holds."""

    size_bytes: int
    version: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, Any]


def save(
    model: nn.Module | Graph,
    example_inputs: ExampleInputs | None,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write what `model` computes in eval mode, with its weights, to one ``.esp`` file; whole or not at all.

    metadata: plain JSON values to go along. Raises CaptureError for a network that cannot be captured, FileFormatError
    for one with a tensor that cannot be stored or a disk that is full; the file that was there stays then.
    """
    if not isinstance(model, Graph):
        assert example_inputs is not None, "a module needs example inputs"
        model = capture(model, example_inputs)
    sections, rows, place = [], [], 0
    for name, tensor in model.tensors.items():
        row, data = _packed(name, tensor, path)
        rows.append({**row, "offset": place})
        sections.append(data)
        place += len(data)
    manifest = {"graph": to_json(model), "tensors": rows, "metadata": dict(metadata or {})}
    text = json.dumps(manifest, separators=(",", ":"), allow_nan=True).encode()
    head = MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest()
    _write(Path(path), [head, text, *sections])


def load(path: str | Path, *, threads: int | None = None) -> Executable:
    """The network of a file, compiled for this machine; ``.to_module()`` gives an `nn.Module` that trains.

    Raises FileFormatError, naming the file and the cause, for anything that is not a whole and sound .esp file.

    >>> es.load("model.esp")(torch.randn(1, 3, 224, 224))
    """
    return compile(load_graph(path), threads=threads)


def load_graph(path: str | Path) -> Graph:
    """The graph of a file. Raises FileFormatError."""
    manifest, body = _read(path)
    tensors: dict[str, Tensor] = {}
    for row in manifest["tensors"]:
        try:
            name, tensor = _unpacked(row, body)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise FileFormatError(path, f"tensor {_name(row)} is damaged: {error}") from None
        if name in tensors:
            raise FileFormatError(path, f"tensor {name!r} stands twice in it")
        tensors[name] = tensor
    try:
        graph = from_json(manifest["graph"], tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(path, f"its graph cannot be: {error}") from None
    for name in graph.parameters:
        if graph.tensors[name].is_floating_point():
            graph.tensors[name].requires_grad_(True)
    return graph


def info(path: str | Path) -> FileInfo:
    """What a file holds, tensor by tensor, without running anything. Raises FileFormatError."""
    manifest, _ = _read(path)
    graph = load_graph(path)
    rows = tuple(
        TensorInfo(
            row["name"],
            tuple(row["shape"]),
            row["dtype"],
            float(graph.tensors[row["name"]].count_nonzero()) / max(1, graph.tensors[row["name"]].numel()),
            row["coding"],
            row["size"],
        )
        for row in manifest["tensors"]
    )
    return FileInfo(Path(path).stat().st_size, VERSION, rows, manifest["metadata"])


# -- writing ---------------------------------------------------------------------------------------


def _packed(name: str, tensor: Tensor, path: str | Path) -> tuple[dict[str, Any], bytes]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise FileFormatError(path, f"tensor {name} of dtype {dtype} cannot be stored; there are {', '.join(DTYPES)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    words = flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")
    coding, data = encode(words)
    digest = hashlib.sha256(data).hexdigest()
    row = {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": dtype,
        "coding": coding,
        "size": len(data),
        "sha256": digest,
    }
    return row, data


def _write(path: Path, parts: list[bytes]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as stream:
            for data in parts:
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FileFormatError(
            path, f"cannot be written: {error.strerror or error}. What was there before is whole"
        ) from error
    except BaseException:  # Ctrl-C: leave nothing half behind
        part.unlink(missing_ok=True)
        raise


# -- reading ---------------------------------------------------------------------------------------


def _read(path: str | Path) -> tuple[dict[str, Any], memoryview]:
    """The manifest, checked as a whole, and the sections."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FileFormatError(path, f"cannot be read: {error.strerror}") from None
    if data[: len(MAGIC)] != MAGIC:
        raise FileFormatError(path, "is no .esp file")
    if len(data) < _HEAD:
        raise FileFormatError(path, f"is cut off: {len(data)} bytes are not even a header")
    version, length = (int.from_bytes(data[at : at + 4], "little") for at in (8, 12))
    if version != VERSION:
        raise FileFormatError(
            path, f"has format version {version}, this espalier reads {VERSION}: use a matching release"
        )
    text = data[_HEAD : _HEAD + length]
    if len(text) != length:
        raise FileFormatError(path, f"is cut off: its manifest should have {length} bytes, {len(text)} are there")
    if hashlib.sha256(text).digest() != data[16:_HEAD]:
        raise FileFormatError(path, "was altered: the checksum of its manifest is wrong")
    try:
        manifest = json.loads(text, object_pairs_hook=_no_doubles)
        sound = (
            isinstance(manifest, dict)
            and isinstance(manifest["tensors"], list)
            and isinstance(manifest["metadata"], dict)
        )
    except (ValueError, KeyError, RecursionError) as error:
        raise FileFormatError(path, f"has a manifest that cannot be read: {error}") from None
    body = memoryview(data)[_HEAD + length :]
    if not sound or _extent(manifest["tensors"], path) != len(body):
        raise FileFormatError(path, f"is cut off or padded: {len(body)} bytes of tensors do not fit its manifest")
    return manifest, body


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def _extent(rows: list[Any], path: str | Path) -> int:
    """Where the sections end; each must begin where the one before it ended."""
    place = 0
    for row in rows:
        if (
            not isinstance(row, dict)
            or type(row.get("size")) is not int
            or row["size"] < 0
            or row.get("offset") != place
        ):
            raise FileFormatError(path, f"tensor {_name(row)} has no sound place in it")
        place += row["size"]
    return place


def _name(row: Any) -> str:
    return repr(row.get("name"))[:80] if isinstance(row, dict) else "?"


def _unpacked(row: dict[str, Any], body: memoryview) -> tuple[str, Tensor]:
    name, shape = row["name"], row["shape"]
    if not isinstance(name, str) or not isinstance(shape, list) or len(shape) > 8:
        raise ValueError("no name or shape")
    if any(type(size) is not int or not 0 <= size < 2**40 for size in shape):
        raise ValueError(f"shape {shape!r:.80} cannot be")
    if row["dtype"] not in DTYPES or row["coding"] not in CODINGS:
        raise ValueError(f"dtype {row['dtype']!r:.40} or coding {row['coding']!r:.40} is unknown")
    data = bytes(body[row["offset"] : row["offset"] + row["size"]])
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise ValueError("its checksum is wrong")
    dtype = DTYPES[row["dtype"]]
    item, count = torch.empty(0, dtype=dtype).element_size(), math.prod(shape)
    if count * item > _LARGEST:
        raise ValueError(f"{count} entries are more than is read")
    try:
        words = CODINGS[row["coding"]].decode(data, np.dtype(f"<u{item}"), count)
    except (EspalierError, AssertionError, RuntimeError, MemoryError) as error:
        raise ValueError(str(error)) from None
    tensor = torch.from_numpy(words.view(np.uint8).copy()).view(dtype).reshape(shape)
    return name, tensor
