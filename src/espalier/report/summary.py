"""The end of a compression: latencies side by side, requested against achieved, the table that is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from espalier.graph import Graph
from espalier.report.screen import screen, tell
from espalier.runtime import bench, compile


def latencies(
    dense: tuple[nn.Module, Graph], small: tuple[nn.Module, Graph], example: Tensor, threads: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of dense and compressed network, in PyTorch and in the engine, measured in turns in one run.

    Each is given as a module and as what was captured of it.

    Returns ``{"dense": {"torch": .., "engine": ..}, "compressed": {...}}`` with medians and, as ``*_spread``, the
    distance between the quartiles.
    """
    candidates: dict[str, Callable[[], object]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, (module, graph) in (("dense", dense), ("compressed", small)):
            candidates[f"{name} torch"] = _eager(module.eval(), example)
            candidates[f"{name} engine"] = compile(graph, threads=threads).bind(example)
        timings = bench(candidates)
    finally:
        torch.set_num_threads(before)
    table: dict[str, dict[str, float]] = {"dense": {}, "compressed": {}}
    for name, timing in timings.items():
        network, engine = name.split()
        table[network][engine] = timing.median_ms
        table[network][f"{engine}_spread"] = timing.spread_ms
    return table


def _eager(module: nn.Module, example: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return module(example)

    return run


def achieved(report: dict[str, Any]) -> dict[str, Any]:
    """What came of the request: density and drop, each with whether it was met and, if not, why.

    A drop is judged as it was measured; its standard error (`report["drop"]`) says what that is worth.
    """
    dense, small, asked = report["dense"], report["compressed"], report["requested"]
    density = small["nonzero"] / max(1, dense["weights"])
    drop = dense["accuracy"] - small["accuracy"]
    notes = []
    if asked["density"] is not None and density > asked["density"] * 1.02:
        notes.append(f"density {density:.4f} instead of {asked['density']:.4f}: see plan.toml for the layers spared")
    if drop > asked["max_drop"]:
        notes.append(_why(report, drop))
    return {"density": density, "drop": drop, "met": not notes, "notes": notes}


def _why(report: dict[str, Any], drop: float) -> str:
    """Why more accuracy was lost than allowed: noise of the test set, or phases that could not keep to it."""
    allowed, phases = report["requested"]["max_drop"], report["phases"]
    test, held = report["drop"]["test"], report["drop"]["holdout"]
    told = (
        f"accuracy fell by {drop:.2f} +- {test['error']:.2f} points on {test['n']} test images, {allowed:.2f} were "
        f"allowed; {held['n']} held-out images said {held['points']:.2f} +- {held['error']:.2f}"
    )
    if held["points"] <= allowed:
        far = drop - allowed <= test["error"] + held["error"]
        cause = "within their noise" if far else "beyond their noise: the two sets differ"
        return f"{told}: {cause}. Hold out more images, or ask for a smaller drop"
    shaped = phases["dense"] - phases["recovered"]
    return (
        f"{told}, after {phases['extra_epochs']} extra epochs (training into the plan alone had lost {shaped:.2f}): "
        "train for more epochs, or ask for a higher density"
    )


@dataclass(frozen=True)
class Figure:
    """One line of the table: how to read it off a network's facts, and how to print it."""

    title: str
    value: Callable[[dict[str, Any], str], float]
    show: Callable[[float], str]
    rate: str = "x"


def _fact(key: str) -> Callable[[dict[str, Any], str], float]:
    return lambda report, network: report[network][key]


def _time(engine: str) -> Callable[[dict[str, Any], str], float]:
    return lambda report, network: report["latency_ms"][network][engine]


FIGURES: tuple[Figure, ...] = (
    Figure("accuracy (test), %", _fact("accuracy"), lambda v: f"{v:.2f}", "points"),
    Figure("conv and linear weights", _fact("weights"), lambda v: f"{int(v):,}"),
    Figure("non-zero weights", _fact("nonzero"), lambda v: f"{int(v):,}"),
    Figure("all parameters", _fact("parameters"), lambda v: f"{int(v):,}"),
    Figure("MACs with a non-zero weight", _fact("useful_macs"), lambda v: f"{int(v):,}"),
    Figure(".esp file, bytes", _fact("file_bytes"), lambda v: f"{int(v):,}"),
    Figure("latency in PyTorch, ms", _time("torch"), lambda v: f"{v:.3f}"),
    Figure("latency in our engine, ms", _time("engine"), lambda v: f"{v:.3f}"),
)


def print_summary(report: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """Print dense against compressed, requested against achieved, and where the files are."""
    console = console or screen()
    threads = report["machine"]["threads"]
    many = "1 thread" if threads == 1 else f"{threads} threads"
    caption = f"latencies: batch 1, {many}, medians of interleaved runs"
    table = Table(title="dense against compressed", caption=caption)
    for heading in ("", "dense", "compressed", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for figure in FIGURES:
        dense, small = figure.value(report, "dense"), figure.value(report, "compressed")
        change = f"{small - dense:+.2f} points" if figure.rate == "points" else f"{dense / max(small, 1e-9):.2f}x"
        table.add_row(figure.title, figure.show(dense), figure.show(small), change)
    console.print(table)
    asked, got = report["requested"], report["achieved"]
    if asked["density"] is not None:
        tell(console, f"density   requested {asked['density']:.4f}   achieved {got['density']:.4f}")
    tell(console, f"accuracy  allowed drop {asked['max_drop']:.2f} points   achieved {got['drop']:+.2f}")
    for where, words in (("test", "test"), ("holdout", "held-out")):
        found = report["drop"][where]
        tell(console, f"  lost on {found['n']} {words} images: {found['points']:.2f} +- {found['error']:.2f} points")
    for note in got["notes"]:
        console.print(Text.assemble(("missed: ", "yellow"), note))
    tell(console, f"written to {out}: model.esp, plan.toml, report.json")
