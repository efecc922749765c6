"""OPS: one row per op that Espalier understands, with its channel signature and its reference (the oracle).

The rows stand in `ops_compute` (convs, norms, mixtures), `ops_pointwise` (activations, arithmetic), `ops_pool`,
`ops_move` (data movement) and `ops_tokens` (attention, transposed convs). To add an op, add a row there: capture,
shapes, couplings and the oracle follow.
"""

from __future__ import annotations

from espalier.graph.op import Op, Parse
from espalier.graph.ops_compute import COMPUTE
from espalier.graph.ops_move import MOVES
from espalier.graph.ops_pointwise import POINTWISE
from espalier.graph.ops_pool import POOLS
from espalier.graph.ops_tokens import TOKENS

OPS: dict[str, Op] = {}
TARGETS: dict[str, tuple[Op, Parse]] = {}


def add_op(op: Op) -> None:
    """Put a row into OPS. Raises ValueError for a name or an ATen overload that a row has already."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} stands twice in OPS")
    for target in op.parse:
        if target in TARGETS:
            raise ValueError(f"{target} belongs to {TARGETS[target][0].name} and {op.name}")
    OPS[op.name] = op
    TARGETS.update({target: (op, parse) for target, parse in op.parse.items()})


for _row in (*COMPUTE, *POINTWISE, *POOLS, *MOVES, *TOKENS):
    add_op(_row)
