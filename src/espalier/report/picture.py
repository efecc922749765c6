"""Pictures of benchmarks as SVG, alone or in a page of their own: horizontal bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
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


def write_picture(path: str | Path, drawn: str) -> None:
    """Write what `svg` drew to a .svg or .html file.

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
