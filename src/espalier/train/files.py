"""Reading MNIST and CIFAR from the files that their own sites distribute."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from espalier.errors import DataError
from espalier.train.sources import SOURCES

Arrays = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W], labels int64 [N]
_PIXELS = 3 * 32 * 32
_BYTES = 8  # idx's code for unsigned bytes


def mnist(root: Path) -> tuple[Arrays, Arrays]:
    """MNIST from its idx files (also gzipped) in root/MNIST/raw or root itself: training set, test set.

    Raises DataError for files that are missing, truncated, or do not belong together.

    >>> (images, labels), test = mnist(Path("data"))  # doctest: +SKIP
    """
    stems = ("train", "t10k")
    folder = next((f for f in (root / "MNIST" / "raw", root) if _idx(f, "train-images-idx3-ubyte")), None)
    if folder is None:
        names = ", ".join(f"{stem}-{what}-ubyte" for stem in stems for what in ("images-idx3", "labels-idx1"))
        raise _absent("mnist", root, f"{names} (or these with .gz), in MNIST/raw or right there,")
    pairs = []
    for stem in stems:
        images = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} {stem} images but {len(labels)} labels")
        pairs.append((torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    return pairs[0], pairs[1]


def cifar10(root: Path) -> tuple[Arrays, Arrays]:
    """CIFAR-10 from its binary batches in root/cifar-10-batches-bin or root itself: training set, test set.

    Raises DataError for files that are missing, truncated or of another kind.

    >>> (images, labels), test = cifar10(Path("data"))  # doctest: +SKIP
    """
    names = [f"data_batch_{k}.bin" for k in range(1, 6)]
    folder = _folder(root, "cifar-10-batches-bin", [*names, "test_batch.bin"], "cifar10")
    train = [_read_cifar(folder / name, (10,)) for name in names]
    images, labels = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    return (images, labels), _read_cifar(folder / "test_batch.bin", (10,))


def cifar100(root: Path) -> tuple[Arrays, Arrays]:
    """CIFAR-100 (fine labels) from its binary files in root/cifar-100-binary or root itself: training set, test set.

    Raises DataError for files that are missing, truncated or of another kind.

    >>> (images, labels), test = cifar100(Path("data"))  # doctest: +SKIP
    """
    folder = _folder(root, "cifar-100-binary", ["train.bin", "test.bin"], "cifar100")
    return _read_cifar(folder / "train.bin", (20, 100)), _read_cifar(folder / "test.bin", (20, 100))


def _folder(root: Path, name: str, wanted: list[str], data: str) -> Path:
    for folder in (root / name, root):
        if any((folder / file).exists() for file in wanted):
            if missing := [file for file in wanted if not (folder / file).exists()]:
                raise DataError(f"{folder}: {', '.join(missing)} is missing beside the others of {data}")
            return folder
    raise _absent(data, root, f"{', '.join(wanted)}, in {name} or right there,")


def _absent(data: str, root: Path, wanted: str) -> DataError:
    addresses = " ".join(address for address, _ in SOURCES[data].files)
    return DataError(
        f"{data}: expected {wanted} under {root}. Fetch them (from {addresses}) by "
        f'python -c "from espalier.train import download; download({data!r}, {str(root)!r})", '
        "or say by --data-root where they are"
    )


def _idx(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)


def _read_idx(folder: Path, name: str, dims: int) -> np.ndarray:
    path = _idx(folder, name)
    if path is None:
        raise DataError(f"{folder / name} (or .gz) is missing")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    header = 4 + 4 * dims
    if len(raw) < header or raw[:4] != bytes([0, 0, _BYTES, dims]):
        raise DataError(f"{path} ({len(raw)} bytes) is no idx file of bytes in {dims} dimensions")
    shape = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(dims)]
    if len(raw) != header + math.prod(shape):
        raise DataError(f"{path}: {len(raw)} bytes, but its header {shape} says {header + math.prod(shape)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _read_cifar(path: Path, classes: tuple[int, ...]) -> Arrays:
    """Rows of a byte per label (as many kinds as `classes`; the last is the one we want) and 3072 of image, CHW."""
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    width = len(classes) + _PIXELS
    if len(raw) == 0 or len(raw) % width:
        raise DataError(f"{path}: {len(raw)} bytes are not a whole number of rows of {width}: truncated?")
    rows = raw.reshape(-1, width)
    largest = rows[:, : len(classes)].max(0)
    if any(label >= count for label, count in zip(largest, classes)):
        raise DataError(
            f"{path}: labels up to {largest.tolist()}, expected below {list(classes)}: another kind of file?"
        )
    images = rows[:, len(classes) :].reshape(-1, 3, 32, 32).copy()
    return torch.from_numpy(images), torch.from_numpy(rows[:, len(classes) - 1].astype(np.int64))
