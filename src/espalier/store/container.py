"""One file for a network: structure and tensors, compressed, without pickle, checked before anything of it is used.

    "ESPALIER" | version u32 | length of the manifest u32 | SHA-256 of the manifest | manifest (JSON) | sections

The manifest holds the graph's structure and, for every tensor, shape, dtype, coding, place, size and SHA-256. A file of
a compiled network also holds its programs, in sections behind the tensors, for the engine that they were made for; with
another one the network is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

from espalier.errors import EspalierError, FileFormatError, ShapeError
from espalier.graph import ExampleInputs, Graph, capture
from espalier.graph.serial import DTYPES, LARGEST, MOST_RANK, from_json, to_json
from espalier.runtime import Executable, compile, dump, fingerprint, restore
from espalier.store.coding import CODINGS, encode, unzipped
from espalier.store.soundness import check_sound
from espalier.store.writing import write_whole

MAGIC, VERSION = b"ESPALIER", 2
_HEAD = len(MAGIC) + 8 + 32
# Bytes that all tensors together may unpack to: so many for any file, and so many times its size for a large one.
_UNPACKED, _EXPANSION = 2**30, 1000


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
    model: nn.Module | Graph | Executable,
    example_inputs: ExampleInputs | None,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write what `model` computes in eval mode, with its weights, to one ``.esp`` file; whole or not at all.

    model: a module, a graph, or a compiled network, which the same engine then loads without compiling it again.
    example_inputs: what to capture a module with; the others need none. metadata: plain JSON values to go along.

    Raises CaptureError for a network that cannot be captured, FileFormatError for a tensor or metadata that cannot be
    stored, a path that cannot be written or a disk that is full; the file that was there stays whole then.

    >>> es.save(model, torch.randn(1, 3, 224, 224), "model.esp", metadata={"top1": 0.761})
    """
    programs = _packed_programs(model) if isinstance(model, Executable) else []
    if isinstance(model, Executable):
        model = model.graph
    if not isinstance(model, Graph):
        if example_inputs is None:
            raise ShapeError("save needs example inputs for a module: save(model, torch.randn(1, 3, 224, 224), path)")
        model = capture(model, example_inputs)
    sections, rows, place = [], [], 0
    for name, tensor in model.tensors.items():
        row, data = _packed(name, tensor, path)
        rows.append({**row, "offset": place})
        sections.append(data)
        place += len(data)
    manifest = {"graph": to_json(model), "tensors": rows, "metadata": dict(metadata or {})}
    if programs:
        manifest["programs"] = {"engine": fingerprint(), "pieces": [row for row, _ in programs]}
        for row, data in programs:
            row["offset"] = place
            sections.append(data)
            place += len(data)
    try:
        text = json.dumps(manifest, separators=(",", ":"), allow_nan=True).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(path, f"cannot be written: not plain JSON values: {error}") from None
    head = MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest()
    write_whole(path, [head, text, *sections])


def load(path: str | Path, *, threads: int | None = None) -> Executable:
    """The network of a file, compiled for this machine; ``.to_module()`` gives an `nn.Module` that trains.

    Raises FileFormatError, naming the file and the cause, for anything that is not a whole and sound .esp file.

    >>> es.load("model.esp")(torch.randn(1, 3, 224, 224))
    """
    manifest, body = _read(path)
    graph = _graph(path, manifest, body)
    programs = manifest.get("programs")
    try:
        if programs is not None and programs["engine"] == fingerprint():
            return _restored(path, graph, programs, body, threads)
        return compile(graph, threads=threads)
    except EspalierError:
        raise  # of this machine, not of the file
    except Exception as error:  # an attribute that the op can do without, but not the compiler
        raise FileFormatError(path, f"its graph cannot be compiled: {type(error).__name__}: {error}") from error


def load_graph(path: str | Path) -> Graph:
    """The graph of a file, without compiling it. Raises FileFormatError."""
    return _graph(path, *_read(path))


def info(path: str | Path) -> FileInfo:
    """What a file holds, tensor by tensor, without running anything. Raises FileFormatError."""
    manifest, body = _read(path)
    tensors = _graph(path, manifest, body).tensors
    rows = []
    for row in manifest["tensors"]:
        tensor = tensors[row["name"]]
        density = float(tensor.count_nonzero()) / max(1, tensor.numel())
        rows.append(TensorInfo(row["name"], tuple(tensor.shape), row["dtype"], density, row["coding"], row["size"]))
    return FileInfo(Path(path).stat().st_size, VERSION, tuple(rows), manifest["metadata"])


# -- writing ---------------------------------------------------------------------------------------


def _packed(name: str, tensor: Tensor, path: str | Path) -> tuple[dict[str, Any], bytes]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise FileFormatError(path, f"tensor {name} of dtype {dtype} cannot be stored; there are {', '.join(DTYPES)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    words = flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}") if flat.numel() else np.zeros(0, "<u1")
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


