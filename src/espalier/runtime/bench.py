"""Timing: several engines in turns, in one run, so that they meet the same machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from espalier.runtime.engine import isa


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and quartiles over the rounds."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int

    @property
    def spread_ms(self) -> float:
        """The distance between the quartiles."""
        return self.high_ms - self.low_ms


def bench(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 30, seconds: float = 0.01, warm_up: int = 3
) -> dict[str, Timing]:
    """Time every candidate, one after the other, `rounds` times over.

    In each round a candidate is called as often as fills `seconds` (at least once); the mean of those calls is one
    measurement. Returns a Timing for each name.

    >>> bench({"sleep": lambda: time.sleep(0.001)}, rounds=3)["sleep"].median_ms > 1
    True
    """
    calls: dict[str, int] = {}
    for name, call in candidates.items():
        for _ in range(warm_up):
            call()
        start = time.perf_counter()
        call()
        calls[name] = max(1, int(seconds / max(1e-7, time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            taken[name].append((time.perf_counter() - start) / calls[name] * 1e3)
    return {name: _timing(times) for name, times in taken.items()}


def _timing(times: list[float]) -> Timing:
    low, median, high = np.percentile(times, [25, 50, 75])
    return Timing(float(median), float(low), float(high), len(times))


def machine() -> dict[str, str | int]:
    """Facts that a measurement needs beside it: processor, cores, instruction set, versions. No names of hosts."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "isa": isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:
        return platform.processor() or "unknown"
    model = f"family {found['cpu family']} model {found['model']}" if "cpu family" in found else ""
    return f"{found.get('model name', platform.machine())} ({model})" if model else platform.machine()
