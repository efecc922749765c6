"""Bands of rows: the convolutions around a depthwise one go some rows at a time, all of them, before the next rows.

Threads that share out a depthwise convolution by channels leave the 1 x 1 convolution behind it with an input that lies
in all their caches, and to have a line from another core takes longer than its arithmetic. A band of rows is a *task*
of one thread from the convolution before, which makes the few rows of the neighbours that the window reaches once more,
to the one behind. What lies between is the thread's own. Results are the same bits: every row is made alike wherever it
is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from espalier.compiler.layout import VECTOR, Storage
from espalier.compiler.program import Operand, Step
from espalier.compiler.window import is_depthwise, window
from espalier.graph.ir import Graph, Node

OWN_FLOATS = 1 << 18  # of a band's own tensors, at most: a good part of the second cache
WINDOW_FLOATS = 1 << 16  # without a convolution before, which would make rows twice
LARGE_FLOATS = 1 << 17  # of a depthwise output, from which one thread makes it in bands, too
_LEAST_ROWS = 3  # of a band with a convolution before: below, its neighbours' rows cost too much
# In the time of a product of a weight and a vector: to have a float from another core, and a row of a depthwise window.
_FETCH, _WINDOW_ROW = 0.75, 9
_ENDS = 2  # rows that take as long as the beginning and end of a channel of a depthwise window

Rows = tuple[int, int]  # first, and behind the last


@dataclass(frozen=True)
class Extent:
    """A depthwise window between two convolutions, as far as time goes.

    before, behind: weights that are not zero, of the convolution before (None: it stays by itself) and behind.
    source, out: rows and width of what the window reads and writes. size, stride, pad, dilation: of the window, from
    row to row.
    """

    before: int | None
    behind: int
    channels: int
    source: tuple[int, int]
    out: tuple[int, int]
    size: int
    stride: int
    pad: int
    dilation: int

    def read(self, rows: Rows) -> Rows:
        """The rows that the window reads for these rows of its output."""
        first, upto = rows
        last = (upto - 1) * self.stride - self.pad + (self.size - 1) * self.dilation
        return max(0, first * self.stride - self.pad), min(self.source[0], last + 1)

    def bands(self, threads: int) -> list[Rows]:
        """The rows of the output in bands that so many threads can share evenly; none where that does not pay."""
        bands = self._cut(threads)
        if any(b <= a for a, b in map(self.read, bands)):
            return []  # so far outside the image that there is nothing to read
        if threads == 1:
            return bands if self.before is None and self.channels * math.prod(self.out) >= LARGE_FLOATS else []
        share = self._time(self.source[0], self.out[0]) / threads + _FETCH * self.channels * math.prod(self.out)
        each = max(
            (self._time(b - a, upto - first) for (first, upto), (a, b) in zip(bands, map(self.read, bands))), default=0
        )
        return bands if each * len(bands) / threads < share else []

    def _time(self, source_rows: int, rows: int) -> float:
        """Time of so many rows, in that of a product of a weight and a vector."""
        lines = math.ceil(self.out[1] / VECTOR)
        time = self.behind * math.ceil(rows * self.out[1] / VECTOR)
        time += self.channels * lines * (rows + _ENDS) * _WINDOW_ROW
        return time + (self.before or 0) * math.ceil(source_rows * self.source[1] / VECTOR)

    def _cut(self, threads: int) -> list[Rows]:
        """As even as can be; the first and the last, which have one neighbour, take what is left over."""
        rows, own = self.out[0], self.channels * math.prod(self.out)
        own += 0 if self.before is None else self.channels * math.prod(self.source)
        least = 1 if self.before is None else _LEAST_ROWS
        counts = [count for count in range(threads, rows // least + 1, threads) if count > 1]
        limit = WINDOW_FLOATS if self.before is None else OWN_FLOATS
        small = [count for count in counts if own <= count * limit] or counts[-1:]
        if not small:
            return []
        count = min(small, key=lambda count: (-(-rows // count) * count, count))
        each, more = divmod(rows, count)
        sizes = [each] * count
        for k in range(more):
            sizes[k // 2 if k % 2 == 0 else -1 - k // 2] += 1
        ends = [sum(sizes[:k]) for k in range(count + 1)]
        return list(pairwise(ends))


def goes_by_rows(graph: Graph, readers: Mapping[str, Sequence[Node]], source: Node, node: Node, threads: int) -> bool:
    """Whether a depthwise node and the convolution before it are left whole for bands of rows by so many threads."""
    behind = readers[node.outputs[0]]
    if threads < 2 or len(behind) != 1 or node.outputs[0] in graph.outputs or len(node.inputs) > 3:
        return False
    if len(graph.values[node.outputs[0]].shape) != 4 or not _is_of_pixels(graph, behind[0]):
        return False
    if not all(_reads_no_margin(graph, reader) for reader in readers[behind[0].outputs[0]]):
        return False
    before, after = (int(graph.tensors[str(n.inputs[1])].count_nonzero()) for n in (source, behind[0]))
    _, channels, *out = graph.values[node.outputs[0]].shape
    _, _, *read = graph.values[source.outputs[0]].shape
    (stride, _), (pad, _), (dilation, _) = window(node)
    size = graph.values[str(node.inputs[1])].shape[2]
    sizes = (read[0], read[1]), (out[0], out[1])
    return bool(Extent(before, after, channels, *sizes, size, stride, pad, dilation).bands(threads))


def _is_of_pixels(graph: Graph, node: Node) -> bool:
    """Whether a node is a conv with a window of one pixel over all channels."""
    if node.op != "conv" or node.attrs["conv_groups"] != 1 or str(node.inputs[1]) not in graph.tensors:
        return False
    one = (*graph.values[str(node.inputs[1])].shape[2:], *node.attrs["stride"])
    return math.prod(one) == 1 and not any(node.attrs["padding"])


def _reads_no_margin(graph: Graph, node: Node) -> bool:
    return node.op != "conv" or is_depthwise(graph, node) or _is_of_pixels(graph, node)


@dataclass(frozen=True)
class Chain:
    """Steps that follow each other: perhaps the convolution before, the depthwise one, the 1 x 1 behind."""

    before: Step | None
    window: Step
    behind: Step

    @property
    def extent(self) -> Extent:
        """What its time depends on."""
        size, _, stride, _, pad, _, dilation, *_ = self.window.params
        read, out = self.window.a.sizes, self.window.out.sizes
        before = None if self.before is None else self.before.nonzeros
        sizes = (read[2], read[3]), (out[2], out[3])
        return Extent(before, self.behind.nonzeros, out[1], *sizes, size, stride, pad, dilation)


def through_rows(steps: Sequence[Step], threads: int) -> tuple[list[Step], dict[str, Storage]]:
    """The same steps, and what the bands' own tensors lie in. Steps that go by rows are there once for every band."""
    done, made = list[Step](), dict[str, Storage]()
    task = max((step.task for step in steps), default=0) + 2  # not done at once with others
    at = 0
    for first, chain in _chains(steps, threads):
        bands = chain.extent.bands(threads)
        if not bands:
            continue
        done += steps[at:first]
        for number in range(len(bands)):
            done += _band(chain, bands, number, task + number, made)
        task += len(bands) + 1  # chains are not done at once
        at = first + (2 if chain.before is None else 3)
    return [*done, *steps[at:]], made


