"""Pictures that stay where they are until a batch needs them: read by threads, ahead of the training."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import final

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # batches that are being read while one is worked on
THREADS = min(16, os.cpu_count() or 1)


@final
class Stream:
    """Images uint8 ``[N, C, H, W]`` that are read when they are asked for; stands where a tensor of them would.

    read: number of an image -> uint8 array ``[H, W, C]``; it is called from threads. Which images make a batch is
    decided before they are read, so the batches are those of a tensor, whatever the threads do.

    >>> images = Stream(lambda k: np.full((2, 2, 3), k, np.uint8), torch.arange(5), (3, 2, 2))
    >>> images.shape, images[torch.tensor([4, 1])][:, 0, 0, 0].tolist()
    (torch.Size([5, 3, 2, 2]), [4, 1])
    """

    def __init__(self, read: Callable[[int], np.ndarray], numbers: Tensor, shape: tuple[int, int, int]) -> None:
        self.read, self.numbers, self.shape = read, numbers, torch.Size([len(numbers), *shape])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Tensor) -> Tensor:
        """The images at the integers `index`."""
        return next(self.batches([index]))

    def only(self, index: Tensor) -> Stream:
        """Those at `index` (integers or a mask), still unread."""
        return Stream(self.read, self.numbers[index], tuple(self.shape[1:]))  # type: ignore[arg-type]

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images at each of `indices`, the next ones being read meanwhile; errors come in their turn."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="espalier-read") as pool:
            coming, waiting = iter(indices), deque[list[Future[np.ndarray]]]()

            def ask(count: int) -> None:
                for index in islice(coming, count):
                    waiting.append([pool.submit(self.read, int(k)) for k in self.numbers[index]])

            ask(AHEAD + 1)
            try:
                while waiting:
                    arrays = [future.result() for future in waiting.popleft()]
                    yield self._stacked(arrays)
                    ask(1)
            finally:  # broken off: what has not begun is not needed
                for future in (future for batch in waiting for future in batch):
                    future.cancel()

    def _stacked(self, arrays: list[np.ndarray]) -> Tensor:
        images = torch.empty(len(arrays), *self.shape[1:], dtype=torch.uint8)
        for k, array in enumerate(arrays):
            images[k] = torch.tensor(array).permute(2, 0, 1)
        return images
