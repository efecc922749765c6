"""A split of a data set: images, in batches that a seed decides. A data set: three splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import DataError
from espalier.train.stream import Stream

Norm = tuple[tuple[float, ...], tuple[float, ...]]  # mean, standard deviation per channel
_PRIME = 1_000_003


@dataclass(frozen=True)
class Split:
    """Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]``, with how to bring them before a network.

    images: a tensor, or a `Stream` of pictures that are read when they are needed.
    norm: mean and standard deviation per channel, of values in 0..1.
    crop, flip: the augmentation, when asked for: pixels to shift by at most, whether left and right may be swapped.

    >>> split = Split(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(5), ((0.5,), (0.25,)))
    >>> [(tuple(x.shape), y.tolist()) for x, y in split.batches(3)]
    [((3, 1, 4, 4), [0, 1, 2]), ((2, 1, 4, 4), [3, 4])]
    """

    images: Tensor | Stream
    labels: Tensor
    norm: Norm
    crop: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """Batches in one epoch.

        >>> load_data("synthetic:3x8x8:2").test.steps(10)  # of 32 images
        4
        """
        return -(-len(self) // batch_size)

    def size_of(self, batch: int, batch_size: int) -> int:
        """Images in a batch of the epoch, counted from 0.

        >>> [load_data("synthetic:3x8x8:2").test.size_of(k, 10) for k in range(4)]
        [8, 8, 8, 8]
        """
        least, larger = divmod(len(self), max(1, self.steps(batch_size)))
        return least + (batch < larger)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        first: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        part: slice = slice(None),
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (images float32, labels) on `device`; the same `seed` and `epoch` always give the same ones.

        They hold `batch_size` images or fewer, all of them equally many to within one: a batch norm that saw a last
        batch of one image would not know what to do.

        first: the batch to begin with, for an epoch that was broken off: what follows is as if it had not been.
        part: of each batch, for one of several processes: only these are read, augmented as in the whole batch.

        >>> x, y = next(load_data("digits").train.batches(32, seed=1, epoch=2, shuffle=True, augment=True))
        >>> x.shape
        torch.Size([32, 1, 8, 8])
        """
        base = (seed * _PRIME + epoch) * _PRIME
        order = torch.randperm(len(self), generator=_generator(base)) if shuffle else torch.arange(len(self))
        whole = order.tensor_split(max(1, self.steps(batch_size)))[first:]
        mine = [index[part] for index in whole]
        for k, (index, images) in enumerate(zip(mine, self._read(mine)), first):
            images = images.to(device)
            if augment:
                # A seed for each batch, so that none depends on those before it.
                images = self._augmented(images, _generator(base + k + 1), len(whole[k - first]), part)
            yield self.normalised(images), self.labels[index].to(device)

    def only(self, index: Tensor) -> Split:
        """Those at `index` (integers or a mask).

        >>> len(load_data("synthetic:3x8x8:2").test.only(torch.arange(5)))
        5
        """
        images = self.images.only(index) if isinstance(self.images, Stream) else self.images[index]
        return replace(self, images=images, labels=self.labels[index])

    def _read(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        if isinstance(self.images, Stream):
            yield from self.images.batches(indices)
            return
        for index in indices:
            whole = len(index) == len(self) and bool((index[1:] > index[:-1]).all())
            yield self.images if whole else self.images[index]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images as float32, normalised by channel: (x / 255 - mean) / std.

        >>> load_data("synthetic:1x1x2:2").train.normalised(torch.tensor([[[[0, 255]]]])).round(decimals=3)
        tensor([[[[-1.6670,  1.6670]]]])
        """
        mean, std = (torch.tensor(values, device=images.device).reshape(1, -1, 1, 1) for values in self.norm)
        return images.float().div_(255).sub_(mean).div_(std)

    def _augmented(self, images: Tensor, generator: torch.Generator, drawn: int, part: slice) -> Tensor:
        """Of `drawn` images in the whole batch, for which numbers are drawn, these are `part`."""
        count, channels, height, width = images.shape
        if self.crop:
            padded = F.pad(images, (self.crop,) * 4)
            shift = torch.randint(0, 2 * self.crop + 1, (2, drawn, 1), generator=generator)[:, part]
            rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)
            if self.flip:
                turned = torch.rand(drawn, 1, generator=generator)[part] < 0.5
                columns = torch.where(turned, columns.flip(1), columns)
            at = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).reshape(count, 1, -1).to(images.device)
            taken = padded.flatten(2).gather(2, at.expand(-1, channels, -1))
            return taken.reshape(images.shape)
        if self.flip:
            turned = (torch.rand(drawn, 1, 1, 1, generator=generator)[part] < 0.5).to(images.device)
            return torch.where(turned, images.flip(3), images)
        return images


@dataclass(frozen=True)
class Data:
    """A data set: what is trained on, what choices are made on (holdout), and what is reported (test).

    >>> data = load_data("synthetic:3x8x8:2", holdout=0.25)
    >>> len(data.train), len(data.holdout), len(data.test), data.classes, data.shape
    (96, 32, 32, 2, (3, 8, 8))
    """

    name: str
    train: Split
    holdout: Split
    test: Split
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width of an image."""
        return tuple(self.train.images.shape[1:])

    @property
    def norm(self) -> Norm:
        """Mean and standard deviation of each channel, of values in 0..1, by which the images are normalised."""
        return self.train.norm

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> Data:
        """The same images under another normalisation, such as the one that given weights were trained with.

        Raises DataError unless there are a mean and a positive deviation for every channel.

        >>> load_data("digits").normalised_by([0.5], [0.5]).norm
        ((0.5,), (0.5,))
        """
        norm: Norm = (tuple(float(m) for m in mean), tuple(float(s) for s in std))
        if not len(mean) == len(std) == self.shape[0] or min(norm[1]) <= 0:
            raise DataError(f"{self.name}: mean {norm[0]} and std {norm[1]} for {self.shape[0]} channels")
        train, held, test = (replace(split, norm=norm) for split in (self.train, self.holdout, self.test))
        return Data(self.name, train, held, test, self.classes)


def divide(name: str, train: Split, test: Split, classes: int, holdout: float, seed: int) -> Data:
    """Take the share `holdout` of every class out of the training set, so that nothing is tuned on the test set.

    At least one image of a class is held out, and at least one stays. Raises DataError for a share outside 0..1,
    labels outside 0..classes, or splits that are empty or differ in shape.

    >>> data = load_data("synthetic:3x8x8:2", holdout=0.5)  # calls it
    >>> data.train.labels.bincount(), data.holdout.labels.bincount()
    (tensor([32, 32]), tensor([32, 32]))
    """
    if not 0 < holdout < 1:
        raise DataError(f"{name}: holdout is {holdout}, expected a share between 0 and 1")
    for what, split in (("training", train), ("test", test)):
        if len(split) == 0 or len(split) != len(split.images):
            raise DataError(f"{name}: {len(split.images)} {what} images and {len(split)} labels")
        if int(split.labels.min()) < 0 or int(split.labels.max()) >= classes:
            low, high = int(split.labels.min()), int(split.labels.max())
            raise DataError(f"{name}: {what} labels are {low}..{high}, expected 0..{classes - 1}")
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = [list(split.images.shape[1:]) for split in (train, test)]
        raise DataError(f"{name}: training images are {shapes[0]}, test images {shapes[1]}")
    generator, held = _generator(seed), torch.zeros(len(train), dtype=torch.bool)
    for label in range(classes):
        index = (train.labels == label).nonzero()[:, 0]
        count = min(max(1, round(holdout * len(index))), len(index) - 1)
        held[index[torch.randperm(len(index), generator=generator)[: max(0, count)]]] = True
    if not held.any():
        raise DataError(f"{name}: no class has two training images, so none can be held out")
    rest, part = (train.only(mask) for mask in (~held, held))
    return Data(name, rest, replace(part, crop=0, flip=False), test, classes)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)
