"""Reading data sets from the files that their own sites distribute."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from espalier.errors import DataError

Arrays = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W], labels int64 [N]


@dataclass(frozen=True)
class Source:
    """Where a data set's files come from: (address, MD5) of each; archives are unpacked after checking."""

    files: tuple[tuple[str, str], ...]
    folder: str


SOURCES: dict[str, Source] = {
    "mnist": Source(
        tuple(
            (f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz", md5)
            for name, md5 in (
                ("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                ("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432"),
                ("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3"),
                ("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c"),
            )
        ),
        "MNIST/raw",
    ),
    "cifar10": Source(
        (("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),), ""
    ),
    "cifar100": Source(
        (("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),), ""
    ),
}


def download(name: str, root: str | Path, source: Source | None = None) -> None:
    """Fetch the files of a data set into `root`, check them, and unpack archives.

    Raises DataError for an address that does not answer or a file with another checksum; nothing half is left behind.
    """
    source = source or SOURCES[name]
    folder = Path(root) / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    for address, md5 in source.files:
        target = folder / address.rsplit("/", 1)[-1]
        part = target.with_name(target.name + ".part")
        try:
            with urllib.request.urlopen(address) as stream, open(part, "wb") as out:
                digest = hashlib.md5(usedforsecurity=False)
                while block := stream.read(1 << 20):
                    digest.update(block)
                    out.write(block)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DataError(f"cannot fetch {address}: {error}. Fetch it by hand into {folder}") from error
        if digest.hexdigest() != md5:
            part.unlink()
            raise DataError(f"{address}: MD5 is {digest.hexdigest()}, expected {md5}: the download is damaged")
        os.replace(part, target)
        if target.name.endswith(".tar.gz"):
            with tarfile.open(target) as archive:
                archive.extractall(folder, filter="data")


def mnist(root: Path) -> tuple[Arrays, Arrays]:
    """MNIST from its idx files (also gzipped) in root/MNIST/raw or root itself."""
    folder = next((f for f in (root / "MNIST" / "raw", root) if _idx(f, "train-images-idx3-ubyte")), None)
    if folder is None:
        raise _absent("mnist", root, "MNIST/raw/train-images-idx3-ubyte (and the three beside it, .gz will do)")
    pairs = []
    for stem in ("train", "t10k"):
        images = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
        pairs.append((torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    return pairs[0], pairs[1]


def cifar10(root: Path) -> tuple[Arrays, Arrays]:
    """CIFAR-10 from its binary batches in root/cifar-10-batches-bin or root itself."""
    folder = _folder(root, "cifar-10-batches-bin", "data_batch_1.bin", "cifar10")
    train = [_read_cifar(folder / f"data_batch_{k}.bin", 1) for k in range(1, 6)]
    return (torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])), _read_cifar(
        folder / "test_batch.bin", 1
    )


def cifar100(root: Path) -> tuple[Arrays, Arrays]:
    """CIFAR-100 (fine labels) from its binary files in root/cifar-100-binary or root itself."""
    folder = _folder(root, "cifar-100-binary", "train.bin", "cifar100")
    return _read_cifar(folder / "train.bin", 2), _read_cifar(folder / "test.bin", 2)


def _folder(root: Path, name: str, probe: str, data: str) -> Path:
    for folder in (root / name, root):
        if (folder / probe).exists():
            return folder
    raise _absent(data, root, f"{name}/{probe}")


def _absent(data: str, root: Path, wanted: str) -> DataError:
    return DataError(
        f"{data}: {wanted} is not in {root}. Fetch the files by "
        f"python -c \"from espalier.train import download; download('{data}', '{root}')\", or say --data-root FOLDER"
    )


def _idx(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)


def _read_idx(folder: Path, name: str, dims: int) -> np.ndarray:
    path = _idx(folder, name)
    if path is None:
        raise DataError(f"{folder / name} is missing")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    header = 4 + 4 * dims
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, dims]):
        raise DataError(f"{path} is no idx file of {dims} dimensions of bytes")
    shape = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(dims)]
    if len(raw) != header + int(np.prod(shape)):
        raise DataError(f"{path}: {len(raw)} bytes, but its header {shape} says {header + int(np.prod(shape))}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _read_cifar(path: Path, labels: int) -> Arrays:
    """Rows of `labels` label bytes (the last is the fine one) and 3072 bytes of image, channels first."""
    if not path.exists():
        raise DataError(f"{path} is missing")
    raw, width = np.fromfile(path, np.uint8), labels + 3072
    if len(raw) == 0 or len(raw) % width:
        raise DataError(f"{path}: {len(raw)} bytes are not a whole number of rows of {width}: truncated?")
    rows = raw.reshape(-1, width)
    images = rows[:, labels:].reshape(-1, 3, 32, 32).copy()
    return torch.from_numpy(images), torch.from_numpy(rows[:, labels - 1].astype(np.int64))
