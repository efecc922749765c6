"""Data sets: every row reads what its site distributes, and says what is wrong with damaged files."""

from __future__ import annotations

import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from espalier.errors import DataError, MissingExtraError, UnknownNameError
from espalier.train import SOURCES, Data, Split, load_data
from espalier.train import data as data_module
from espalier.train import pictures as pictures_module
from tests.train.writers import CIFAR10, write_cifar, write_mnist, write_pictures


def sizes(data: Data) -> tuple[int, int, int]:
    return len(data.train), len(data.holdout), len(data.test)


def every(*splits: Split) -> Tensor:
    return torch.cat([split.images for split in splits])


def multiset(images: Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["MNIST/raw", "."])
def test_mnist(tmp_path: Path, below: str, packed: bool) -> None:
    wrote = write_mnist(tmp_path / below, packed=packed)
    data = load_data("mnist", tmp_path, holdout=0.1)
    assert (data.shape, data.classes, sizes(data)) == ((1, 28, 28), 10, (30, 10, 20))
    assert np.array_equal(data.test.images[:, 0].numpy(), wrote["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.test.labels.numpy(), wrote["t10k-labels-idx1-ubyte"])
    assert multiset(every(data.train, data.holdout)) == multiset(torch.from_numpy(wrote["train-images-idx3-ubyte"]))


@pytest.mark.parametrize("below", ["cifar-10-batches-bin", "."])
def test_cifar10(tmp_path: Path, below: str) -> None:
    wrote = write_cifar(tmp_path / below, CIFAR10, 1, 10)
    data = load_data("cifar10", tmp_path, holdout=0.1)
    assert (data.shape, data.classes, sizes(data)) == ((3, 32, 32), 10, (90, 10, 20))
    assert np.array_equal(data.test.images.numpy().reshape(20, -1), wrote[5][:, 1:])
    assert np.array_equal(data.test.labels.numpy(), wrote[5][:, 0])
    assert multiset(every(data.train, data.holdout)) == multiset(
        torch.from_numpy(np.concatenate(wrote[:5])[:, 1:].reshape(-1, 3, 32, 32))
    )


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    wrote = write_cifar(tmp_path / "cifar-100-binary", ["train.bin", "test.bin"], 2, 100, count=200)
    data = load_data("cifar100", tmp_path, holdout=0.1)
    assert (data.classes, len(data.train), len(data.holdout)) == (100, 100, 100)
    assert np.array_equal(data.test.labels.numpy(), wrote[1][:, 1])


def test_digits_are_all_there_and_divided_for_good() -> None:
    data, again, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    assert sum(sizes(data)) == 1797
    assert torch.equal(data.holdout.images, again.holdout.images) and torch.equal(data.test.images, other.test.images)
    assert not torch.equal(data.holdout.images, other.holdout.images)
    values = data.train.normalised(data.train.images)
    assert abs(float(values.mean())) < 0.05 and abs(float(values.std()) - 1) < 0.05


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_every_class_gives_its_share_to_the_holdout(share: float) -> None:
    data = load_data("digits", holdout=share)
    held, kept = data.holdout.labels.bincount(minlength=10), data.train.labels.bincount(minlength=10)
    assert min(held) >= 1 and min(kept) >= 1
    assert all(abs(int(h) - share * int(h + k)) <= 1 for h, k in zip(held, kept))


def test_a_small_data_set_holds_out_more_than_a_tenth(tmp_path: Path) -> None:
    write_mnist(tmp_path / "small", train=40)
    write_mnist(tmp_path / "large", train=6000)
    assert sizes(load_data("mnist", tmp_path / "small"))[:2] == (30, 10)  # a quarter
    assert sizes(load_data("mnist", tmp_path / "large"))[:2] == (5400, 600)  # a tenth


@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("sides", [(20, 16), (16, 24), (16, 16)])
def test_image_folders(tmp_path: Path, test: str, sides: tuple[int, int]) -> None:
    write_pictures(tmp_path, ("train", test), sides)
    data = load_data(f"folder:{tmp_path}", holdout=0.1)
    assert (data.shape, data.classes, sizes(data)) == ((3, 16, 16), 2, (10, 2, 12))
    assert data.test.labels.tolist() == [0] * 6 + [1] * 6
    assert data.test.images[0, :, 3, 3].tolist() == [20, 0, 0] and data.test.images[11, :, 3, 3].tolist() == [
        220,
        50,
        0,
    ]


def test_image_folders_of_several_sizes_take_the_usual_one_and_the_middle(tmp_path: Path) -> None:
    write_pictures(tmp_path, ("train", "val"), (32, 32))
    striped = np.zeros((30, 90, 3), np.uint8)
    striped[:, 30:60] = 255
    Image.fromarray(striped).save(tmp_path / "train" / "cat" / "0.png")
    Image.fromarray(striped).save(tmp_path / "val" / "cat" / "0.png")
    data = load_data(f"folder:{tmp_path}", holdout=0.1)
    assert data.shape == (3, 32, 32)
    assert data.test.images[0, :, :, 3:-3].min() > 200


def test_synthetic_data_of_any_shape() -> None:
    data = load_data("synthetic:2x5x7:3")
    assert (data.shape, data.classes, len(data.test)) == ((2, 5, 7), 3, 48)
    assert torch.equal(data.train.images, load_data("synthetic:2x5x7:3").train.images)


# -- the hub ---------------------------------------------------------------------------------------


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, splits: dict[str, Any], features: dict[str, Any]
) -> list[tuple[Any, ...]]:
    class Rows(list[dict[str, Any]]):
        def __init__(self, rows: list[dict[str, Any]]) -> None:
            super().__init__(rows)
            self.features = features

        def __getitem__(self, key: Any) -> Any:
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    asked: list[Any] = []

    def load_dataset(*arguments: Any) -> dict[str, Rows]:
        asked.append(arguments)
        return {name: Rows(rows) for name, rows in splits.items()}

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setattr(pictures_module, "_datasets", module)
    return asked


def hub_features() -> dict[str, Any]:
    image, label = type("Image", (), {})(), type("ClassLabel", (), {"names": ["a", "b"]})()
    return {"id": object(), "picture": image, "kind": label}


def hub_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": k, "picture": Image.new("L", (9, 8), 30 * k), "kind": k % 2} for k in range(count)]


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, {"train": hub_rows(8), "validation": hub_rows(4)}, hub_features())
    data = load_data("hub:someone/things:small", holdout=0.1)
    assert asked == [("someone/things", "small")]
    assert (data.shape, data.classes, sizes(data)) == ((3, 8, 8), 2, (6, 2, 4))
    assert data.test.labels.tolist() == [0, 1, 0, 1] and data.test.images[3].unique().tolist() == [90]


