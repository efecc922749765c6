"""Pictures of what mapping measured: sensitivity by layer, and the front of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.errors import DataError, MissingExtraError
from espalier.mapping.candidates import POINTWISE, WINDOWED
from espalier.mapping.sensitivity import Sensitivity
from espalier.mapping.trials import Trial, front

COLUMNS = 4
ORDER = (*WINDOWED[:-2], *POINTWISE)  # from single weights to coarse structures
TICKS = (0.05, 0.1, 0.2, 0.4, 0.7)


def draw_sensitivity(found: Sensitivity, path: str | Path, title: str = "") -> Path:
    """Accuracy over density, a panel for each layer and a line for each scheme; the format follows the suffix.

    Raises MissingExtraError without matplotlib, DataError where the file cannot be written.
    """
    sites = list(dict.fromkeys(p.site for p in found.points))
    schemes = list(dict.fromkeys(p.scheme for p in found.points))
    colours = _shades(schemes)
    rows = max(1, math.ceil(len(sites) / COLUMNS))
    figure = _figure(3.0 * COLUMNS, 2.2 * rows + 0.8)
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    for k, site in enumerate(sites):
        panel = axes[k // COLUMNS][k % COLUMNS]
        for scheme in schemes:
            points = sorted((p.density, p.accuracy) for p in found.points if (p.site, p.scheme) == (site, scheme))
            if points:
                panel.plot(*zip(*points), color=colours[scheme], marker=".", linewidth=1, label=scheme)
        panel.axhline(found.accuracy, color="grey", linewidth=0.6, linestyle="--")
        panel.set_title(site.removesuffix(".weight"), fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.set_xscale("log")  # what matters happens at low densities
        panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        panel.minorticks_off()
        if k + COLUMNS >= len(sites):  # the last of its column
            panel.set_xlabel("density", fontsize=8)
            panel.tick_params(labelbottom=True)
    for empty in range(len(sites), rows * COLUMNS):
        axes[empty // COLUMNS][empty % COLUMNS].set_axis_off()
    handles = {h.get_label(): h for row in axes for panel in row for h in panel.get_lines()[:-1]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
    figure.supylabel("accuracy, % (no retraining)", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return _saved(figure, path)


def draw_front(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    title: str = "",
    *,
    level: tuple[str, float] | None = None,
) -> Path:
    """Accuracy over latency, a line for each name: ``{name: [(latency_ms, accuracy), ...]}``. Raises as above.

    A name with a single point stands beside it. level: a name and an accuracy that all are compared with.
    """
    figure = _figure(7.0, 4.6)
    panel = figure.subplots()
    for name, points in lines.items():
        (line,) = panel.plot(*zip(*sorted(points)), marker="o", markersize=5, linewidth=1, label=name)
        if len(points) == 1:
            beside = {"xytext": (6, 3), "textcoords": "offset points", "fontsize": 8, "color": line.get_color()}
            panel.annotate(name, points[0], **beside)
    if level is not None:
        panel.axhline(level[1], color="grey", linewidth=0.8, linestyle="--", label=level[0])
    panel.margins(x=0.18, y=0.08)  # room for the names
    panel.set_xlabel("measured latency, ms")
    panel.set_ylabel("accuracy, %")
    panel.grid(alpha=0.25, linewidth=0.5)
    if level is not None or any(len(points) > 1 for points in lines.values()):
        several = [h for h in panel.get_lines() if len(h.get_xdata()) > 1]
        panel.legend(handles=several, fontsize=8)
    panel.set_title(title, fontsize=10)
    return _saved(figure, path)


def draw_trials(trials: Sequence[Trial], path: str | Path, title: str = "") -> Path:
    """A search: every trial, and the front. Raises as above."""
    return draw_front(
        {"front": [(t.latency_ms, t.accuracy) for t in front(trials)]}, path, title or f"{len(trials)} trials"
    )


def _shades(schemes: Sequence[str]) -> dict[str, Any]:
    """A colour for each scheme, along one scale in the order of the ladders: single weights dark, coarse ones light."""
    try:
        from matplotlib import colormaps  # here: as in `_figure`
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
    scale, known = colormaps["viridis"], [c.label for c in ORDER]
    ranks = {scheme: known.index(scheme) if scheme in known else len(known) for scheme in schemes}
    order = sorted(schemes, key=lambda scheme: ranks[scheme])
    return {scheme: scale(0.95 * k / max(1, len(order) - 1)) for k, scheme in enumerate(order)}


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # here: an optional extra that takes its time, which few need
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any, path: str | Path) -> Path:
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the picture cannot be written: {error}") from error
    return Path(path)
