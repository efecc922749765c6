"""Layout: how activations lie in memory.

A value [channels, height, width] lies as planes, one per channel, whose rows and planes are kept apart by margins of
zeros wide enough for the windows that read them. The margin right of a row is the margin left of the next one, and the
margin below a plane the margin above the next. Values that convolutions connect get equal row strides, so that a whole
plane, margins and all, is one run of pixels.

Or it lies row by row: the same row of all channels, then the next. Threads that share out pixels then write to memory
that lies apart, so that no core's prefetcher takes another's lines; so do small images whose rows fill vectors.

Concatenations along channels are laid out first and their parts written in place; channel slices read in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from espalier.compiler.program import Four, Operand, Space, dense_strides
from espalier.graph.ir import Graph, Node

VECTOR = 16  # floats
_ROWS_AT_MOST = 1100  # pixels of an image that lies row by row
_WASTE = 1.1  # vectors that this may take more than planes: 28 pixels in two vectors
# Planes of so many floats begin with a cache line, so that no vector lies in two; and in different sets of the cache.
_WHOLE_LINES, _ODD_LINES = 48, 144
_BATCH_STRIDE = 1 << 50  # of the batch dimension while views are worked out; no sample is as large


@dataclass(frozen=True)
class Storage:
    """A buffer of the arena: planes with margins.

    row_stride, plane: floats from row to row and from channel to channel. vertical, side: rows of zeros above and
    below, columns of zeros beside. front: floats before pixel (0, 0, 0). by_rows: rows of all channels lie together.
    sides: 0, or: so many floats before and behind lie copies of the planes, shifted by a column to either side.
    """

    name: str
    channels: int
    height: int
    width: int
    row_stride: int
    plane: int
    vertical: int = 0
    side: int = 0
    front: int = 0
    by_rows: bool = False
    sides: int = 0

    @property
    def margins(self) -> bool:
        """Whether zeros lie around its planes."""
        return self.vertical > 0 or self.side > 0

    @property
    def size_bytes(self) -> int:
        """Bytes of one sample in the arena."""
        rows = (self.height + self.vertical) * self.row_stride + 2 * VECTOR  # nothing lies behind the last row
        return 4 * (self.front + (rows if self.by_rows else self.channels * self.plane) + self.sides)


@dataclass(frozen=True)
class Place:
    """Where a value lies: a strided view [*shape] of a storage, an input or a constant."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    storage: Storage | None = None
    space: Space = "arena"
    index: int = 0
    constant: object = None

    def operand(self) -> Operand:
        """As four dimensions: [1, channels, height, width], [1, channels, 1, length] or [1, 1, 1, n]."""
        return self.operand_of(*four(self.shape, self.strides))

    def operand_of(self, sizes: Four, strides: Four) -> Operand:
        """An operand of these sizes and strides (floats) that begins where the place does."""
        name = self.storage.name if self.storage else ""
        return Operand(self.space, self.index, self.offset, sizes, strides, name, self.constant)  # type: ignore[arg-type]

    @property
    def dense(self) -> bool:
        """Whether its elements lie one after another."""
        wanted = dense_strides(self.shape)
        return all(size == 1 or a == b for size, a, b in zip(self.shape, self.strides, wanted))

    def front(self) -> int | None:
        """Margin floats that the writer of this place must zero before it; None where there are no margins."""
        if self.storage is None or not self.storage.margins:
            return None
        if self.offset == self.storage.front and not self.storage.sides:
            return self.storage.front
        # part of a concatenation, read before the part in front of it is written: that one's last margin, too
        return self.storage.vertical * self.storage.row_stride + self.storage.side

    def fits(self, vertical: int, side: int) -> bool:
        """Whether a window may reach so far beyond the image, and kernels may read along its rows."""
        s = self.storage
        if s is None or self.space != "arena" or s.vertical < vertical or s.side < side:
            return False
        sizes, strides = four(self.shape, self.strides)
        whole = sizes[2] == s.height and sizes[3] == s.width
        apart = (sizes[3] == 1 or strides[3] == 1) and (sizes[2] == 1 or strides[2] == s.row_stride)
        return whole and apart and (sizes[1] == 1 or strides[1] == s.plane) and sizes[0] == 1


