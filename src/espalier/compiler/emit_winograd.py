"""Steps for a dense 3 x 3 window at stride 1 by Winograd's F(4 x 4, 3 x 3): 36 products for 16 pixels instead of 144.

    y = A' [(G w G') * (B' x B)] A        per tile of 4 x 4 pixels, from 6 x 6 inputs

``winograd_in`` makes B' x B, a conv over tiles multiplies by G w G', ``winograd_out`` makes the pixels. Bands of tile
rows go through all three, one after another, so that what lies between them stays in the cache. Lavin and Gray, Fast
Algorithms for Convolutional Neural Networks, 2015. Rounding errors are about ten times those of the plain sum.
"""

from __future__ import annotations

import numpy as np

from espalier.compiler.blocks import Choice, choose_dense_groups
from espalier.compiler.emit import Emitter, fused_activation
from espalier.compiler.layout import Place, Storage, planes_of
from espalier.compiler.program import Operand, Step
from espalier.graph.ir import Node

_G = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_POINTS = 36
_BAND_FLOATS = 512 * 1024  # between the steps of a band: so many stay in the second cache
# Multiply-adds of 32 rows and columns take one cycle. A transform of 16 tiles takes about so many; a weight that comes
# from memory and not from the second cache takes as long as so many multiply-adds.
_TRANSFORM_CYCLES, _STREAMED_WEIGHT, _CACHED_WEIGHTS = 150.0, 24.0, 1 << 18
_ROW_BLOCK_CYCLES = 0.9  # that so many multiply-adds in row-blocks take beside these


def tiles(size: int) -> int:
    """How many tiles of 4 pixels cover `size` pixels."""
    return -(-size // 4)


def pays(node: Node, w: np.ndarray, height: int, width: int, work: float) -> bool:
    """Whether a conv with weight `w` [o, i, 3, 3] that makes planes of `height` x `width` is faster this way.

    work: what its row-blocks take, as a share of the time of dense ones.
    """
    attrs = node.attrs
    plain = attrs["conv_groups"] == 1 and all(
        list(attrs[name]) == [value] * 2 for name, value in (("stride", 1), ("dilation", 1), ("padding", 1))
    )
    if not plain or w.shape[2:] != (3, 3) or min(w.shape[:2]) < 16:
        return False
    rows, columns = w.shape[:2]
    down, across = tiles(height), tiles(width)
    direct = height * width * 9 * rows * columns / 32
    weights = _POINTS * rows * columns
    products = weights / 32 * max(down * across, _STREAMED_WEIGHT if weights > _CACHED_WEIGHTS else 0)
    transforms = (rows + columns) * down * -(-across // 16) * _TRANSFORM_CYCLES
    return products + transforms < _ROW_BLOCK_CYCLES * work * direct


def winograd(e: Emitter, node: Node, w: np.ndarray, out: Place, bias: np.ndarray | None, residual: Operand) -> None:
    """Write the steps. out: where the result goes. residual: added before the activation."""
    rows, columns = w.shape[:2]
    source = e.planes(str(node.inputs[0]), 1, 1)
    _, height, width = planes_of(e.layout.shapes[node.outputs[0]])
    down, across = tiles(height), tiles(width)
    tall = _band(rows, columns, down, across)
    plane = (-(-tall * across // 16) | 1) * 16
    # one plane more for each point than there are: points then begin in different sets of the cache
    before = e.use(_room(f"{node.name}/tiles", _POINTS * (columns + 1) * plane))
    behind = e.use(_room(f"{node.name}/products", _POINTS * (rows + 1) * plane))
    taps = w.reshape(-1, 9).astype(np.float64)
    points = (np.kron(_G, _G) @ taps.T).reshape(_POINTS, rows, columns)  # G w G' of every filter and channel
    choice = choose_dense_groups(list(points.astype(np.float32)), tall, across)
    arrays = {
        "rows": _apart(choice.blocks.row_order, rows),
        "starts": choice.blocks.offsets,
        "index": _apart(choice.blocks.columns, columns) * plane,
        "values": choice.blocks.values,
    }
    facts = dict(format=choice.format, reason=choice.reason, nonzeros=int(np.count_nonzero(w)), weights=w.size)
    nodes = tuple(node.attrs.get("fused", (node.name,)))
    for first in range(0, down, tall):
        high = min(tall, down - first)
        x = Operand(
            "arena", 0, 0, (_POINTS, columns, high, across), ((columns + 1) * plane, plane, across, 1), before.name
        )
        y = Operand("arena", 0, 0, (_POINTS, rows, high, across), ((rows + 1) * plane, plane, across, 1), behind.name)
        e.step(name=f"{node.name}/tiles", op="winograd_in", out=x, a=source.operand(), params=(first,), nodes=nodes)
        e.steps.append(_products(node.name, choice, x, y, arrays, nodes, facts if first == 0 else {}))
        e.step(
            name=f"{node.name}/pixels",
            op="winograd_out",
            out=out.operand(),
            a=y,
            b=residual,
            activation=fused_activation(node),
            front=out.front(),
            params=(first,),
            arrays={} if bias is None else {"bias": bias},
            nodes=nodes,
        )


def _apart(numbers: np.ndarray, per_point: int) -> np.ndarray:
    """Numbers of planes, `per_point` for each point, where each point has one more; -1 stays."""
    return np.where(numbers < 0, numbers, numbers + numbers // per_point).astype(np.int32)


def _band(rows: int, columns: int, down: int, across: int) -> int:
    """Rows of tiles at once: those for which the fewest floats come from beyond the second cache.

    These are the weights, once for each band, unless they stay there; and what lies between the steps, written and
    read, unless a band of it does.
    """
    weights, between = _POINTS * rows * columns, _POINTS * (rows + columns) * across

    def streamed(tall: int) -> int:
        bands = -(-down // tall)
        again = bands * weights if weights > _CACHED_WEIGHTS else 0
        return again + (2 * between * down if between * tall > _BAND_FLOATS else 0)

    best = min(range(down, 0, -1), key=streamed)
    return -(-down // -(-down // best))


def _room(name: str, floats: int) -> Storage:
    return Storage(name, 1, 1, floats, floats, floats)


def _products(
    name: str,
    choice: Choice,
    x: Operand,
    y: Operand,
    arrays: dict[str, np.ndarray],
    nodes: tuple[str, ...],
    facts: dict,
) -> Step:
    """The conv of a window of one tile, all points and rows at once."""
    (_, columns, high, across), plane, rows = x.sizes, x.strides[1], y.sizes[1]
    run = high * across
    return Step(
        name=name,
        op="conv",
        out=Operand("arena", 0, 0, (1, _POINTS * (rows + 1), high, across), (0, plane, across, 1), y.storage),
        a=Operand("arena", 0, 0, (1, _POINTS * (columns + 1), high, across), (0, plane, across, 1), x.storage),
        params=(choice.blocks.height, 1, run, 0, 0, 0, max(192, run)),
        arrays=arrays,
        nodes=nodes,
        **facts,
    )