def _chains(steps: Sequence[Step], threads: int) -> Iterator[tuple[int, Chain]]:
    """Chains, none of which shares a step with the one before, each with the number of its first step."""
    touched: dict[str, int] = {}
    for name in (o.storage for step in steps for o in (step.out, step.a, step.b) if o.storage):
        touched[name] = touched.get(name, 0) + 1
    at = 0
    for k, (step, behind) in enumerate(pairwise(steps)):
        if k < at or step.op != "depthwise" or step.task or step.b.space != "nowhere":
            continue
        if touched.get(step.out.storage) != 2 or not _by_pixels(behind, step.out.storage):
            continue
        before = steps[k - 1] if k > at and threads > 1 else None
        if before is not None and not (_leads_to(before, step) and touched[step.a.storage] == 2):
            before = None
        at = k + 2
        yield (k if before is None else k - 1), Chain(before, step, behind)


def _by_pixels(step: Step, source: str) -> bool:
    """Whether a step is a conv that reads of `source` no pixel but the one that it writes, and zeroes no margins."""
    if not _plain(step) or step.a.storage != source or step.out.storage == source:
        return False
    plane, index = step.a.strides[1], step.arrays["index"]
    return plane > 0 and not np.any(index % plane)


def _leads_to(step: Step, window: Step) -> bool:
    """Whether a step is a conv that writes just what the window reads."""
    alike = (step.out.offset, step.out.sizes, step.out.strides) == (window.a.offset, window.a.sizes, window.a.strides)
    return _plain(step) and step.b.space == "nowhere" and step.out.storage == window.a.storage and alike


