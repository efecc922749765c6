"""Data sets by name, in memory, in deterministic batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import DataError, MissingExtraError, UnknownNameError
from espalier.train import files

try:  # an optional extra
    from sklearn.datasets import load_digits
except ImportError:
    load_digits = None
try:  # an optional extra
    from PIL import Image
except ImportError:
    Image = None  # type: ignore[assignment]
try:  # an optional extra
    import datasets as hub
except ImportError:
    hub = None

Norm = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET_NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Split:
    """Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]``, with how to bring them before a network.

    norm: mean and standard deviation per channel, of values in 0..1. crop, flip: augmentation when asked for.
    """

    images: Tensor
    labels: Tensor
    norm: Norm
    crop: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """Batches in one epoch."""
        return -(-len(self) // batch_size)

    def batches(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = False, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (images float32, labels); the same `seed` and `epoch` always give the same ones."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        for index in order.split(batch_size):
            images = self.images[index]
            if augment:
                images = self._augmented(images, generator)
            yield self.normalised(images), self.labels[index]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images as float32, normalised by channel."""
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in self.norm)
        return (images.float() / 255 - mean) / std

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        if self.crop:
            padded = F.pad(images, (self.crop,) * 4)
            at = torch.randint(0, 2 * self.crop + 1, (2, count), generator=generator)
            rows = (at[0][:, None] + torch.arange(height))[:, None, :, None]
            columns = (at[1][:, None] + torch.arange(width))[:, None, None, :]
            index = torch.arange(count)[:, None, None, None]
            images = padded[index, torch.arange(images.shape[1])[None, :, None, None], rows, columns]
        if self.flip:
            turned = torch.rand(count, generator=generator) < 0.5
            images = torch.where(turned[:, None, None, None], images.flip(3), images)
        return images