def four(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Four, Four]:
    """Four dimensions of a per-sample shape of rank 0 to 4."""
    if len(shape) == 2:
        return (1, shape[0], 1, shape[1]), (0, strides[0], shape[1] * strides[1], strides[1])
    if len(shape) == 4:
        return shape, strides  # type: ignore[return-value]
    lead = 4 - len(shape)
    return (1,) * lead + shape, (0,) * lead + strides  # type: ignore[return-value]


def planes_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width of a per-sample shape of rank 1 to 3.

    >>> planes_of((8, 5, 5)), planes_of((8, 5)), planes_of((8,))
    ((8, 5, 5), (8, 1, 5), (8, 1, 1))
    """
    if len(shape) == 3:
        return shape
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], 1, 1)


def view(source: Place, function: object, batch: int, node_attrs: dict[str, object]) -> list[Place] | None:
    """`function(tensor, **attrs)` as views of `source`, found out on a tensor without data; None where it must copy."""
    meta = torch.empty_strided((batch, *source.shape), (_BATCH_STRIDE, *source.strides), device="meta")
    try:
        result = function(meta, **node_attrs)  # type: ignore[operator]
    except RuntimeError:
        return None
    places = []
    for tensor in (result,) if isinstance(result, torch.Tensor) else result:
        kept = tensor.ndim and tensor.shape[0] == batch and (batch == 1 or tensor.stride(0) == _BATCH_STRIDE)
        offset = int(tensor.storage_offset())
        if not kept or offset >= _BATCH_STRIDE or tensor.untyped_storage() is None or tensor._base is None:
            return None
        places.append(
            replace(
                source, shape=tuple(tensor.shape[1:]), strides=tuple(tensor.stride()[1:]), offset=source.offset + offset
            )
        )
    return places


@dataclass
class Root:
    """A storage in the making."""

    channels: int
    height: int
    width: int
    vertical: int = 0
    side: int = 0
    planes: bool = False  # it lies in planes: other values are parts or views of it, or a conv wants them
    pixels: bool = False  # a convolution reads or writes it
    shifts: bool = False  # of phases: every column of a window has one of its own
    sides: bool = False  # copies shifted by a column to either side lie beside its planes, instead of side margins


@dataclass
class Layout:
    """The storages of one native piece of a graph.

    home: fresh value (written by a step) -> root and first channel there. roots: by name; a value that must be copied
    into planes has the root "<value>/planes".
    """

    graph: Graph
    inputs: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    home: dict[str, tuple[str, int]] = field(default_factory=dict)
    roots: dict[str, Root] = field(default_factory=dict)
    above: dict[str, str] = field(default_factory=dict)  # union-find over roots: equal row strides
    strided: dict[str, list[Node]] = field(default_factory=dict)  # root of phases -> the convs that read them
    shifted: dict[str, str] = field(default_factory=dict)  # conv -> root of the shifted planes that it reads
    stems: set[str] = field(default_factory=set)  # convs that read the image as it lies

    def storage(self, root: str, times: int = 1) -> Storage:
        """The finished storage of a root, with `times` its channels."""
        r = self.roots[root]
        if times > 1:
            r = replace(r, channels=r.channels * times)
        if r.height * r.width == 1 and not r.vertical and not r.side:
            return Storage(root, r.channels, 1, 1, 1, 1)
        if r.sides:
            return _with_sides(root, r)
        same = [o for name, o in self.roots.items() if self._find(name) == self._find(root)]
        stride = max(o.width + o.side for o in same)
        if _by_rows(r, stride):
            return _in_rows(root, r)
        reach = r.vertical * stride + r.side  # what windows read before the first and after the last pixel
        plane = (r.height - 1) * stride + r.width + reach
        if plane >= _WHOLE_LINES:
            plane = -(-plane // 16) * 16
        if plane >= _ODD_LINES:
            plane |= 16
        front = -(-reach // 16) * 16
        return Storage(root, r.channels, r.height, r.width, stride, plane, r.vertical, r.side, front)

    def place(self, value: str) -> Place:
        """Where a fresh value will be written."""
        shape = self.shapes[value]
        if len(shape) == 0 or len(shape) > 3:
            size = math.prod(shape)
            storage = Storage(value, 1, 1, size, size, size)
            return Place(shape, dense_strides(shape), 0, storage)
        root, channel = self.home[value]
        return self._planes(self.storage(root), channel, shape)

    def copy_place(self, value: str) -> Place:
        """Where `value` is copied to when it must lie as planes and does not."""
        root = f"{value}/planes"
        if root in self.roots:
            return self._planes(self.storage(root), 0, self.shapes[value])
        planned = self.storage(self.home[value][0])  # written in another order than planned
        assert not planned.sides, "nobody who needs side margins reads it"
        channels = planes_of(self.shapes[value])[0]
        stride = channels * planned.plane if planned.by_rows else planned.row_stride
        storage = replace(planned, name=root, channels=channels, row_stride=stride)
        return self._planes(storage, 0, self.shapes[value])

    @staticmethod
    def _planes(storage: Storage, channel: int, shape: tuple[int, ...]) -> Place:
        strides = {3: (storage.plane, storage.row_stride, 1), 2: (storage.plane, 1), 1: (storage.plane,)}[len(shape)]
        return Place(shape, strides, storage.front + channel * storage.plane, storage)

    # -- while planning --

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """A root for a value of this per-sample shape, without margins so far."""
        self.roots[name] = Root(*planes_of(shape))
        self.above[name] = name

    def need(self, root: str, vertical: int, side: int) -> None:
        """Give a root margins of so many rows and columns at least."""
        r = self.roots[root]
        r.vertical, r.side = max(r.vertical, vertical), max(r.side, side)

    def join(self, a: str, b: str) -> None:
        """Equal row strides, where the widths are close enough that little is wasted."""
        x, y = self.roots[a], self.roots[b]
        if min(x.width, y.width) * 5 >= max(x.width, y.width) * 4:
            self.above[self._find(a)] = self._find(b)

    def _find(self, name: str) -> str:
        while (above := self.above[name]) != name:
            self.above[name] = name = self.above[above]  # so that the next one has half as far
        return name


def _by_rows(r: Root, row_stride: int) -> bool:
    """Whether an image lies row by row: where its rows take about as few vectors as a run over the plane."""
    narrow = r.channels * r.width <= r.side + VECTOR  # `front` would no longer say how many rows of margin there are
    if r.planes or not r.pixels or narrow or r.channels == 1 or r.height == 1 or r.height * r.width > _ROWS_AT_MOST:
        return False
    run = (r.height - 1) * row_stride + r.width
    return r.height * -(-r.width // VECTOR) <= _WASTE * -(-run // VECTOR)


def _with_sides(name: str, r: Root) -> Storage:
    """Planes of whole cache lines, in different sets of the cache, with their copies before and behind.

    The row above begins with a line: of rows of 8 pixels that makes two of the three in a window do so.
    """
    plane = -(-(r.height + 2 * r.vertical) * r.width // VECTOR) * VECTOR | VECTOR
    front, sides = r.vertical * r.width, r.channels * plane
    return Storage(name, r.channels, r.height, r.width, r.width, plane, r.vertical, 0, front + sides, sides=sides)


def _in_rows(name: str, r: Root) -> Storage:
    """Rows begin with a cache line where that takes little more memory."""
    pitch = r.width + r.side
    whole = -(-pitch // VECTOR) * VECTOR
    pitch = whole if whole <= 1.15 * pitch else pitch
    stride = r.channels * pitch
    front = -(-max(1, r.vertical * stride + r.side) // VECTOR) * VECTOR  # vectors may begin before the first pixel
    return Storage(name, r.channels, r.height, r.width, stride, pitch, r.vertical, r.side, front, True)