def _plain(step: Step) -> bool:
    """Whether a step is a conv by itself, without margins or copies around what it writes."""
    conv = step.op == "conv" and not step.task and not step.bands and step.out.space == "arena"
    return conv and step.front is None and not any(step.params[8:9])


def _band(chain: Chain, bands: Sequence[Rows], number: int, task: int, made: dict[str, Storage]) -> list[Step]:
    """The steps of one band."""
    window, behind, steps = chain.window, chain.behind, []
    extent, (first, upto) = chain.extent, bands[number]
    top, bottom = extent.read(bands[number])
    size, width, stride, stride_x, pad, *rest = window.params
    source = _rows(window.a, top, bottom)
    if chain.before is not None:
        most = max(b - a for a, b in map(extent.read, bands))
        source = _own(window.a, bottom - top, most, number, made)
        steps.append(_conv(replace(chain.before, a=_rows(chain.before.a, top, bottom)), source))
    middle = _own(window.out, upto - first, max(b - a for a, b in bands), number, made)
    params = (size, width, stride, stride_x, pad + top - first * stride, *rest)
    steps.append(replace(window, a=source, out=middle, params=params))
    index = behind.arrays["index"]
    if middle.strides[1] != window.out.strides[1]:
        index = index // window.out.strides[1] * middle.strides[1]
    moved = replace(behind, a=middle, b=_rows(behind.b, first, upto), arrays={**behind.arrays, "index": index})
    steps.append(_conv(moved, _rows(behind.out, first, upto)))
    named = [replace(step, name=f"{step.name}/{number}", task=task) for step in steps]
    return named if number == 0 else [replace(step, weights=0, nonzeros=0) for step in named]  # once is enough


def _rows(operand: Operand, first: int, upto: int) -> Operand:
    if operand.space == "nowhere":
        return operand
    n, channels, _, width = operand.sizes
    return replace(
        operand, offset=operand.offset + first * operand.strides[2], sizes=(n, channels, upto - first, width)
    )


def _own(operand: Operand, rows: int, most: int, number: int, made: dict[str, Storage]) -> Operand:
    """As many rows of an operand, in a storage of the band's own that has room for `most`."""
    (n, channels, _, width), (batch, plane, row, pixel) = operand.sizes, operand.strides
    by_rows = row > plane
    plane = plane if by_rows else -(-most * row // VECTOR) * VECTOR | VECTOR
    front = VECTOR if by_rows else 0  # vectors may begin before the first pixel
    name = f"{operand.storage}/{number}"
    made[name] = Storage(name, channels, most, width, row, plane, front=front, by_rows=by_rows)
    sizes, strides = (n, channels, rows, width), (batch, plane, row, pixel)
    return replace(operand, offset=front, sizes=sizes, strides=strides, storage=name)


def _conv(step: Step, out: Operand) -> Step:
    """A conv whose `a` and `b` have been moved to as many rows as `out` has."""
    height, segments, length, *rest = step.params
    rows, width = out.sizes[2:]
    if segments == 1 and step.out.sizes[2] > 1:  # a run over the plane
        length = (rows - 1) * out.strides[2] + width
    else:
        segments = rows
    return replace(step, out=out, params=(height, segments, length, *rest))
