"""Steps for ops with weights: convolutions and linear layers, as row-blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from espalier.compiler import emit_winograd as winograd
from espalier.compiler.blocks import LANES_HEIGHT, Choice, choose, choose_conv, choose_groups
from espalier.compiler.emit import Emitter, fused_activation
from espalier.compiler.emit_stem import stem
from espalier.compiler.formats import RowBlocks
from espalier.compiler.layout import Place, planes_of
from espalier.compiler.plan_layout import phases_of
from espalier.compiler.program import Operand, Step
from espalier.compiler.window import Pair, is_depthwise, window
from espalier.graph.ir import Node

_PIECE_FLOATS = 8 * 1024  # of what a tile of single rows reads at once: most of the nearest cache
_WIDEST_TILE = 128  # pixels of such a tile
_LEAST_COLUMNS = 8  # of a row in a piece: else its sums come and go more than they grow
_CHUNK_FLOATS = 48 * 1024  # of activations that a chunk reads: they should stay in half of a small L2 cache


def conv(e: Emitter, node: Node) -> None:
    """act(window * x + bias + residual), as row-blocks over planes or, where that pays, by Winograd.

    x: [i, h, w] or [i, w]; weight: [o, i / conv_groups, (y,) x]; an output of one pixel is made as by a linear layer.
    """
    x, weight, bias, residual = (*node.inputs, None)[:4]
    w = e.array(weight)
    assert x is not None and w is not None
    while w.ndim < 4:
        w = w[:, :, None]  # a window of height 1
    _, height, width = planes_of(e.layout.shapes[node.outputs[0]])
    groups = node.attrs["conv_groups"]
    matrices = list(w.reshape(groups, w.shape[0] // groups, -1))
    out = e.target(node.outputs[0])
    if height * width == 1 and out.front() is None:
        _conv_at_one_pixel(e, node, w, matrices, out)
        return
    assert out.storage is not None
    if node.name in e.layout.stems:
        stem(e, node, w, out, e.array(bias))
        return
    choice = choose_conv(matrices, height, width, width if out.storage.by_rows else out.storage.row_stride)
    b = Operand() if residual is None else _residual(e, residual, out).operand()
    read = e.places[x].storage
    shifted = node.name in e.layout.shifted or (read is not None and read.sides > 0)  # there are no side margins
    if not shifted and winograd.pays(node, w, height, width, choice.work):
        winograd.winograd(e, node, w, out, e.array(bias), b)
        return
    source, index = _columns(e, node, w.shape, choice.blocks.columns)
    out_operand, in_operand = out.operand(), source.operand()
    assert source.storage is not None
    row_in, row_out = source.storage.row_stride, out.storage.row_stride
    flat = row_in == row_out and not (source.storage.by_rows or out.storage.by_rows)
    flat = flat and choice.blocks.height != LANES_HEIGHT and _flat_pays(height, width, row_out)
    run = (height - 1) * row_out + width
    chunk = max(192, min(8192, _CHUNK_FLOATS // in_operand.sizes[1]))
    segments = (1, run, 0, 0, 0) if flat else (height, width, row_in, row_out, b.strides[2])
    sides = out.storage.sides if flat and out.storage.name == node.outputs[0] else 0
    if sides:
        e.sided.add(node.outputs[0])
    arrays, pieces = _arrays(choice, index, e.array(bias)), 0
    if groups == 1 and choice.blocks.height == 1:
        copies = w.shape[3] if shifted else 1  # of the image, a column or more to either side
        pieces = _pieces(choice.blocks, w.shape, run if flat else width, row_in, copies)
        arrays |= in_pieces(choice.blocks, arrays["index"], w.shape[1], pieces) if pieces else {}
    e.steps.append(
        Step(
            name=node.name,
            op="conv",
            out=out_operand,
            a=in_operand,
            b=b,
            activation=fused_activation(node),
            front=out.front(),
            params=(choice.blocks.height, *segments, chunk, int(_read_by_channels(e, node.outputs[0])), sides, pieces),
            task=node.attrs.get("task", 0),
            arrays=arrays,
            **_facts(node, choice, w),
        )
    )


def _pieces(blocks: RowBlocks, shape: tuple[int, ...], run: int, row_stride: int, copies: int) -> int:
    """In how many pieces of channels single rows take their columns, so that what a tile reads of one stays near; or 0.

    A window of several columns reads the same lines for all of them. run: pixels that a tile may lie in. row_stride: of
    what it reads. copies: of that, a column apart.
    """
    _, channels, high, wide = shape
    pixels = min(run, _WIDEST_TILE)
    line = min(high * (pixels + 16), pixels + 16 + (high - 1) * row_stride)  # rows apart, or one behind the other
    pieces = -(-channels * line * copies // _PIECE_FLOATS)
    most = min(len(blocks.columns) // (_LEAST_COLUMNS * max(1, blocks.rows)), channels)
    return min(pieces, most) if high * wide > 1 and min(pieces, most) > 1 else 0


def in_pieces(blocks: RowBlocks, index: np.ndarray, channels: int, pieces: int) -> dict[str, np.ndarray]:
    """Arrays of single rows whose columns come in so many pieces of channels: the first of all rows, then the next."""
    count = len(blocks.offsets) - 1
    block = np.repeat(np.arange(count), np.diff(blocks.offsets))
    channel = blocks.columns.astype(np.int64) * channels // max(1, blocks.columns_total)
    part = channel * pieces // channels * count + block
    order = np.argsort(part, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=pieces * count))]).astype(np.int32)
    return {"starts": starts, "index": index[order], "values": blocks.values[order]}


def _read_by_channels(e: Emitter, value: str) -> bool:
    """Whether depthwise convs are all that reads a value: threads share out their channels."""
    readers = e.readers.get(value, ())
    return bool(readers) and all(reader.op == "conv" and is_depthwise(e.graph, reader) for reader in readers)


def _residual(e: Emitter, value: str, out: Place) -> Place:
    """Where a residual is read: where it lies, or beside `out` row by row or plane by plane as that lies."""
    place = e.places[value]
    assert out.storage is not None
    rows = place.space == "arena" and place.storage is not None and place.fits(0, 0)
    return place if out.storage.by_rows and rows else e.like(value, out)


def _flat_pays(height: int, width: int, row_stride: int, lanes: int = 16) -> bool:
    """Whether a plane with its side margins, as one run, takes fewer vectors than row by row.

    A vector alone costs a third more: the weights are loaded for it, and for nothing else.
    """
    run = (height - 1) * row_stride + width
    in_row = -(-width // lanes)
    return -(-run // lanes) <= height * in_row * (1.3 if in_row == 1 else 1.05)


def _facts(node: Node, choice: Choice, w: np.ndarray) -> dict:
    whole = choice.blocks.rows * choice.blocks.columns_total == w.size  # then the blocks hold all that is not zero
    return dict(
        format=choice.format,
        reason=choice.reason,
        nonzeros=int(np.count_nonzero(choice.blocks.values if whole else w)),
        weights=w.size,
        nodes=tuple(node.attrs.get("fused", (node.name,))),
    )


def _arrays(choice: Choice, index: np.ndarray, bias: np.ndarray | None) -> dict[str, np.ndarray]:
    b = choice.blocks
    arrays = {"rows": b.row_order, "starts": b.offsets, "index": index.astype(np.int32, copy=False), "values": b.values}
    return arrays if bias is None else {**arrays, "bias": bias}


def _columns(e: Emitter, node: Node, shape: tuple[int, ...], columns: np.ndarray) -> tuple[Place, np.ndarray]:
    """What the kernel reads, and where in it, relative to its pixel (0, 0, 0), each of `columns` begins."""
    used = np.flatnonzero(np.bincount(columns))  # blocks share columns: each is found once
    source, begins = _begins(e, node, shape, used)
    table = np.zeros(int(used[-1]) + 1 if used.size else 0, np.int32)
    table[used] = begins
    return source, table[columns]


def _begins(e: Emitter, node: Node, shape: tuple[int, ...], columns: np.ndarray) -> tuple[Place, np.ndarray]:
    """As `_columns`, for columns that differ."""
    _, _, kernel_y, kernel_x = shape
    channel, tap = np.divmod(columns.astype(np.int64), kernel_y * kernel_x)
    y, x = np.divmod(tap, kernel_x)
    (sy, sx), (py, px), (dy, dx) = window(node)
    if node.name in e.layout.shifted:
        shifted = [(-py, k * dx - px) for k in range(kernel_x)]
        source = _gathered(e, node, e.layout.shifted[node.name], shifted)
        assert source.storage is not None
        plane, row = source.storage.plane, source.storage.row_stride
        return source, x * (e.layout.shapes[str(node.inputs[0])][0] * plane) + channel * plane + y * dy * row
    beside = e.places[str(node.inputs[0])].storage
    if sy == sx == 1 and px and beside is not None and beside.sides:
        source = _beside(e, str(node.inputs[0]))
        return source, x * beside.sides + channel * beside.plane + (y * dy - py) * beside.row_stride
    if sy == sx == 1:
        source = e.planes(str(node.inputs[0]), py, px)
        assert source.storage is not None
        plane, row = source.storage.plane, source.storage.row_stride
        return source, channel * plane + (y * dy - py) * row + (x * dx - px)
    shifts = e.layout.roots[phases_of(node)].shifts
    (far_y, origin_y), (far_x, origin_x) = np.divmod(y * dy, sy), np.divmod(x * dx, 1 << 30 if shifts else sx)
    origins = np.stack([origin_y - py, origin_x - px], axis=1)
    source = _phases(e, node, {(int(a), int(b)) for a, b in np.unique(origins, axis=0)})
    assert source.storage is not None
    plane, row = source.storage.plane, source.storage.row_stride
    first = e.phases[phases_of(node)][1]
    number = np.array([first[a, b] for a, b in origins.tolist()], np.int64).reshape(-1)
    per_phase = e.layout.shapes[str(node.inputs[0])][0] * plane
    return source, number * per_phase + channel * plane + far_y * row + far_x


def _beside(e: Emitter, value: str) -> Place:
    """The planes of a value and the copies to either side, gathered where who wrote it has not stored them."""
    place = e.places[value]
    storage = place.storage
    assert storage is not None
    channels, height, width = place.shape
    if value not in e.sided:
        e.sided.add(value)
        above = storage.vertical
        sizes, strides = (2, channels, height + 2 * above, width), (2 * storage.sides, storage.plane, width, 1)
        first = replace(place, offset=place.offset - storage.sides - above * width)
        arrays = {"index": np.array([-above, -1, -above, 1], np.int32)}
        out, a = first.operand_of(sizes, strides), place.operand()
        e.step(name=f"{value}/sides", op="gather", out=out, a=a, params=(1, 1), arrays=arrays)
    return replace(place, shape=(3 * channels, height, width), offset=place.offset - storage.sides)


def _phases(e: Emitter, node: Node, used: set[Pair]) -> Place:
    """The phases of a strided window, one set of planes each: the kernel reads them with stride 1.

    used: where those that this conv reads begin. The first to read a value with this stride gathers for all.
    """
    name = phases_of(node)
    if name not in e.phases:
        for other in e.layout.strided[name]:
            used = used | (_origins(other, e) if other is not node else set())
    return _gathered(e, node, name, sorted(used) or [(0, 0)])


def _gathered(e: Emitter, node: Node, name: str, origins: Sequence[Pair]) -> Place:
    """What begins at each of `origins` of the value that a conv reads, in steps of its stride; made once for all convs.

    name: of the root that holds it.
    """
    value = str(node.inputs[0])
    if name in e.phases:
        return e.phases[name][0]
    channels = e.layout.roots[name].channels
    storage = e.use(e.layout.storage(name, len(origins)))
    place = Place((storage.channels, storage.height, storage.width), (storage.plane, storage.row_stride, 1), 0, storage)
    sizes = (len(origins), channels, storage.height, storage.width)
    out = place.operand_of(sizes, (channels * storage.plane, storage.plane, storage.row_stride, 1))
    a = e.places[value].operand()
    if len(e.places[value].shape) == 1:
        a = replace(a, sizes=(1, a.sizes[3], 1, 1), strides=(0, a.strides[3], 0, 0))
    stride, _, _ = window(node)
    arrays = {"index": np.array(origins, np.int32).reshape(-1)}
    e.step(name=f"{node.name}/phases", op="gather", out=out, a=a, params=stride, arrays=arrays, nodes=(node.name,))
    e.phases[name] = place, {origin: number for number, origin in enumerate(origins)}
    return place


def _origins(node: Node, e: Emitter) -> set[Pair]:
    """Where the phases begin that the window of a strided conv can read."""
    (sy, sx), (py, px), (dy, dx) = window(node)
    kernel_y, kernel_x = [1, *e.graph.values[str(node.inputs[1])].shape[2:]][-2:]
    shifts = e.layout.roots[phases_of(node)].shifts
    across = {k * dx - px if shifts else k * dx % sx - px for k in range(kernel_x)}
    return {(k * dy % sy - py, x) for k in range(kernel_y) for x in across}


def _conv_at_one_pixel(e: Emitter, node: Node, w: np.ndarray, matrices: list[np.ndarray], out: Place) -> None:
    """A conv that makes one pixel is a linear layer on the window's entries that lie in the image."""
    x = e.places[str(node.inputs[0])]
    channels, height, width = planes_of(x.shape)
    _, (py, px), (dy, dx) = window(node)
    y = np.arange(w.shape[2]) * dy - py
    z = np.arange(w.shape[3]) * dx - px
    inside = ((y >= 0) & (y < height))[:, None] & ((z >= 0) & (z < width))[None, :]
    groups, rows = len(matrices), matrices[0].shape[0]
    kept = [m.reshape(rows, -1, *w.shape[2:])[:, :, inside].reshape(rows, -1) for m in matrices]
    if groups == 1:
        choice = choose(kept[0], "linear")
    else:
        choice = choose_groups(kept, "linear")
    sc, sy, sx = x.strides if len(x.strides) == 3 else (x.strides[0], 0, x.strides[-1])
    taps = (y[:, None] * sy + z[None, :] * sx)[inside]
    table = (np.arange(channels)[:, None] * sc + taps[None, :]).reshape(-1)
    _linear_step(e, node, choice, w, x, table, out, (1, 0, 0), out.strides[0])


