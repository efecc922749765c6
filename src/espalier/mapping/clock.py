"""Clock: how long networks take on the engine, step by step, in turns so that all of them meet the same machine."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from espalier.compiler.blocks import choosing
from espalier.graph.ir import Graph
from espalier.mapping.stripes import packed_once
from espalier.runtime import compile, dump, restore
from espalier.runtime.bound import Bound
from espalier.runtime.executable import Executable

# Turns of one program: as many as fill the time. A few programs share what many would take: then it is a plan that is
# checked, and one number decides.
LEAST, SECONDS = 5, 0.1
SHARED_LEAST, SHARED_SECONDS = 24, 1.5
LONGEST = 1.0  # seconds of the turns of one program, where those of half of LEAST take no longer
SLOW = 0.03  # seconds of one run: what disturbs is small beside it, so half as many turns tell as much
# How a small program's weights and activations happen to lie in memory makes it some 3 % faster or slower, for as long
# as it lives (seen on ResNet-20). Where few are timed, each is loaded several times and counts by its median.
FEW, COPIES, SMALL = 2, 5, 4_000_000
TURN = 0.01  # as in `bench`: a large network's weights take some runs to settle in the caches
COMPILERS, LARGE = 4, 50_000_000  # compiled at once, but for networks of so many numbers
QUANTILE = 0.25  # the median of the faster half: what other programs add to the slower half is not the network's


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one run: of every native step by its name, and of the whole call; lower quartiles of turns."""

    steps: dict[str, float]
    whole_ms: float


Clock = Callable[[Sequence[Graph], int], list[Profile]]
"""(graphs, threads) -> a profile of each. The real one is `engine_clock`; tests have one that counts."""


def engine_clock(graphs: Sequence[Graph], threads: int) -> list[Profile]:
    """Compile the graphs, and time them on one random sample in turns.

    A turn runs a program once, to bring its weights and activations to where they are in steady use (not where all
    take longer than `SLOW`: such weights have no such place), and then often enough to fill `TURN` seconds: with whole
    calls timed together, and in the first turns as often with every step timed. With one thread whole calls count in
    processor time, which on a quiet machine is the wall clock's, and on a busy one leaves out the turns that other
    programs had meanwhile. One or two small networks are loaded several times (see COPIES). A graph that is given
    again, the very same object, is not compiled again.
    """
    copies = COPIES if len(graphs) <= FEW and all(_numbers(graph) <= SMALL for graph in graphs) else 1
    # much of compiling is numpy's, which can share; what large networks take is mostly memory
    at_once = 1 if max(map(_numbers, graphs), default=0) > LARGE else min(COMPILERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(at_once) as pool:
        programs = list(pool.map(lambda graph: _programs(graph, threads, copies), graphs))
    given = [x for graph in graphs for x in [_inputs(graph)] * copies]
    profiled = LEAST if len(graphs) > FEW else 1  # turns: of a plan that is checked whole calls count
    found = _profiles([program for each in programs for program in each], given, threads, profiled)
    return [_middle(found[k : k + copies]) for k in range(0, len(found), copies)]


_KEPT: dict[tuple[int, int, int], list[Executable]] = {}  # by graph, for as long as it lives


def _programs(graph: Graph, threads: int, copies: int) -> list[Executable]:
    """A graph compiled, and loaded so many times. Large layers of a `Probe` are packed once for all their stripes."""
    key = id(graph), threads, copies
    if key not in _KEPT:
        with choosing(packed_once):
            first = compile(replace(graph), threads=threads)  # that does not keep `graph` alive
        pieces = dump(first) if copies > 1 else []
        _KEPT[key] = [first, *(restore(first.graph, pieces, threads) for _ in range(copies - 1))]
        weakref.finalize(graph, _KEPT.pop, key, None)
    return _KEPT[key]


def _numbers(graph: Graph) -> int:
    return sum(tensor.numel() for tensor in graph.tensors.values())


def _middle(found: Sequence[Profile]) -> Profile:
    """The median of several copies of one network."""
    steps = {name: float(np.median([each.steps[name] for each in found])) for name in found[0].steps}
    return Profile(steps, float(np.median([each.whole_ms for each in found])))


def _profiles(
    programs: Sequence[Executable], given: Sequence[list[np.ndarray]], threads: int, profiled: int
) -> list[Profile]:
    """One for each program; its steps are timed in so many turns."""
    now = time.thread_time if threads == 1 else time.perf_counter
    calls = [program.bind(*x) for program, x in zip(programs, given)]
    plans = [_turns(call, len(calls)) for call in calls]
    # what takes long enough finds nothing of its own in the caches the second time: but all are treated alike
    warm = min((once for _, _, once in plans), default=0.0) <= SLOW
    seen: list[list[dict[str, float]]] = [[] for _ in programs]
    whole: list[list[float]] = [[] for _ in programs]
    for turn in range(max((turns for turns, _, _ in plans), default=0)):
        for k, (call, (turns, runs, _)) in enumerate(zip(calls, plans)):
            if turn < turns:
                if warm:
                    call()
                start = now()
                for _ in range(runs):
                    call()
                whole[k].append((now() - start) / runs * 1e3)
                if turn < profiled:
                    seen[k] += [call.profile() for _ in range(runs)]
    return [
        Profile({name: _quantile([row[name] for row in rows]) for name in rows[0]}, _quantile(calls))
        for rows, calls in zip(seen, whole)
    ]


def _turns(call: Bound, among: int) -> tuple[int, int, float]:
    """How many turns of one program among so many, how many runs in each, and the seconds of one run."""
    call()
    start = time.perf_counter()
    call()
    once = max(1e-6, time.perf_counter() - start)
    runs = max(1, int(TURN / once))
    fill = max(SECONDS, SHARED_SECONDS / among) / ((2 * runs + 1) * once)
    least = max(LEAST, SHARED_LEAST // among)
    turns = max(-(-least // 2) if once > SLOW else least, int(fill))
    return min(turns, max(-(-LEAST // 2), int(LONGEST / ((2 * runs + 1) * once)))), runs, once


def _quantile(values: list[float]) -> float:
    return float(np.quantile(values, QUANTILE))


def _inputs(graph: Graph) -> list[np.ndarray]:
    """Random inputs of one sample, or of as many as the network was written for."""
    generator, made = torch.Generator().manual_seed(0), []
    for name in graph.inputs:
        value = graph.values[name]
        shape = (
            (1, *value.shape[1:]) if value.batched else value.shape
        )  # a graph of any batch holds that of its capture
        floating = value.dtype.is_floating_point
        x = torch.randn(shape, generator=generator) if floating else torch.zeros(shape)
        made.append(x.to(value.dtype).numpy())
    return made
