"""Two builds of the engine in turns: what a change to the kernels is worth, whatever else the machine is doing.

    cmake -S OLD_CHECKOUT -B old && cmake --build old      # libespalier.so of another commit
    python benchmarks/turns.py OLD_CHECKOUT/src/espalier/_native/libespalier.so --networks resnet50,vgg16 --threads 1,4

Both run the same programs, those that the compiler writes now, so only the engine differs. Or the engine is the same,
and what is compared is what programs gain that are meant for as many threads as run them:

    python benchmarks/turns.py --compiled-for 1 --networks mobilenetv2 --threads 2,4 --results rows.json

One round is a few runs of
the one, then a few of the other; the ratio is the median over rounds of the ratio within a round, which neighbours on
a shared machine disturb little. Networks and masks are those of benchmarks/engines.py.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from engines import TARGETS, network, networks

import espalier as es
from espalier.runtime.engine import library_path

RESULTS = Path(__file__).parent / "results" / "turns.json"
SECONDS = 0.01  # of one engine's part of a round


def engine(library: Path) -> ModuleType:
    """The binding to one build: a copy of the module, since it keeps the library that it first loads."""
    os.environ["ESPALIER_LIBRARY"] = str(library)
    spec = importlib.util.find_spec("espalier.runtime.engine")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.isas()  # loads the library
    del os.environ["ESPALIER_LIBRARY"]
    return module


def bound(
    module: ModuleType, program: bytes, threads: int, example: np.ndarray
) -> tuple[Callable[[], None], np.ndarray]:
    """A call that runs `program` on one build, and its output."""
    call, outputs = module.Context(module.LoadedProgram(program), threads).bind([example], 1)
    call()
    return call, outputs[0]


def in_turns(calls: list[Callable[[], None]], seconds: float) -> np.ndarray:
    """Milliseconds of each call ``[rounds, calls]``."""
    start = time.perf_counter()
    calls[0]()
    runs = max(1, int(SECONDS / (time.perf_counter() - start)))
    rounds: list[list[float]] = []
    while time.perf_counter() - start < seconds or len(rounds) < 5:
        row = []
        for call in calls:
            call()  # the other's weights leave the cache
            began = time.perf_counter()
            for _ in range(runs):
                call()
            row.append((time.perf_counter() - began) / runs * 1e3)
        rounds.append(row)
    return np.array(rounds)


def measure(
    name: str, threads: list[int], builds: list[ModuleType], compiled_for: list[int], seconds: float
) -> list[dict[str, Any]]:
    """Rows of the results: every variant of a network at every number of threads.

    compiled_for: how many threads the programs before and after are meant for; 0: as many as run them.
    """
    rows = []
    for variant in TARGETS[name]:
        module, example = network(name, variant)
        x = example.numpy()
        for count in threads:
            programs = []
            for meant in compiled_for:
                ((_, loaded),) = es.compile(module, example, threads=meant or count).loaded()
                programs.append(loaded.to_bytes())
            pairs = [bound(build, program, count, x) for build, program in zip(builds, programs)]
            before, after = (output for _, output in pairs)
            assert np.abs(before - after).max() <= 1e-4 * np.abs(before).max(), f"{name}, {variant.name}: they disagree"
            ms = in_turns([call for call, _ in pairs], seconds)
            low, ratio, high = np.quantile(ms[:, 1] / ms[:, 0], [0.25, 0.5, 0.75])
            medians = np.median(ms, axis=0)
            rows.append(
                {"network": name, "variant": variant.name, "threads": count, "rounds": len(ms)}
                | {"before_ms": medians[0], "after_ms": medians[1], "ratio": ratio, "low": low, "high": high}
            )
            print(
                f"{name:15s} {variant.name:18s} {count} threads  {medians[0]:8.3f} -> {medians[1]:8.3f} ms"
                f"  {ratio:.3f}x the time ({low:.3f} .. {high:.3f})",
                flush=True,
            )
        gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="libespalier.so of another commit; default: the same")
    parser.add_argument(
        "--compiled-for", type=int, help="threads that programs before are meant for; default: both for 1"
    )
    parser.add_argument("--after", type=Path, default=library_path(), help="default: the one that the package uses")
    parser.add_argument("--networks", type=networks, default=list(TARGETS))
    parser.add_argument("--threads", default="1,4")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row")
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args()
    if a.before is None and a.compiled_for is None:
        parser.error("nothing to compare: give another build of the engine, or --compiled-for 1")
    builds = [engine((a.before or a.after).resolve()), engine(a.after.resolve())]
    compiled_for = [1, 1] if a.compiled_for is None else [a.compiled_for, 0]
    threads = [int(count) for count in a.threads.split(",")]
    rows: list[dict[str, Any]] = []
    for name in a.networks:
        rows += measure(name, threads, builds, compiled_for, a.seconds)
        a.results.write_text(json.dumps({"machine": es.machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
