"""Where the time of a network goes: every step with its time, its useful speed, and why it is stored as it is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from espalier.compiler.program import Step
from espalier.runtime.engine import peak_gflops
from espalier.runtime.executable import Executable


@dataclass(frozen=True)
class LayerTime:
    """A step of a network.

    time_ms: median of the rounds, for the whole batch. share: of the time of all steps. useful_gflops: billions of
    operations a second on weights that are not zero (a multiply-add is two); 0 for steps without weights. peak_share:
    that over what the machine can do. format, reason: how the weights are stored, and why.
    """

    step: str
    kernel: str
    time_ms: float
    share: float
    useful_gflops: float
    peak_share: float
    density: float
    format: str
    reason: str


def layers(program: Executable, *inputs: Any, rounds: int = 15) -> list[LayerTime]:
    """Every step of a compiled network in the order in which it runs, timed on `inputs`.

    Measuring a step costs some tenths of a microsecond, so that the sum is a little more than the network's time.

    >>> max(layers(compile(model, x), x), key=lambda row: row.time_ms).step
    'layer4.0.conv2'
    """
    program(*inputs)
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, spent in program.profile(*inputs).items():
            taken[name].append(spent)
    times = {name: float(np.median(spent)) for name, spent in taken.items()}
    whole = sum(times.values()) or 1.0
    peak = peak_gflops(program.threads) or float("inf")
    batch = int(inputs[0].shape[0]) if inputs and inputs[0].shape else 1
    work: dict[str, float] = defaultdict(float)
    for step in program.steps():
        work[step.layer] += useful_flops(step) * batch
    rows = []
    for row in program.describe():
        if row.step not in times:
            continue
        spent = times.pop(row.step)  # steps of one name are timed together
        speed = work[row.step] / (spent * 1e6) if spent else 0.0
        density = row.nonzeros / row.weights if row.weights else 1.0
        share, of_peak = spent / whole, speed / peak
        rows.append(LayerTime(row.step, row.kernel, spent, share, speed, of_peak, density, row.format, row.reason))
    return rows


def useful_flops(step: Step) -> float:
    """Floating-point operations of one sample that no zero weight takes part in; 0 for steps that only move or pool.

    A multiply-add is two.
    """
    sizes = step.out.sizes
    if step.op == "matmul":
        return 2.0 * sizes[0] * sizes[1] * sizes[2] * sizes[3] * step.a.sizes[3]
    positions = sizes[2] if step.op == "linear" else sizes[2] * sizes[3]
    return 2.0 * step.nonzeros * positions
