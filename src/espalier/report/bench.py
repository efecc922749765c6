"""What `espalier bench` measures, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from espalier.errors import DataError
from espalier.report.picture import Bar, svg, write_picture
from espalier.report.screen import WIDE, tell
from espalier.runtime import LayerTime, Timing

SMALL = 0.005  # steps below this share of the time stand in one row


@dataclass(frozen=True)
class BenchReport:
    """One benchmark: engines beside one another, and where our own time goes.

    facts: the machine, versions, threads, batch. fallbacks: what PyTorch runs in our engine's place, and why.
    """

    title: str
    timings: Mapping[str, Timing]
    layers: Sequence[LayerTime]
    peak_gflops: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    fallbacks: Sequence[str] = ()

    def show(self, console: Console) -> None:
        """Print both tables."""
        ours = self.timings["espalier"].median_ms
        table = Table(title=self.title)
        for heading in ("engine", "median ms", "quartiles", "espalier is faster by"):
            table.add_column(heading, justify="left" if heading == "engine" else "right")
        for name, timing in self.timings.items():
            quartiles = f"{timing.low_ms:.3f} .. {timing.high_ms:.3f}"
            table.add_row(name, f"{timing.median_ms:.3f}", quartiles, f"{timing.median_ms / ours:.2f}x")
        console.print(table)
        console.print(self._layers(reasons=console.width >= WIDE))
        for name in self.fallbacks:
            tell(console, f"runs through PyTorch: {name}")

    def _layers(self, reasons: bool) -> Table:
        """reasons: with kernels, and why weights are stored as they are; a narrow terminal has no room for them."""
        stored = "stored as, and why" if reasons else "stored as"
        table = Table(title=f"where the time goes (peak: {self.peak_gflops:.0f} GFLOP/s)")
        words, numbers = ["step", "kernel"][: 1 + reasons], ["ms", "share", "density", "GFLOP/s", "of peak"]
        for heading in (*words, *numbers, stored):
            table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=heading != stored)
        for row in self.layers:
            if row.share < SMALL:
                continue
            why = f"{row.format}: {row.reason}" if row.reason and reasons else row.format
            names = [row.step, row.kernel][: 1 + reasons]
            speed = [f"{row.density:.3f}", f"{row.useful_gflops:.1f}", f"{row.peak_share:.0%}"]
            speed = speed if row.useful_gflops else ["", "", ""]
            table.add_row(*names, f"{row.time_ms:.4f}", f"{row.share:.1%}", *speed, why)
        small = [row for row in self.layers if row.share < SMALL]
        if small:
            time, share = sum(row.time_ms for row in small), sum(row.share for row in small)
            names = [f"{len(small)} smaller steps", ""][: 1 + reasons]
            table.add_row(*names, f"{time:.4f}", f"{share:.1%}", "", "", "", "")
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "timings": {name: asdict(timing) for name, timing in self.timings.items()},
            "peak_gflops": self.peak_gflops,
            "layers": [asdict(row) for row in self.layers],
            "fallbacks": list(self.fallbacks),
        }

    def write_json(self, path: str | Path) -> None:
        """Raises DataError where the file cannot be written."""
        try:
            Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from error

    def write_picture(self, path: str | Path) -> None:
        """A .svg or .html file: engines as bars, then the layers, warmer the nearer they are to the machine's peak."""
        engines = [
            Bar(n, t.median_ms, f"{t.median_ms:.3f} ms", float(n == "espalier")) for n, t in self.timings.items()
        ]
        bars = [Bar(row.step, row.time_ms, _note(row), row.peak_share) for row in self.layers if row.share >= SMALL]
        write_picture(path, svg([(self.title, engines), ("milliseconds of every step", bars)]))


def _note(row: LayerTime) -> str:
    speed = f", {row.useful_gflops:.0f} GFLOP/s ({row.peak_share:.0%})" if row.useful_gflops else ""
    return f"{row.time_ms:.3f} ms{speed}{', ' + row.format if row.format else ''}"