@dataclass(frozen=True)
class Data:
    """A data set: what is trained on, what choices are made on (holdout), and what is reported (test)."""

    name: str
    train: Split
    holdout: Split
    test: Split
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width of an image."""
        return tuple(self.train.images.shape[1:])


def load_data(name: str, root: str | Path | None = None, *, holdout: float = 0.1, seed: int = 0) -> Data:
    """A data set by name: digits, mnist, cifar10, cifar100, folder:PATH, hub:NAME or synthetic:CxHxW:CLASSES.

    root: the folder of its files, by default ``data``. holdout: the share of the training set, class by class, on which
    choices are made, so that nothing is tuned on the test set.

    Raises UnknownNameError for a name, DataError for files that are missing or damaged, MissingExtraError.

    >>> load_data("digits").shape
    (1, 8, 8)
    """
    kind, _, rest = name.partition(":")
    if kind not in DATA:
        raise UnknownNameError("data", name, DATA, "folder:PATH and hub:NAME take what follows the colon")
    train, test = DATA[kind](rest, Path(root or "data"))
    return _divided(name, train, test, holdout, seed)


def _divided(name: str, train: Split, test: Split, holdout: float, seed: int) -> Data:
    generator, held = torch.Generator().manual_seed(seed), torch.zeros(len(train), dtype=torch.bool)
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    for label in range(classes):
        index = (train.labels == label).nonzero()[:, 0]
        count = max(1, round(holdout * len(index))) if len(index) > 1 else 0
        held[index[torch.randperm(len(index), generator=generator)[:count]]] = True
    part = replace(train, images=train.images[held], labels=train.labels[held])
    rest = replace(train, images=train.images[~held], labels=train.labels[~held])
    return Data(name, rest, part, test, classes)


def _digits(_: str, _root: Path) -> tuple[Split, Split]:
    if load_digits is None:
        raise MissingExtraError("scikit-learn", "train")
    bunch: Any = load_digits()
    images = torch.from_numpy(np.minimum(bunch.images * 16, 255).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    norm: Norm = ((0.305,), (0.376,))
    test = torch.arange(len(labels)) % 5 == 4  # scikit-learn ships no split
    return Split(images[~test], labels[~test], norm, crop=1), Split(images[test], labels[test], norm)


def _from_files(read: Callable[[Path], tuple[files.Arrays, files.Arrays]], norm: Norm, crop: int, flip: bool) -> Any:
    def load(_: str, root: Path) -> tuple[Split, Split]:
        (x, y), (tx, ty) = read(root)
        return Split(x, y, norm, crop, flip), Split(tx, ty, norm)

    return load


def _image_folder(path: str, _root: Path) -> tuple[Split, Split]:
    if Image is None:
        raise MissingExtraError("pillow", "train")
    root = Path(path)
    test = next((f for f in ("test", "val", "valid") if (root / f).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise DataError(f"{root}: expected the folders train and test (or val), each with a folder of images per class")
    names = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    size = _common_size(root / "train")
    train, tested = (_read_images(root / f, names, size) for f in ("train", test))
    return Split(*train, IMAGENET_NORM, crop=size // 8, flip=True), Split(*tested, IMAGENET_NORM)


def _common_size(folder: Path) -> int:
    first = next((p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES), None)
    if first is None:
        raise DataError(f"{folder}: no image ({', '.join(SUFFIXES)}) in it")
    with Image.open(first) as image:
        return min(224, *image.size)


def _read_images(folder: Path, names: list[str], size: int) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*")):
            if path.suffix.lower() in SUFFIXES:
                images.append(_read_image(path, size))
                labels.append(label)
    if not images:
        raise DataError(f"{folder}: no images in the folders {', '.join(names[:5])}")
    return torch.stack(images), torch.tensor(labels)


def _read_image(source: Any, size: int) -> Tensor:
    """RGB, the shorter side brought to `size`, the middle cut out."""
    try:
        image = (Image.open(source) if isinstance(source, Path) else source).convert("RGB")
    except OSError as error:
        raise DataError(f"{source}: no image that can be read: {error}") from error
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size])
    left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1)


def _hub(name: str, _root: Path) -> tuple[Split, Split]:
    if hub is None:
        raise MissingExtraError("datasets", "hub")
    loaded = hub.load_dataset(name)
    test = next((s for s in ("test", "validation") if s in loaded), None)
    if "train" not in loaded or test is None:
        raise DataError(f"hub:{name}: needs the splits train and test (or validation), has {', '.join(loaded)}")
    features = loaded["train"].features
    image = next((k for k, f in features.items() if type(f).__name__ == "Image"), None)
    label = next((k for k, f in features.items() if type(f).__name__ == "ClassLabel"), None)
    if image is None or label is None:
        raise DataError(f"hub:{name}: needs an image and a class label, has {', '.join(features)}")
    size = min(224, *loaded["train"][0][image].size)
    made = []
    for split in ("train", test):
        images = torch.stack([_read_image(row[image], size) for row in loaded[split]])
        made.append(Split(images, torch.tensor(loaded[split][label]), IMAGENET_NORM, crop=size // 8, flip=True))
    return made[0], made[1]


def _synthetic(what: str, _root: Path) -> tuple[Split, Split]:
    """Noise around one random image per class: learnt in an epoch, for trying things out."""
    try:
        shape, classes = what.split(":")
        sizes = [int(size) for size in shape.split("x")]
        channels, height, width = sizes
        count = int(classes)
    except ValueError:
        raise DataError(f"synthetic:{what}: write synthetic:CxHxW:CLASSES, as in synthetic:3x32x32:10") from None
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(0, 256, (count, channels, height, width), generator=generator).float()
    norm: Norm = ((0.5,) * channels, (0.3,) * channels)
    made = []
    for size in (64 * count, 16 * count):
        labels = torch.arange(size) % count
        noise = 40 * torch.randn(size, channels, height, width, generator=generator)
        made.append(Split((centres[labels] + noise).clamp(0, 255).to(torch.uint8), labels, norm))
    return made[0], made[1]


DATA: dict[str, Callable[[str, Path], tuple[Split, Split]]] = {
    "digits": _digits,
    "mnist": _from_files(files.mnist, ((0.1307,), (0.3081,)), 2, False),
    "cifar10": _from_files(files.cifar10, IMAGENET_NORM, 4, True),
    "cifar100": _from_files(files.cifar100, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), 4, True),
    "folder": _image_folder,
    "hub": _hub,
    "synthetic": _synthetic,
}
