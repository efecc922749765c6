"""Fetching data sets from their own sites."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from espalier.errors import DataError, UnknownNameError

TIMEOUT_S = 60
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Where a data set's files come from: (address, MD5) of each, and the folder below the root where they belong.

    >>> SOURCES["mnist"].folder
    'MNIST/raw'
    """

    files: tuple[tuple[str, str], ...]
    folder: str = ""


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
SOURCES: dict[str, Source] = {
    "mnist": Source(
        (
            (_MNIST + "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            (_MNIST + "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            (_MNIST + "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            (_MNIST + "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        "MNIST/raw",
    ),
    "cifar10": Source(((_CIFAR + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),)),
    "cifar100": Source(((_CIFAR + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),)),
}


def download(name: str, root: str | Path = "data", source: Source | None = None) -> None:
    """Fetch the files of a data set into `root`, check them by their MD5, and unpack archives.

    Files that are there and right are not fetched again. source: another place to fetch from.
    Raises UnknownNameError, and DataError for an address that does not answer, a file with another checksum, or a disk
    that is full; nothing half is left behind.

    >>> download("cifar10", "data")  # doctest: +SKIP
    """
    if source is None and name not in SOURCES:
        raise UnknownNameError("data to download", name, SOURCES)
    source = source or SOURCES[name]
    folder = Path(root) / source.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}") from error
    for address, md5 in source.files:
        target = folder / address.rsplit("/", 1)[-1]
        if not target.exists() or _md5(target) != md5:
            _fetch(address, target, md5)
        if target.name.endswith(".tar.gz"):
            _unpack(target, folder)


def _fetch(address: str, target: Path, md5: str) -> None:
    part = target.with_name(target.name + ".part")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as stream, open(part, "wb") as out:
            shutil.copyfileobj(stream, out, _BLOCK)
            out.flush()
            os.fsync(out.fileno())
        if (found := _md5(part)) != md5:
            raise DataError(f"{address}: MD5 is {found}, expected {md5}: damaged, or replaced. Try again")
        os.replace(part, target)
    except (OSError, ValueError) as error:  # ValueError: no address at all
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot fetch {address}: {error}. Fetch it by hand into {target.parent}") from error
    finally:
        part.unlink(missing_ok=True)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack beside the target first, so that a folder of its name is a whole one."""
    aside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder))
    try:
        with tarfile.open(archive) as file:
            file.extractall(aside, filter="data")
        for made in aside.iterdir():
            if (folder / made.name).is_dir():
                shutil.rmtree(folder / made.name)
            os.replace(made, folder / made.name)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
