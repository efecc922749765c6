"""Steps for a wide window at stride 2 over few channels, as a network's first, by Winograd's F(4, 4) along the rows.

The even and the odd columns of the window read every other pixel each, so both are windows of up to 4 columns at stride
1. For each of its rows, 4 pixels take 7 products with either instead of 4 times as many as the window has columns:

    y = A' [(G w) * (B' x)]        per 4 pixels of a row, from 7 inputs

The kernel makes B' x and the pixels (native/kernels/stem.c); here G w is made. Lavin and Gray, Fast Algorithms for
Convolutional Neural Networks, 2015. Rounding errors are two to three times those of the plain sum.
"""

from __future__ import annotations

import numpy as np

from espalier.compiler.emit import Emitter, fused_activation
from espalier.compiler.layout import Place
from espalier.compiler.window import window
from espalier.graph.ir import Node

_POINTS = (0.5, -0.5, 1.0, -1.0, 2.0, -2.0)  # and infinity, as in the kernel
_TAPS, _TILE = 4, 4  # of the even and the odd columns; pixels
_HEIGHT = 8  # filters of a block, as in native/src/program.h


def stem(e: Emitter, node: Node, w: np.ndarray, out: Place, bias: np.ndarray | None) -> None:
    """Write the step. w: [o, i, y, x]. out: where the result goes."""
    source = e.places[str(node.inputs[0])]
    if source.strides[-1] != 1:
        source = e.contiguous(source, f"{node.name}/rows")
    _, padding, _ = window(node)
    values = weights(w)
    e.step(
        name=node.name,
        op="stem",
        out=out.operand(),
        a=source.operand(),
        activation=fused_activation(node),
        front=out.front(),
        params=(w.shape[2], *padding),
        arrays={"values": values} if bias is None else {"values": values, "bias": bias},
        format="dense/stem",
        reason="a wide window at stride 2 over few channels: 4 pixels of a row in 14 products with each of its rows",
        nonzeros=int(np.count_nonzero(w)),
        weights=w.size,
        nodes=tuple(node.attrs.get("fused", (node.name,))),
    )


def weights(w: np.ndarray) -> np.ndarray:
    """G w for the even and the odd columns of w [o, i, y, x], in the kernel's order, [*]: blocks of filters, points,
    channels, even columns and odd, rows, filters of a block."""
    filters, channels, high, wide = w.shape
    padded = np.zeros((-(-filters // _HEIGHT) * _HEIGHT, channels, high, 2 * _TAPS))
    padded[:filters, ..., :wide] = w
    taps = padded.reshape(-1, _HEIGHT, channels, high, _TAPS, 2)
    return np.einsum("pk,bmcykx->bpcxym", _transform(), taps).astype(np.float32).reshape(-1)


def _transform() -> np.ndarray:
    """G, [points, taps]."""
    rows = []
    for point in _POINTS:
        others = np.prod([point - other for other in _POINTS if other != point])
        rows.append([point**k / others for k in range(_TAPS)])
    return np.array([*rows, [0.0] * (_TAPS - 1) + [1.0]])