def linear(e: Emitter, node: Node) -> None:
    """act(x w' + bias + residual), as row-blocks. x: [..., i]; weight: [o, i]; result: [..., o]."""
    weight = e.array(node.inputs[1])
    assert weight is not None
    out = e.clean_target(node.outputs[0])
    choice = choose(weight, "linear")
    if node.inputs[0] in e.tables:
        x, table = e.tables[str(node.inputs[0])]
        _linear_step(e, node, choice, weight, x, table, out, (1, 0, 0), out.strides[-1])
        return
    x = e.places[str(node.inputs[0])]
    table = np.arange(weight.shape[1]) * x.strides[-1]
    lead = x.shape[:-1]
    for outer in np.ndindex(*lead[:-1]):  # one step per entry of all leading dimensions but the last
        shift_in, shift_out = (int(np.dot(outer, p.strides[: len(outer)])) for p in (x, out))
        inner = (lead[-1], x.strides[-2], out.strides[-2]) if lead else (1, 0, 0)
        moved = replace(x, offset=x.offset + shift_in), replace(out, offset=out.offset + shift_out)
        _linear_step(e, node, choice, weight, moved[0], table, moved[1], inner, out.strides[-1], outer)


def _linear_step(
    e: Emitter,
    node: Node,
    choice: Choice,
    w: np.ndarray,
    x: Place,
    table: np.ndarray,
    out: Place,
    positions: tuple[int, int, int],
    row_stride: int,
    outer: tuple[int, ...] = (),
) -> None:
    """table: column -> place in x. positions: how many, and their strides in x and out."""
    count, step_in, step_out = positions
    bias, residual = (*node.inputs, None, None)[2:4]
    b, residual_step = Operand(), 0
    if residual is not None:
        place = e.places[residual]
        shift = int(np.dot(outer, place.strides[: len(outer)])) if outer else 0
        last = place.strides[0] if node.op == "conv" else place.strides[-1]
        residual_step = place.strides[-2] if count > 1 else 0
        moved = replace(place, offset=place.offset + shift)
        b = moved.operand_of((1, 1, count, w.shape[0]), (0, 0, residual_step, last))
    columns = choice.blocks.columns
    index = table.astype(np.int32)[columns] if columns.size else columns
    e.steps.append(
        Step(
            name=node.name,
            op="linear",
            out=out.operand_of((1, 1, count, w.shape[0]), (0, 0, step_out, row_stride)),
            a=x.operand(),
            b=b,
            activation=fused_activation(node),
            params=(choice.blocks.height, count, step_in, step_out, residual_step, row_stride),
            arrays=_arrays(choice, index, e.array(bias)),
            **_facts(node, choice, w),
        )
    )
