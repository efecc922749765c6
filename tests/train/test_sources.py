"""Fetching: checked, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from espalier.errors import DataError, UnknownNameError
from espalier.train import SOURCES, Source, download, load_data
from tests.train.writers import CIFAR10, write_cifar, write_mnist


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with CIFAR-10 in one archive and MNIST in four files."""
    site = tmp_path / "site"
    write_mnist(site, packed=True)
    write_cifar(tmp_path / "made" / "cifar-10-batches-bin", CIFAR10, 1, 10)
    with tarfile.open(site / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "made" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    return site


def source(site: Path, name: str) -> Source:
    files = [site / address.rsplit("/", 1)[1] for address, _ in SOURCES[name].files]
    return Source(tuple((file.as_uri(), md5(file)) for file in files), SOURCES[name].folder)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_download(tmp_path: Path, site: Path, name: str) -> None:
    there, root = source(site, name), tmp_path / "root"
    download(name, root, there)
    assert len(load_data(name, root).test) == 20
    assert not [p for p in root.rglob("*") if p.name.endswith(".part") or p.name.startswith(".unpacking")]
    for address, _ in there.files:
        (site / address.rsplit("/", 1)[1]).unlink()
    download(name, root, there)  # everything is there and right: nothing is fetched


def test_download_refuses_what_is_damaged(tmp_path: Path, site: Path) -> None:
    there, root = source(site, "mnist"), tmp_path / "root"
    bad = Source(((there.files[0][0], "0" * 32),), there.folder)
    with pytest.raises(DataError, match=f"MD5 is {there.files[0][1]}, expected 000"):
        download("mnist", root, bad)
    assert not any(p.is_file() for p in root.rglob("*"))
    for address in ((site / "absent.gz").as_uri(), "no address"):
        with pytest.raises(DataError, match=r"cannot fetch .* by hand"):
            download("mnist", root, Source(((address, "0" * 32),)))
    with pytest.raises(UnknownNameError, match="cifar10, cifar100, mnist"):
        download("imagenet", root)
    torn = site / "torn.tar.gz"
    torn.write_bytes((site / "cifar-10-binary.tar.gz").read_bytes()[:-3000])
    with pytest.raises(DataError, match="cannot be unpacked"):
        download("cifar10", root, Source(((torn.as_uri(), md5(torn)),)))
    assert not (root / "cifar-10-batches-bin").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    evil = tmp_path / "evil.tar.gz"
    with tarfile.open(evil, "w:gz") as archive:
        entry = tarfile.TarInfo("../../outside")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(DataError, match="cannot be unpacked"):
        download("cifar10", tmp_path / "a" / "b", Source(((evil.as_uri(), md5(evil)),)))
    assert not (tmp_path / "outside").exists() and not (tmp_path / "a" / "outside").exists()
