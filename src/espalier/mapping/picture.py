"""Pictures of what mapping measured: sensitivity by layer, and the front of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.errors import DataError, MissingExtraError
from espalier.mapping.sensitivity import Sensitivity
from espalier.mapping.trials import Trial, front

try:  # an optional extra
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # type: ignore[assignment,misc]

COLUMNS = 4


def draw_sensitivity(found: Sensitivity, path: str | Path, title: str = "") -> Path:
    """Accuracy over density, a panel for each layer and a line for each scheme; the format follows the suffix.

    Raises MissingExtraError without matplotlib, DataError where the file cannot be written.
    """
    sites = list(dict.fromkeys(p.site for p in found.points))
    schemes = list(dict.fromkeys(p.scheme for p in found.points))
    rows = max(1, math.ceil(len(sites) / COLUMNS))
    figure = _figure(3.0 * COLUMNS, 2.2 * rows + 0.8)
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    for k, site in enumerate(sites):
        panel = axes[k // COLUMNS][k % COLUMNS]
        for colour, scheme in enumerate(schemes):
            points = sorted((p.density, p.accuracy) for p in found.points if (p.site, p.scheme) == (site, scheme))
            if points:
                panel.plot(*zip(*points), color=f"C{colour}", marker=".", linewidth=1, label=scheme)
        panel.axhline(found.accuracy, color="grey", linewidth=0.6)
        panel.set_title(site.removesuffix(".weight"), fontsize=8)
        panel.tick_params(labelsize=7)
    for empty in range(len(sites), rows * COLUMNS):
        axes[empty // COLUMNS][empty % COLUMNS].set_axis_off()
    handles = {h.get_label(): h for row in axes for panel in row for h in panel.get_lines()[:-1]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
    figure.supxlabel("density", fontsize=8)
    figure.supylabel("accuracy, % (no retraining)", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return _saved(figure, path)


def draw_front(lines: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, title: str = "") -> Path:
    """Accuracy over latency, a line for each name: ``{name: [(latency_ms, accuracy), ...]}``. Raises as above."""
    figure = _figure(6.4, 4.4)
    panel = figure.subplots()
    for name, points in lines.items():
        panel.plot(*zip(*sorted(points)), marker="o", markersize=3, linewidth=1, label=name)
    panel.set_xlabel("measured latency, ms")
    panel.set_ylabel("accuracy, %")
    panel.legend(fontsize=8)
    panel.set_title(title, fontsize=10)
    return _saved(figure, path)


def draw_trials(trials: Sequence[Trial], path: str | Path, title: str = "") -> Path:
    """A search: every trial, and the front. Raises as above."""
    return draw_front(
        {"front": [(t.latency_ms, t.accuracy) for t in front(trials)]}, path, title or f"{len(trials)} trials"
    )


def _figure(width: float, height: float) -> Any:
    if Figure is None:
        raise MissingExtraError("matplotlib", "plots")
    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any, path: str | Path) -> Path:
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the picture cannot be written: {error}") from error
    return Path(path)
