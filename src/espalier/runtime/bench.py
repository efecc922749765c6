"""Timing: several engines in turns, in one run, so that they meet the same machine."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch

from espalier.runtime.engine import isa

PACKAGES = ("torch", "numpy", "onnxruntime", "openvino")  # whose versions stand beside a measurement


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and quartiles over the rounds.

    cores: how many processor cores were busy meanwhile, on average: what a claim about threads can be checked with.
    each_ms: of every round, in their order; rounds of two candidates in one run belong together.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int
    cores: float = float("nan")
    each_ms: tuple[float, ...] = ()

    @property
    def spread_ms(self) -> float:
        """The distance between the quartiles."""
        return self.high_ms - self.low_ms

    def times_faster(self, other: Timing) -> float:
        """How many times the speed of `other` this is, in the same run: the median over the rounds.

        A round's two times are taken within a second, so that a machine which slows down for a while slows both.

        >>> Timing(2, 2, 2, 3, each_ms=(1.0, 2.0, 2.0)).times_faster(Timing(4, 4, 4, 3, each_ms=(3.0, 4.0, 9.0)))
        3.0
        """
        return float(np.median(np.divide(other.each_ms, self.each_ms)))


def bench(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 30, seconds: float = 0.01, warm_up: int = 3
) -> dict[str, Timing]:
    """Time every candidate, one after the other, `rounds` times over.

    In each round a candidate is called once without being timed, which brings its data into the caches and lets the
    threads of the one before it fall asleep, and then as often as fills `seconds` (at least once); the mean of those
    calls is one measurement. The order changes from round to round. Returns a Timing for each name, in the order given.
    Raises ValueError for less than one round.

    >>> bench({"sleep": lambda: time.sleep(0.001)}, rounds=3)["sleep"].median_ms > 1
    True
    """
    if rounds < 1 or seconds < 0 or warm_up < 0:
        raise ValueError(f"impossible: {rounds} rounds of {seconds} seconds after {warm_up} calls to warm up")
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    order, rng = list(candidates), random.Random(0)
    threads = torch.get_num_threads()
    try:
        calls = {name: _calls(call, seconds, warm_up) for name, call in candidates.items()}
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                taken[name].append(_measured(candidates[name], calls[name]))
    finally:
        torch.set_num_threads(threads)  # a candidate may have changed it
    return {name: _timing(measured) for name, measured in taken.items()}


def _calls(call: Callable[[], object], seconds: float, warm_up: int) -> int:
    """How many calls fill `seconds`."""
    for _ in range(warm_up):
        call()
    start = time.perf_counter()
    call()
    return max(1, int(seconds / max(1e-7, time.perf_counter() - start)))


def _measured(call: Callable[[], object], calls: int) -> tuple[float, float]:
    """Wall-clock and processor seconds of one call."""
    call()
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    wall, busy = time.perf_counter() - start, time.process_time() - busy
    return wall / calls, busy / calls


def _timing(measured: list[tuple[float, float]]) -> Timing:
    wall, busy = np.array(measured).T
    low, median, high = np.percentile(wall * 1e3, [25, 50, 75])
    cores, each = float(busy.sum() / max(1e-9, wall.sum())), tuple(round(ms, 5) for ms in (wall * 1e3).tolist())
    return Timing(float(median), float(low), float(high), len(measured), cores, each)


def machine() -> dict[str, str | int]:
    """Facts that a measurement needs beside it: processor, cores, instruction set, versions. No names of hosts.

    >>> machine()["isa"]
    'avx512'
    """
    return {
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "isa": isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str:
    """Of an installed package; "" where it is not installed. Torch says more itself: how it was built."""
    if package == "torch":
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """The processor's name with its family and model, since virtual machines often hide the name's number."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:
        return platform.processor() or platform.machine()
    name = found.get("model name", platform.machine())
    return f"{name} (family {found['cpu family']} model {found['model']})" if "cpu family" in found else name
