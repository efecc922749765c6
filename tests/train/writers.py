"""Small data sets, written as the sites of the large ones distribute them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

RANDOM = np.random.default_rng(0)


def write_mnist(folder: Path, train: int = 40, test: int = 20, packed: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, np.ndarray] = {}
    for stem, count in (("train", train), ("t10k", test)):
        images = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, head, array in (
            (f"{stem}-images-idx3-ubyte", struct.pack(">IIII", 2051, count, 28, 28), images),
            (f"{stem}-labels-idx1-ubyte", struct.pack(">II", 2049, count), labels),
        ):
            raw = head + array.tobytes()
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
            made[name] = array
    return made


def write_cifar(folder: Path, names: list[str], label_bytes: int, classes: int, count: int = 20) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in names:
        rows = RANDOM.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
        rows[:, :label_bytes] = 0
        rows[:, label_bytes - 1] = np.arange(count) % classes
        (folder / name).write_bytes(rows.tobytes())
        made.append(rows)
    return made


CIFAR10 = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]


def write_pictures(root: Path, parts: tuple[str, ...], sides: tuple[int, int] = (20, 16), per_class: int = 6) -> None:
    for part in parts:
        for k, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for j in range(per_class):
                Image.new("RGB", sides, (200 * k + 20, 10 * j, 0)).save(folder / f"{j}.png")
