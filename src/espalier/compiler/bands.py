"""Bands: neighbouring convolutions of single pixels go some pixels at a time, all of them, before the next pixels.

Where a bottleneck ends and the next begins, a wide tensor is written by one 1 x 1 convolution and read by the next;
over large images it is larger than a core's cache. Such convolutions read no pixel but the one that they write, so a
band of pixels can go through all of them while it is hot. Each band is a task of one thread: what a thread reads, it
has written. Results are the same bits, since no pixel knows of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from espalier.compiler.blocks import LANES_HEIGHT
from espalier.compiler.program import Step

LARGE_FLOATS = 1 << 18  # of a tensor in the middle, from which bands pay
BAND_FLOATS = 1 << 17  # about what a band touches: a good part of the second cache
_THREADS = 12  # numbers of bands are multiples of it: up to four threads share them evenly
_LEAST_PIXELS = 48  # of a band, so that its tiles are whole


def through_bands(steps: Sequence[Step]) -> list[Step]:
    """The same steps; those that go through bands together say so in `task` and `bands`."""
    done: list[Step] = []
    task = max((step.task for step in steps), default=0)
    for run in _runs(steps):
        bands = _bands(run)
        task += 2 if bands else 0  # tasks of two runs are not done at once
        done += [replace(step, task=task, bands=bands) for step in run] if bands else run
    return done


def lives(steps: Sequence[Step]) -> Iterator[tuple[int, int]]:
    """For each step the first and the last that may be under way with it: it reads and writes as long as these."""
    first = 0
    for bands, group in groupby(steps, key=lambda step: step.bands and step.task):
        count = len(list(group))
        yield from ((first, first + count - 1) if bands else (k, k) for k in range(first, first + count))
        first += count


def _runs(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Neighbours that could share bands, together."""
    run: list[Step] = []
    for step in steps:
        if run and not (_of_pixels(step) and _of_pixels(run[0]) and _pixels(step) == _pixels(run[0])):
            yield run
            run = []
        run.append(step)
    if run:
        yield run


def _pixels(step: Step) -> tuple[int, ...]:
    """What must be equal for bands of two steps to be the same pixels: the image, and the runs that it is cut into."""
    return (*step.out.sizes[2:], *step.params[1:3])


def _of_pixels(step: Step) -> bool:
    """Whether a step is a convolution that reads no pixel but the one that it writes."""
    if step.op != "conv" or step.task or step.params[0] == LANES_HEIGHT or not step.out.storage:
        return False
    plane, index = step.a.strides[1], step.arrays["index"]
    return plane > 0 and not np.any(index % plane) and bool(np.all((index >= 0) & (index < step.a.sizes[1] * plane)))


def _bands(run: Sequence[Step]) -> int:
    """In how many bands to go; 0 where no tensor in the middle is large."""
    between = {step.out.storage for step in run[:-1]} & {step.a.storage for step in run[1:]}
    if max((math.prod(step.a.sizes) for step in run if step.a.storage in between), default=0) < LARGE_FLOATS:
        return 0
    touched = max(math.prod(step.a.sizes) + math.prod(step.out.sizes) for step in run)
    most = math.prod(run[0].out.sizes[2:]) // _LEAST_PIXELS // _THREADS * _THREADS
    return min(most, math.ceil(touched / BAND_FLOATS / _THREADS) * _THREADS)