def test_hub_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {"train": hub_rows(4)}, hub_features())
    with pytest.raises(DataError, match="needs the splits train and test"):
        load_data("hub:x")
    fake_hub(monkeypatch, {"train": hub_rows(4), "test": hub_rows(2)}, {"text": object()})
    with pytest.raises(DataError, match="needs an image and a class label, has text"):
        load_data("hub:x")
    unlabelled = [{**row, "kind": -1} for row in hub_rows(2)]
    fake_hub(monkeypatch, {"train": hub_rows(4), "test": unlabelled}, hub_features())
    with pytest.raises(DataError, match="test labels are -1"):
        load_data("hub:x")


def test_the_real_hub_package_on_a_local_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_pictures(tmp_path / "set", ("train", "test"))
    data = load_data(f"hub:{tmp_path / 'set'}")
    assert (data.shape, data.classes, len(data.test)) == ((3, 16, 16), 2, 12)
    assert data.test.images[0, :, 3, 3].tolist() == [20, 0, 0]


def test_extras_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(pictures_module, "_datasets", None)
    for name, extra in (("digits", "train"), ("hub:x", "hub")):
        with pytest.raises(MissingExtraError, match=rf"espalier\[{extra}\]"):
            load_data(name)
    monkeypatch.setattr(pictures_module, "Image", None)
    with pytest.raises(MissingExtraError, match=r"pillow.*espalier\[train\]"):
        load_data(f"folder:{tmp_path}")


