"""Batches: the same for the same seed and epoch, and every augmented image a shift and a flip of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from espalier.train import Split, load_data
from espalier.train.split import divide


def numbered(count: int = 23, channels: int = 2, crop: int = 0, flip: bool = False) -> Split:
    """Every pixel knows its place and its image knows its number, so that what was done to it can be read off."""
    images = torch.randint(
        1, 256, (count, channels, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return Split(images, torch.arange(count), ((0.0,) * channels, (1.0,) * channels), crop, flip)


def taken(split: Split, size: int = 5, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(split.batches(size, **options))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(a, b))


def test_batches_repeat_for_a_seed_and_epoch_and_for_no_other() -> None:
    split, order = numbered(crop=2, flip=True), {"shuffle": True, "augment": True}
    first = taken(split, seed=3, epoch=4, **order)
    torch.manual_seed(99)  # the global state has no say
    assert same(first, taken(split, seed=3, epoch=4, **order))
    assert not same(first, taken(split, seed=3, epoch=5, **order))
    assert not same(first, taken(split, seed=4, epoch=4, **order))
    for k in range(6):
        assert same(first[k:], taken(split, seed=3, epoch=4, first=k, **order))
    assert split.steps(5) == len(first) == 5 and [len(y) for _, y in first] == [5, 5, 5, 4, 4]
    assert sorted(torch.cat([y for _, y in first]).tolist()) == list(range(23))


def test_without_augmentation_the_images_are_as_they_are() -> None:
    split = numbered(crop=2, flip=True)
    x, y = (torch.cat(parts) for parts in zip(*taken(split)))
    assert torch.equal(y, split.labels) and torch.equal(x, split.images.float() / 255)
    before = split.images.clone()
    taken(split, augment=True)
    assert torch.equal(split.images, before)


@pytest.mark.parametrize("crop,flip", [(0, False), (0, True), (2, False), (2, True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmented_image_is_a_shift_and_a_flip_of_its_own(crop: int, flip: bool, channels: int) -> None:
    split = numbered(200, channels, crop, flip)
    padded = torch.nn.functional.pad(split.images, (crop,) * 4)
    met = set()
    for x, y in taken(split, 64, augment=True, shuffle=True):
        for image, number in zip((x * 255).round().to(torch.uint8), y.tolist()):
            ways = [
                (dy, dx, turned)
                for dy in range(2 * crop + 1)
                for dx in range(2 * crop + 1)
                for turned in ((False, True) if flip else (False,))
                if torch.equal(image, turn(padded[number, :, dy : dy + 6, dx : dx + 5], turned))
            ]
            assert ways, f"image {number} is no shift of itself"
            met.add(ways[0])
    assert len(met) >= 0.8 * (2 * crop + 1) ** 2 * (1 + flip)


def turn(image: Tensor, turned: bool) -> Tensor:
    return image.flip(2) if turned else image


def test_only_the_training_set_is_augmented() -> None:
    data = load_data("synthetic:3x8x8:2")
    wide = replace(data.train, crop=4, flip=True)
    held = divide("x", wide, data.test, 2, 0.1, 0).holdout
    assert (held.crop, held.flip) == (0, False)
