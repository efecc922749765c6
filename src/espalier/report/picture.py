"""Pictures of benchmarks as SVG, alone or in a page of their own: horizontal bars, and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import log
from pathlib import Path

from espalier.errors import DataError

_ROW, _LEFT, _WIDTH, _RIGHT = 18, 260, 560, 260
_COLD, _WARM = (122, 144, 176), (214, 96, 60)


@dataclass(frozen=True)
class Bar:
    """label: what is measured. value: its length. note: what stands behind it. heat: 0..1, its colour."""

    label: str
    value: float
    note: str = ""
    heat: float = 0.0


def svg(panels: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Panels of bars under one another, each with a title; the longest bar of a panel fills its width.

    >>> svg([("latency, ms", [Bar("espalier", 1.2, "1.2 ms")])]).startswith("<svg")
    True
    """
    parts: list[str] = []
    y = 10
    for title, bars in panels:
        parts.append(f'<text x="10" y="{y + 14}" font-weight="bold">{escape(title)}</text>')
        y += 28
        longest = max((bar.value for bar in bars), default=0) or 1
        for bar in bars:
            length = max(1.0, bar.value / longest * _WIDTH)
            heat = min(1.0, max(0.0, bar.heat))
            colour = ",".join(str(round(a + (b - a) * heat)) for a, b in zip(_COLD, _WARM))
            middle = y + _ROW - 5
            parts += [
                f'<text x="{_LEFT - 6}" y="{middle}" text-anchor="end">{escape(bar.label[-40:])}</text>',
                f'<rect x="{_LEFT}" y="{y + 2}" width="{length:.1f}" height="{_ROW - 4}" fill="rgb({colour})"/>',
                f'<text x="{_LEFT + length + 6:.1f}" y="{middle}">{escape(bar.note)}</text>',
            ]
            y += _ROW
        y += 14
    width = _LEFT + _WIDTH + _RIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
    return head + 'font-family="sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>\n"


@dataclass(frozen=True)
class Curve:
    """label: what varies. points: (x, y), both above zero."""

    label: str
    points: Sequence[tuple[float, float]]


def curves(panels: Sequence[tuple[str, Sequence[Curve]]], across: str, up: str) -> str:
    """Panels of curves beside one another, both axes logarithmic; across, up: what the axes are.

    >>> curves([("conv", [Curve("filter", [(0.1, 8.0), (1.0, 1.0)])])], "density", "speed-up").count("<polyline")
    1
    """
    side, gap, names = 300, 70, 20 + 14 * max((len(c) for _, c in panels), default=0)
    parts: list[str] = []
    points = [p for _, series in panels for curve in series for p in curve.points]
    spans = [(min(p[k] for p in points), max(p[k] for p in points)) for k in (0, 1)] if points else [(1, 2), (1, 2)]

    def place(value: float, axis: int) -> float:
        low, high = (log(v) for v in spans[axis])
        return (log(value) - low) / max(1e-9, high - low) * side

    for number, (title, series) in enumerate(panels):
        left, top = 50 + number * (side + gap), 30
        parts.append(f'<text x="{left}" y="{top - 10}" font-weight="bold">{escape(title)}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="#999"/>')
        for axis in (0, 1):
            for tick in _ticks(*spans[axis]):
                at = place(tick, axis)
                x, y, anchor = (
                    (left + at, top + side + 14, "middle") if axis == 0 else (left - 4, top + side - at + 4, "end")
                )
                parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{tick:g}</text>')
        parts.append(f'<text x="{left + side / 2}" y="{top + side + 30}" text-anchor="middle">{escape(across)}</text>')
        for k, curve in enumerate(series):
            colour = f"hsl({round(360 * k / max(1, len(series)))},65%,42%)"
            line = " ".join(f"{left + place(x, 0):.1f},{top + side - place(y, 1):.1f}" for x, y in curve.points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            y_name = top + side + 50 + 14 * k
            parts.append(f'<text x="{left}" y="{y_name}" fill="{colour}">{escape(curve.label)}</text>')
    width, height = 60 + len(panels) * (side + gap), 90 + side + names
    parts.append(f'<text x="10" y="{height - 8}">vertical: {escape(up)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
    return head + 'font-family="sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>\n"


def _ticks(low: float, high: float) -> list[float]:
    steps = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5)]
    return [step for step in steps if low <= step * 1.0001 and step <= high * 1.0001]


def write_picture(path: str | Path, drawn: str) -> None:
    """Write what `svg` or `curves` drew to a .svg or .html file.

    Raises DataError for another ending, or where it cannot be written.
    """
    ending = Path(path).suffix
    if ending not in (".svg", ".html"):
        raise DataError(f"a picture is written to a .svg or .html file, got {path}")
    page = f'<!doctype html><meta charset="utf-8"><title>Espalier</title>\n{drawn}'
    try:
        Path(path).write_text(drawn if ending == ".svg" else page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
