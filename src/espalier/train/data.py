"""Data sets by name: one row each in DATA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espalier.errors import DataError, MissingExtraError, UnknownNameError
from espalier.train import files, pictures
from espalier.train.split import Data, Norm, Split, divide

Loaded = tuple[Split, Split, int]  # training set, test set, classes
SMALLEST_HOLDOUT = 500  # images, as long as they are no more than a quarter
MNIST_NORM: Norm = ((0.1307,), (0.3081,))
CIFAR100_NORM: Norm = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@dataclass(frozen=True)
class Row:
    """A data set: `load(rest, root)` takes what follows the colon of its name, and the folder of its files."""

    load: Callable[[str, Path], Loaded]
    usage: str
    about: str


def load_data(name: str, root: str | Path | None = None, *, holdout: float | None = None, seed: int = 0) -> Data:
    """A data set by name: digits, mnist, cifar10, cifar100, folder:PATH, hub:NAME or synthetic:CxHxW:CLASSES.

    root: the folder of its files, by default ``data``. holdout: the share of the training set, class by class, on which
    choices are made, so that nothing is tuned on the test set; by default a tenth, more where that is under 500 images.
    `seed` decides which images these are.

    Raises UnknownNameError for a name, DataError for files that are missing or damaged, MissingExtraError.

    >>> load_data("digits").shape
    (1, 8, 8)
    """
    kind, colon, rest = name.partition(":")
    if kind not in DATA:
        raise UnknownNameError("data", name, (row.usage for row in DATA.values()))
    row = DATA[kind]
    if bool(rest) != (":" in row.usage) or (colon and not rest):
        raise DataError(f"data {name!r}: write {row.usage} ({row.about})")
    train, test, classes = row.load(rest, Path(root or "data"))
    if holdout is None:
        holdout = min(0.25, max(0.1, SMALLEST_HOLDOUT / len(train)))
    return divide(name, train, test, classes, holdout, seed)


def _digits(_: str, _root: Path) -> Loaded:
    try:
        from sklearn.datasets import load_digits  # here: an optional extra that takes its time, which few need
    except ImportError:
        raise MissingExtraError("scikit-learn", "train") from None
    bunch: Any = load_digits()
    images = torch.from_numpy(np.minimum(bunch.images * 16, 255).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    norm: Norm = ((0.305,), (0.376,))
    test = torch.arange(len(labels)) % 4 == 3  # scikit-learn ships no split
    return Split(images[~test], labels[~test], norm, crop=1), Split(images[test], labels[test], norm), 10


def _from_files(
    read: Callable[[Path], tuple[files.Arrays, files.Arrays]], norm: Norm, classes: int, crop: int, flip: bool
) -> Callable[[str, Path], Loaded]:
    def load(_: str, root: Path) -> Loaded:
        train, test = read(root)
        return Split(*train, norm, crop, flip), Split(*test, norm), classes

    return load


def _pictures(read: Callable[[str], pictures.Pictures]) -> Callable[[str, Path], Loaded]:
    def load(name: str, _root: Path) -> Loaded:
        found = read(name)
        train = Split(*found.train, pictures.NORM, crop=max(1, found.size // 8), flip=True)
        return train, Split(*found.test, pictures.NORM), len(found.classes)

    return load


def _synthetic(what: str, _root: Path) -> Loaded:
    """Noise around one random image per class: learnt in an epoch, for trying things out."""
    try:
        shape, number = what.split(":")
        channels, height, width = (int(size) for size in shape.split("x"))
        classes = int(number)
        if min(channels, height, width, classes) < 1:
            raise ValueError
    except ValueError:
        raise DataError(f"synthetic:{what}: write synthetic:CxHxW:CLASSES, as in synthetic:3x32x32:10") from None
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(0, 256, (classes, channels, height, width), generator=generator).float()
    norm: Norm = ((0.5,) * channels, (0.3,) * channels)
    made = []
    for size in (64 * classes, 16 * classes):
        labels = torch.arange(size) % classes
        noise = 40 * torch.randn(size, channels, height, width, generator=generator)
        made.append(Split((centres[labels] + noise).clamp(0, 255).to(torch.uint8), labels, norm))
    return made[0], made[1], classes


DATA: dict[str, Row] = {
    "digits": Row(_digits, "digits", "8 x 8 digits, come with scikit-learn"),
    "mnist": Row(_from_files(files.mnist, MNIST_NORM, 10, 2, False), "mnist", "idx files in MNIST/raw"),
    "cifar10": Row(_from_files(files.cifar10, pictures.NORM, 10, 4, True), "cifar10", "cifar-10-batches-bin"),
    "cifar100": Row(_from_files(files.cifar100, CIFAR100_NORM, 100, 4, True), "cifar100", "cifar-100-binary"),
    "folder": Row(_pictures(pictures.folder), "folder:PATH", "train and test (or val), a folder of images per class"),
    "hub": Row(_pictures(pictures.hub), "hub:NAME", "a data set of the Hugging Face hub; hub:NAME:CONFIGURATION too"),
    "synthetic": Row(_synthetic, "synthetic:CxHxW:CLASSES", "noise around an image a class, for quick tries"),
}
