"""Cells of a grid of experiments: done side by side in processes, each kept as it ends; stopped, the grid goes on.

A cell is a frozen dataclass of plain values; its key is those values joined by slashes. What a cell came to stands in
the results file under its key, beside the machine it ran on; a cell that is there is not done again.
"""

from __future__ import annotations

import argparse
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


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every grid has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the data set as its site distributes it")
    parser.add_argument("--out", default="out/grid", help="where dense networks and checkpoints are kept")
    parser.add_argument("--only", default="*", help="cells whose key matches, such as 'admm/*' or '*/weight/*'")
    parser.add_argument("--workers", type=int, default=1, help="cells at once, each in a process with one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many")
    return parser


def run_cells(cells: Sequence[Any], work: Work, arguments: argparse.Namespace, results: Path, **facts: Any) -> None:
    """Do the cells that are wanted and not done yet; write each into `results` as it ends.

    facts: stand at the top of the file. A cell that fails is told and left out; the others go on. Exits with status 1
    if any failed.
    """
    made: dict[str, Any] = json.loads(results.read_text())["cells"] if results.exists() else {}
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
                _write(results, {**facts, "machine": es.machine(), "cells": dict(sorted(made.items()))})
                told = "  ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float | int))
                print(f"[{number}/{len(wanted)}] {key}  {told}", flush=True)
    if failed:
        sys.exit(1)


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