def _packed_programs(program: Executable) -> list[tuple[dict[str, Any], bytes]]:
    made = []
    for row, code in dump(program):
        data = zstandard.ZstdCompressor(level=1).compress(code) if code else b""
        digest = hashlib.sha256(data).hexdigest()
        made.append(({**row, "size": len(data), "unpacked": len(code), "sha256": digest}, data))
    return made


# -- reading ---------------------------------------------------------------------------------------


def _read(path: str | Path) -> tuple[dict[str, Any], memoryview]:
    """The manifest, checked as a whole, and the sections."""
    try:
        with open(path, "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise FileFormatError(path, "cannot be read: it is no ordinary file")
            data = stream.read()
    except OSError as error:
        raise FileFormatError(path, f"cannot be read: {error.strerror or error}") from None
    if data[: len(MAGIC)] != MAGIC:
        raise FileFormatError(path, "is no .esp file")
    if len(data) < _HEAD:
        raise FileFormatError(path, f"is cut off: {len(data)} bytes are not even a header")
    version, length = (int.from_bytes(data[at : at + 4], "little") for at in (8, 12))
    if version != VERSION:
        remedy = "upgrade espalier" if version > VERSION else "save it again with this espalier"
        raise FileFormatError(path, f"has format version {version}, this espalier reads version {VERSION}: {remedy}")
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
    programs: Any = manifest.get("programs", {"engine": "", "pieces": []}) if sound else None
    sound = isinstance(programs, dict) and isinstance(programs.get("pieces"), list) and "engine" in programs
    if not sound or _extent([*manifest["tensors"], *programs["pieces"]], path) != len(body):
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
            raise FileFormatError(path, f"tensor or program {_name(row)} has no sound place in it")
        place += row["size"]
    return place


def _name(row: Any) -> str:
    return repr(row.get("name"))[:80] if isinstance(row, dict) else "?"


def _restored(
    path: str | Path, graph: Graph, programs: Mapping[str, Any], body: memoryview, threads: int | None
) -> Executable:
    """The network with the programs of the file. Raises FileFormatError for programs that are not its own."""
    room, pieces = max(_UNPACKED, _EXPANSION * len(body)), []
    try:
        for row in programs["pieces"]:
            data = bytes(body[row["offset"] : row["offset"] + row["size"]])
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise ValueError("the checksum of a program is wrong")
            size = row["unpacked"]
            if type(size) is not int or not 0 <= size <= room:
                raise ValueError(f"a program of {size!r:.40} bytes")
            room -= size
            pieces.append((row, unzipped(data, size) if size else b""))
        return restore(graph, pieces, threads)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(path, f"its programs are damaged: {error}") from error


def _graph(path: str | Path, manifest: dict[str, Any], body: memoryview) -> Graph:
    """The graph of a manifest with its tensors, everything about them checked."""
    tensors: dict[str, Tensor] = {}
    room = max(_UNPACKED, _EXPANSION * len(body))
    for row in manifest["tensors"]:
        try:
            name, tensor = _unpacked(row, body, room)
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
            raise FileFormatError(path, f"tensor {_name(row)} is damaged: {error}") from None
        if name in tensors:
            raise FileFormatError(path, f"tensor {name!r} stands twice in it")
        tensors[name] = tensor
        room -= tensor.numel() * tensor.element_size()
    try:
        graph = from_json(manifest["graph"], tensors)
        check_sound(graph)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(path, f"its graph cannot be: {error}") from None
    for name in graph.parameters:
        if graph.tensors[name].is_floating_point():
            graph.tensors[name].requires_grad_(True)
    return graph


def _unpacked(row: dict[str, Any], body: memoryview, room: int) -> tuple[str, Tensor]:
    """Name and tensor of a row, which may take up to `room` bytes."""
    name, shape = row["name"], row["shape"]
    if not isinstance(name, str) or not isinstance(shape, list) or len(shape) > MOST_RANK:
        raise ValueError("no name or shape")
    if any(type(size) is not int or not 0 <= size < LARGEST for size in shape):
        raise ValueError(f"shape {shape!r:.80} cannot be")
    if row["dtype"] not in DTYPES or row["coding"] not in CODINGS:
        raise ValueError(f"dtype {row['dtype']!r:.40} or coding {row['coding']!r:.40} is unknown")
    data = bytes(body[row["offset"] : row["offset"] + row["size"]])
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise ValueError("its checksum is wrong")
    dtype = DTYPES[row["dtype"]]
    item, count = torch.empty(0, dtype=dtype).element_size(), math.prod(shape)
    if count * item > room:
        raise ValueError(f"{count * item} bytes are more than a file of this size may unpack to")
    words = CODINGS[row["coding"]].decode(data, np.dtype(f"<u{item}"), count)
    if dtype == torch.bool and words.max(initial=0) > 1:
        raise ValueError("truth values other than 0 and 1")
    if count == 0:
        return name, torch.empty(shape, dtype=dtype)
    return name, torch.from_numpy(words.view(np.uint8).copy()).view(dtype).reshape(shape)
