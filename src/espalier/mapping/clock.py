"""Clock: how long networks take on the engine, step by step, in turns so that all of them meet the same machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from espalier.graph.ir import Graph
from espalier.runtime import compile
from espalier.runtime.executable import Executable

# Turns of one program: as many as fill the time. A few programs share what many would take: then it is a plan that is
# checked, and one number decides.
LEAST, SECONDS = 5, 0.1
SHARED_LEAST, SHARED_SECONDS = 24, 1.5
# How a small program's weights and activations happen to lie in memory makes it some 3 % faster or slower, for as long
# as it lives (seen on ResNet-20). Where few are timed, each is compiled several times and counts by its median.
FEW, COPIES, SMALL = 2, 5, 4_000_000
TURN = 0.01  # as in `bench`: a large network's weights take some runs to settle in the caches
COMPILERS = 4
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

    A turn runs a program once, to bring its weights and activations to where they are in steady use, and then often
    enough to fill `TURN` seconds: with whole calls timed together, and as often with every step timed. With one thread
    whole calls count in processor time, which on a quiet machine is the wall clock's, and on a busy one leaves out the
    turns that other programs had meanwhile. One or two small networks are compiled several times (see COPIES).
    """
    copies = COPIES if len(graphs) <= FEW and all(_numbers(graph) <= SMALL for graph in graphs) else 1
    found = _profiles([graph for graph in graphs for _ in range(copies)], threads)
    return [_middle(found[k : k + copies]) for k in range(0, len(found), copies)]


def _numbers(graph: Graph) -> int:
    return sum(tensor.numel() for tensor in graph.tensors.values())


def _middle(found: Sequence[Profile]) -> Profile:
    """The median of several compilations of one network."""
    steps = {name: float(np.median([each.steps[name] for each in found])) for name in found[0].steps}
    return Profile(steps, float(np.median([each.whole_ms for each in found])))


def _profiles(graphs: Sequence[Graph], threads: int) -> list[Profile]:
    """One for each program."""
    now = time.thread_time if threads == 1 else time.perf_counter
    with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:  # much of it is numpy's, which can share
        programs = list(pool.map(lambda graph: compile(graph, threads=threads), graphs))
    given = [_inputs(graph) for graph in graphs]
    plans = [_turns(program, x, len(programs)) for program, x in zip(programs, given)]
    seen: list[list[dict[str, float]]] = [[] for _ in graphs]
    whole: list[list[float]] = [[] for _ in graphs]
    for turn in range(max((turns for turns, _ in plans), default=0)):
        for k, (program, (turns, runs)) in enumerate(zip(programs, plans)):
            if turn < turns:
                program(*given[k])
                start = now()
                for _ in range(runs):
                    program(*given[k])
                whole[k].append((now() - start) / runs * 1e3)
                seen[k] += [program.profile(*given[k]) for _ in range(runs)]
    return [
        Profile({name: _quantile([row[name] for row in rows]) for name in rows[0]}, _quantile(calls))
        for rows, calls in zip(seen, whole)
    ]


def _turns(program: Executable, given: list[np.ndarray], among: int) -> tuple[int, int]:
    """How many turns of one program among so many, and how many runs in each."""
    program(*given)
    start = time.perf_counter()
    program(*given)
    once = max(1e-6, time.perf_counter() - start)
    runs = max(1, int(TURN / once))
    fill = max(SECONDS, SHARED_SECONDS / among) / ((2 * runs + 1) * once)
    return max(LEAST, SHARED_LEAST // among, int(fill)), runs


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
