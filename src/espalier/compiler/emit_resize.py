"""Steps that make planes larger: up-sampling, and the phases of transposed convolutions put side by side."""

from __future__ import annotations

import numpy as np

from espalier.compiler.emit import Emitter
from espalier.compiler.layout import Place
from espalier.graph.ir import Node


def resize(e: Emitter, node: Node) -> None:
    """Up-sample planes [c, h, w], to the nearest pixel or bilinearly; `_places` says where each output looks."""
    x, y = e.places[str(node.inputs[0])], e.target(node.outputs[0])
    a, out = x.operand(), y.operand()
    scales = node.attrs["scale"] or [None, None]
    scales = [None, *scales][-2:]
    align = node.attrs.get("align")
    lines, columns = (_places(a.sizes[d], out.sizes[d], scales[d - 2], align) for d in (2, 3))
    padding = -out.sizes[3] % 16
    first, second, share = (
        np.concatenate([line, np.pad(column * step, (0, padding))])
        for line, column, step in zip(lines, columns, (a.strides[3], a.strides[3], 1))
    )
    arrays = {"index": first.astype(np.int32)}
    if node.op == "upsample_bilinear":
        arrays = {"index": np.concatenate([first, second]).astype(np.int32), "values": share.astype(np.float32)}
    e.step(name=node.name, op="resize", out=out, a=a, front=y.front(), arrays=arrays, nodes=(node.name,))


def _places(
    size: int, wanted: int, scale: float | None, align: bool | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every output: the pixel before it, the one after it, and the share of the latter (as PyTorch has them).

    align: None for the nearest pixel; True where the corners of both images lie on one another.
    """
    at = np.arange(wanted, dtype=np.float32)
    step = np.float32(1 / scale if scale else size / wanted)
    if align is None:
        nearest = np.minimum(np.floor(at * step).astype(np.int64), size - 1)
        return nearest, nearest, np.zeros(wanted, np.float32)
    if align:
        step = np.float32((size - 1) / (wanted - 1) if wanted > 1 else 0)
        place = at * step
    else:
        place = np.maximum(step * (at + np.float32(0.5)) - np.float32(0.5), 0)
    before = np.minimum(np.floor(place).astype(np.int64), size - 1)
    return before, np.minimum(before + 1, size - 1), np.clip(place - before, 0, 1).astype(np.float32)


def unphase(e: Emitter, node: Node) -> None:
    """The planes of channel (c, dy, dx) become every factor-th pixel of plane c, from (dy, dx) less the margin on."""
    x, y = e.places[str(node.inputs[0])], e.target(node.outputs[0])
    if y.front() is not None:
        e.clear(y, f"{node.name}/margins")
    factor, (top, left) = node.attrs["factor"], node.attrs["crop"]
    channels, height, width = y.shape
    sc, sy, sx = x.strides
    for dy in range(factor):
        for dx in range(factor):
            rows, columns = (_span(d, crop, factor, n) for d, crop, n in ((dy, top, height), (dx, left, width)))
            if not rows or not columns:
                continue
            (y0, from_y, count_y), (x0, from_x, count_x) = rows, columns
            shape = (channels, count_y, count_x)
            source = Place(
                shape,
                (sc * factor * factor, sy, sx),
                x.offset + (dy * factor + dx) * sc + from_y * sy + from_x * sx,
                x.storage,
                x.space,
                x.index,
            )
            into = (y.strides[0], y.strides[1] * factor, y.strides[2] * factor)
            inside = Place(shape, into, y.offset + y0 * y.strides[1] + x0 * y.strides[2], y.storage)
            out, a = inside.operand(), source.operand()
            e.step(name=f"{node.name}/{dy}{dx}", op="copy", out=out, a=a, nodes=(node.name,))


def _span(phase: int, crop: int, factor: int, size: int) -> tuple[int, int, int] | None:
    """First output of a phase, the pixel of the phase that it takes, and how many outputs the phase has."""
    skipped = max(0, -(-(crop - phase) // factor))
    first = phase + skipped * factor - crop
    return (first, skipped, -(-(size - first) // factor)) if first < size else None
