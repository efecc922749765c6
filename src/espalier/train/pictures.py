"""Pictures of any size, from folders or from the Hugging Face hub, brought to one size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.errors import DataError, MissingExtraError
from espalier.train.split import Norm
from espalier.train.stream import Stream

try:  # an optional extra
    from PIL import Image
except ImportError:
    Image = None  # type: ignore[assignment]
try:  # an optional extra
    import datasets as _datasets
except ImportError:
    _datasets = None

NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet, as most weights that are about
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")
TESTS = ("test", "val", "valid", "validation")
LARGEST = 224  # pixels
IN_MEMORY_BYTES = 4 * 2**30  # of pictures; where there are more of them, they are read when they are needed
_AT_ONCE = 256  # pictures read at once
LOOKED_AT = 200  # pictures from which the common size is taken


Labelled = tuple[Tensor | Stream, Tensor]


@dataclass(frozen=True)
class Pictures:
    """Two sets of (images uint8 ``[N, 3, size, size]``, labels) and the names of the classes."""

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    size: int


def folder(path: str) -> Pictures:
    """Pictures in ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*`` (or ``val``).

    Every picture is scaled and cropped to a square of the usual shorter side of the training set, 224 at most. Where
    they would take more than IN_MEMORY_BYTES in memory, each is read from its file whenever a batch needs it, by
    threads and ahead of the training; the batches are the same.
    Raises DataError for folders that are missing or differ in their classes, and for a picture that cannot be read.

    >>> folder("flowers").classes  # doctest: +SKIP
    ('daisy', 'rose')
    """
    if Image is None:
        raise MissingExtraError("pillow", "train")
    root = Path(path)
    test = next((name for name in TESTS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise DataError(f"{root}: expected the folders train and test (or val), each with a folder of images per class")
    classes = _subfolders(root / "train")
    if strange := sorted(set(_subfolders(root / test)) - set(classes)):
        raise DataError(f"{root / test / strange[0]}: a class that {root / 'train'} does not have")
    listed = [_listed(root / part, classes) for part in ("train", test)]
    paths = [path for path, _ in listed[0]]
    size = _common_size(_sides(path) for path in paths[:: max(1, len(paths) // LOOKED_AT)])
    train, found = (_labelled(partial(_nth, rows, size), [label for _, label in rows], size) for rows in listed)
    return Pictures(train, found, classes, size)


def hub(name: str) -> Pictures:
    """A data set of the Hugging Face hub, by ``NAME`` or ``NAME:CONFIGURATION``, also a local one.

    It needs the splits train and test (or validation), an image and a class label.
    Raises MissingExtraError without the package ``datasets``, DataError for what cannot be fetched or lacks these.

    >>> hub("ylecun/mnist").classes[:3]  # doctest: +SKIP
    ('0', '1', '2')
    """
    if _datasets is None:
        raise MissingExtraError("datasets", "hub")
    if Image is None:
        raise MissingExtraError("pillow", "train")
    where, _, configuration = name.partition(":")
    try:
        loaded: Any = _datasets.load_dataset(where, configuration or None)
    except Exception as error:  # the package raises many kinds: network, cache, names, configurations
        raise DataError(f"hub:{name} cannot be loaded: {type(error).__name__}: {error}") from error
    test = next((split for split in TESTS if split in loaded), None)
    if "train" not in loaded or test is None:
        raise DataError(f"hub:{name}: needs the splits train and test (or validation), has {', '.join(loaded)}")
    features = loaded["train"].features
    image, label = _feature(features, "Image"), _feature(features, "ClassLabel")
    if image is None or label is None:
        raise DataError(f"hub:{name}: needs an image and a class label, has {', '.join(features)}")
    size = _common_size(row[image].size for row in islice(loaded["train"], LOOKED_AT))
    train, found = (
        _labelled(partial(_row, loaded[split], image, size, f"hub:{name}"), list(loaded[split][label]), size)
        for split in ("train", test)
    )
    return Pictures(train, found, tuple(features[label].names), size)


def _feature(features: Any, kind: str) -> str | None:
    return next((name for name, feature in features.items() if type(feature).__name__ == kind), None)


def _subfolders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _listed(path: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    found = [
        (file, label)
        for label, name in enumerate(classes)
        if (path / name).is_dir()
        for file in sorted((path / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise DataError(f"{path}: no image ({', '.join(SUFFIXES)}) in a folder per class")
    return found


def _common_size(sides: Iterable[tuple[int, int]]) -> int:
    return min(LARGEST, median_low(min(pair) for pair in sides))


def _opened(path: Path) -> Any:
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: no picture that can be read: {error}") from error


def _sides(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return image.size


def _picture(path: Path, size: int) -> np.ndarray:
    with _opened(path) as image:
        return _square(image, size, str(path))


def _square(image: Any, size: int, where: str) -> np.ndarray:
    """RGB ``[size, size, 3]``: the shorter side brought to `size`, the middle cut out."""
    try:
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise DataError(f"{where}: no picture that can be read: {error}") from error
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize([max(size, round(side * scale)) for side in image.size])
    left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _nth(rows: list[tuple[Path, int]], size: int, number: int) -> np.ndarray:
    return _picture(rows[number][0], size)


def _row(rows: Any, image: str, size: int, where: str, number: int) -> np.ndarray:
    return _square(rows[number][image], size, where)


def _labelled(read: Callable[[int], np.ndarray], labels: list[int], size: int) -> Labelled:
    """The pictures with their labels: in memory, or left where they are when there are too many."""
    stream = Stream(read, torch.arange(len(labels)), (3, size, size))
    numbers = torch.tensor(labels, dtype=torch.int64)
    if stream.shape.numel() > IN_MEMORY_BYTES:
        return stream, numbers
    images, done = torch.empty(stream.shape, dtype=torch.uint8), 0
    for batch in stream.batches(torch.arange(len(labels)).split(_AT_ONCE)):
        images[done : done + len(batch)] = batch
        done += len(batch)
    return images, numbers