# -- what is wrong with it -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_missing_files_are_named_with_the_way_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(name, tmp_path)
    for words in (str(tmp_path), f"download('{name}'", "--data-root", SOURCES[name].files[0][0], "train"):
        assert words in str(caught.value).replace("data_batch_1", "train")


def test_truncated_and_odd_files_are_named_with_their_sizes(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"

    def refused(words: str, root: Path = tmp_path, name: str = "mnist") -> None:
        with pytest.raises(DataError, match=words):
            load_data(name, root)

    write_mnist(raw)
    images = raw / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    refused(f"train-images-idx3-ubyte: {len(whole) - 1} bytes, but its header .* says {len(whole)}")
    images.write_bytes(b"<html>not found</html>")
    refused("no idx file")
    images.write_bytes(b"")
    refused("no idx file")
    write_mnist(raw)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    refused("t10k-labels-idx1-ubyte .* is missing")
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 3) + bytes(3))
    refused("20 t10k images but 3 labels")
    write_mnist(tmp_path / "gz", packed=True)
    packed = tmp_path / "gz" / "train-images-idx3-ubyte.gz"
    for broken in (packed.read_bytes()[:-20], b"not gzip", packed.read_bytes()[:50] + bytes(500)):
        packed.write_bytes(broken)
        refused("train-images-idx3-ubyte.gz", tmp_path / "gz")

    cifar = tmp_path / "cifar-10-batches-bin"
    write_cifar(cifar, CIFAR10, 1, 10)
    (cifar / "data_batch_3.bin").write_bytes(bytes(3073 * 2 - 5))
    refused(r"data_batch_3.bin: 6141 bytes .* rows of 3073", name="cifar10")
    (cifar / "data_batch_3.bin").unlink()
    refused("data_batch_3.bin is missing", name="cifar10")
    write_cifar(cifar, ["data_batch_3.bin"], 1, 256, count=256)
    refused(r"labels up to \[255\]", name="cifar10")


def test_image_folders_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the folders train and test"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="no image"):
        load_data(f"folder:{tmp_path}")
    write_pictures(tmp_path / "b", ("train", "val"))
    (tmp_path / "b" / "val" / "dog").rename(tmp_path / "b" / "val" / "cow")
    with pytest.raises(DataError, match=r"cow: a class that .*train does not have"):
        load_data(f"folder:{tmp_path / 'b'}")
    write_pictures(tmp_path / "c", ("train", "val"))
    picture = tmp_path / "c" / "train" / "dog" / "4.png"
    for broken in (picture.read_bytes()[:60], b"no picture", b""):
        picture.write_bytes(broken)
        with pytest.raises(DataError, match=r"4\.png: no picture that can be read"):
            load_data(f"folder:{tmp_path / 'c'}")


@pytest.mark.parametrize(
    "name,words",
    [
        ("mnits", "did you mean 'mnist'"),
        ("imagenet", "folder:PATH"),
        ("folder", "write folder:PATH"),
        ("folder:", "write folder:PATH"),
        ("digits:5", "write digits"),
        ("synthetic:3x32:10", "synthetic:CxHxW:CLASSES"),
        ("synthetic:3x0x32:10", "synthetic:CxHxW:CLASSES"),
        ("synthetic:axbxc:10", "synthetic:CxHxW:CLASSES"),
    ],
)
def test_names_that_are_wrong(name: str, words: str) -> None:
    with pytest.raises((DataError, UnknownNameError), match=words):
        load_data(name)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_a_holdout_outside_its_range(share: float) -> None:
    with pytest.raises(DataError, match="expected a share between 0 and 1"):
        load_data("digits", holdout=share)


def test_another_normalisation() -> None:
    data = load_data("digits").normalised_by([0.0], [1.0])
    x, _ = next(data.test.batches(50))
    assert torch.equal(x, data.test.images[: len(x)].float() / 255)
    with pytest.raises(DataError, match="1 channels"):
        data.normalised_by([0.5] * 3, [0.5] * 3)


def test_the_table_is_what_load_data_says() -> None:
    assert all(kind in str(load_data.__doc__) for kind in data_module.DATA)
