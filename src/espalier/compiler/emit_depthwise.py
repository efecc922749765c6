"""Steps for depthwise convolutions, which read planes as they lie: no margins, no gathered phases."""

from __future__ import annotations

import numpy as np

from espalier.compiler import emit_blocks
from espalier.compiler.emit import Emitter, fused_activation
from espalier.compiler.layout import Place
from espalier.compiler.program import Operand
from espalier.compiler.window import is_depthwise, window
from espalier.graph.ir import Node


def conv(e: Emitter, node: Node) -> None:
    """A convolution of either kind."""
    if is_depthwise(e.graph, node):
        depthwise(e, node)
    else:
        emit_blocks.conv(e, node)


def depthwise(e: Emitter, node: Node) -> None:
    """activation(window * x + bias + residual), one window per output channel."""
    x, weight, bias, residual = (*node.inputs, None)[:4]
    w, shift = e.array(weight), e.array(bias)
    assert x is not None and w is not None
    channels, groups = w.shape[0], int(node.attrs["conv_groups"])
    size_y, size_x = [1, *w.shape[2:]][-2:]
    stride, padding, dilation = window(node)
    source = e.places[x] if _has_rows(e.places[x]) else e.planes(x)
    out = e.target(node.outputs[0])
    added = None if residual is None else e.places[residual]
    if added is not None and not _has_rows(added):
        added = e.like(str(residual), out)
    arrays = {"values": w.reshape(-1)} if shift is None else {"values": w.reshape(-1), "bias": shift}
    nonzeros = int(np.count_nonzero(w))
    e.step(
        name=node.name,
        op="depthwise",
        out=out.operand(),
        a=source.operand(),
        b=Operand() if added is None else added.operand(),
        activation=fused_activation(node),
        front=out.front(),
        params=(size_y, size_x, *stride, *padding, *dilation, channels // groups),
        arrays=arrays,
        task=node.attrs.get("task", 0),
        format=f"depthwise {size_y}x{size_x}",
        reason=f"one window per channel, density {nonzeros / max(1, w.size):.2f}: nothing is skipped",
        nonzeros=nonzeros,
        weights=w.size,
        nodes=tuple(node.attrs.get("fused", (node.name,))),
    )


def _has_rows(place: Place) -> bool:
    """Whether pixels of a row lie side by side in the arena."""
    return place.space == "arena" and len(place.shape) in (2, 3) and place.strides[-1] == 1
