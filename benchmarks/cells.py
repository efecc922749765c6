"""Cells of a grid of experiments: done side by side in processes, each kept as it ends; stopped, the grid goes on.

A cell is a frozen dataclass of plain values; its key is those values joined by slashes. What a cell came to stands in
the results file under its key, beside the machine it ran on; a cell that is there is not done again. Cells of other
settings (epochs, recipe, versions) never stand in one file with these: such a file is set aside and begun anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import espalier as es

Work = Callable[[Any, argparse.Namespace], dict[str, Any]]


def key_of(cell: Any) -> str:
    return "/".join(str(value) for value in astuple(cell))


def numbers(text: str) -> list[float]:
    """What an option such as '2,3.5' says."""
    return [float(part) for part in text.split(",")]


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every grid has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the data set as its site distributes it")
    parser.add_argument("--out", default="out/grid", help="where dense networks and checkpoints are kept")
    parser.add_argument("--only", default="*", help="cells whose key matches, such as 'admm/*' or '*/weight/*'")
    parser.add_argument("--workers", type=int, default=1, help="cells at once, each in a process with one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many")
    return parser


def run_cells(
    cells: Sequence[Any],
    work: Work,
    arguments: argparse.Namespace,
    results: Path,
    settings: dict[str, Any],
    **measured: Any,
) -> None:
    """Do the cells that are wanted and not done yet; write each into `results` as it ends.

    settings: the same for all cells of the file, at whose top they stand; beside them what else was `measured`, and the
    `grid`: the keys of all cells. A cell that fails is told and left out; the others go on. Exits with status 1 if any
    failed.
    """
    made = _done(results, settings)

    def write() -> None:
        facts = {**settings, **measured, "machine": es.machine(), "grid": [key_of(cell) for cell in cells]}
        _write(results, {**facts, "cells": dict(sorted(made.items()))})

    write()
    wanted = [cell for cell in cells if fnmatch(key_of(cell), arguments.only) and key_of(cell) not in made]
    print(f"{len(cells)} cells, {len(made)} done before, {len(wanted)} to do")
    until, failed = time.monotonic() + 60 * arguments.minutes, 0
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(arguments.workers, context, _one_thread) as pool:
        waiting = {pool.submit(_timed, work, cell, arguments, until): cell for cell in wanted}
        for number, future in enumerate(as_completed(waiting), 1):
            key = key_of(waiting[future])
            try:
                result = future.result()
            except Exception as error:
                failed += 1
                print(f"[{number}/{len(wanted)}] {key} failed: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            if result is not None:
                made[key] = result
                write()
                told = "  ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float | int))
                print(f"[{number}/{len(wanted)}] {key}  {told}", flush=True)
    if failed:
        sys.exit(1)


def _done(results: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The cells of the file, if they were made with these settings; else it is renamed, and there are none."""
    if not results.exists():
        return {}
    before = json.loads(results.read_text(encoding="utf-8"))
    changed = [k for k, v in json.loads(json.dumps(settings)).items() if before.get(k) != v]
    if not changed:
        return before["cells"]
    aside = next(p for k in itertools.count(1) if not (p := results.with_suffix(f".before{k}.json")).exists())
    results.rename(aside)
    told = ", ".join(f"{k} was {before.get(k)!r}, is {settings[k]!r}" for k in changed)
    print(f"{results.name} holds cells of other settings ({told}): set aside as {aside.name}")
    return {}


def _timed(work: Work, cell: Any, arguments: argparse.Namespace, until: float) -> dict[str, Any] | None:
    start = time.monotonic()
    if start > until:
        return None
    return {**work(cell, arguments), "seconds": round(time.monotonic() - start, 1)}


def _one_thread() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A grid that is killed leaves nothing running."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
