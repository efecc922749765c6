"""Time of every scheme and block size at falling densities, for typical layers: the figure of this field's papers.

    python benchmarks/blocks.py
    python benchmarks/blocks.py --layers "1x1 256-1024 @14" --variants "block_punched 8x4;weight" --rounds 5

A row is one layer under one scheme: random weights projected on the scheme at every density, each compiled by itself,
all of them and the dense layer in turns in one run on one thread. Rows that stand in the JSON are not measured again
(--again does), so a run that was stopped goes on where it was. Speed-ups are over the dense layer of the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import espalier as es
from espalier.sparsity import unfit

RESULTS = Path(__file__).parent / "results"
DENSITIES = (0.75, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05)
DENSITIES_SHOWN = (0.05, 0.1, 0.2, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and the shape of what it reads, without the batch."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def conv(i: int, o: int, window: int, size: int) -> Layer:
    return Layer(lambda: nn.Conv2d(i, o, window, padding=window // 2), (i, size, size))


LAYERS = {
    "3x3 64 @56": conv(64, 64, 3, 56),
    "3x3 256 @14": conv(256, 256, 3, 14),
    "1x1 256-1024 @14": conv(256, 1024, 1, 14),
    "linear 4096-1024": Layer(lambda: nn.Linear(4096, 1024), (4096,)),
    "linear 768-3072, 197 tokens": Layer(lambda: nn.Linear(768, 3072), (197, 768)),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("filter", "column", "channel", "filter+column", "kernel", "weight")},
    **{
        f"block_punched {m}x{n}": ("block_punched", {"m": m, "n": n})
        for m, n in ((4, 1), (4, 4), (8, 1), (8, 4), (16, 4), (32, 8))
    },
    **{f"block_column {m}": ("block_column", {"m": m}) for m in (4, 8, 16, 32)},
    **{f"block_row {n}": ("block_row", {"n": n}) for n in (4, 16)},
    "pattern+kernel": ("pattern+kernel", {}),
}


def measure(layer: Layer, variant: str, rounds: int) -> dict[str, Any] | None:
    """Times of one layer under one scheme; None where the layer cannot take it."""
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    example = torch.randn(1, *layer.shape)
    torch.set_num_threads(1)
    programs = {"dense": es.compile(layer.make().eval(), example, threads=1)}
    reached: dict[str, float] = {"dense": 1.0}
    for density in DENSITIES:
        module = layer.make().eval()
        (site,) = es.capture(module, example).sites().values()
        try:
            scheme = es.scheme(name, density, **options)
        except es.EspalierError:
            continue  # a density that the scheme cannot have
        if unfit(scheme, site) is not None:
            return None
        with torch.no_grad():
            weight: Tensor = module.get_parameter(site.name)
            weight.copy_(scheme.project(weight))
            reached[str(density)] = float(weight.count_nonzero()) / weight.numel()
        programs[str(density)] = es.compile(module, example, threads=1)
    timings = es.bench({key: p.bind(example) for key, p in programs.items()}, rounds=rounds)
    whole = timings["dense"].median_ms
    points = []
    for key, timing in timings.items():
        row = max(programs[key].describe(), key=lambda step: step.weights)
        points.append(
            {
                "density": reached[key],
                **dataclasses.asdict(timing),
                "speedup": whole / timing.median_ms,
                "format": row.format,
                "reason": row.reason,
            }
        )
    return {"points": points}


# Rows of the picture: schemes that are worth comparing with each other, and single weights with all of them.
FAMILIES = {
    "whole rows and columns": ("filter", "column", "channel", "filter+column", "kernel", "pattern+kernel"),
    "punched blocks": tuple(name for name in VARIANTS if name.startswith("block_punched")),
    "block columns and rows": tuple(name for name in VARIANTS if name.startswith(("block_column", "block_row"))),
}


def draw(rows: dict[str, Any], path: Path) -> None:
    """Speed-up over density: a column of panels a layer, a row a family of schemes, a curve a scheme."""
    figure = Figure((4 * len(LAYERS), 3.6 * len(FAMILIES)), layout="tight")
    panels = figure.subplots(len(FAMILIES), len(LAYERS), sharex=True, sharey="col")
    for line, (family, names) in zip(panels, FAMILIES.items()):
        for panel, layer in zip(line, LAYERS):
            for number, name in enumerate((*names, "weight")):
                points = [p for p in ((rows.get(f"{layer} / {name}") or {}).get("points", ())) if p["density"] > 0]
                points.sort(key=lambda point: point["density"])
                style = {"color": "black", "linestyle": ":"} if name == "weight" else {"color": f"C{number}"}
                panel.plot(
                    [p["density"] for p in points],
                    [p["speedup"] for p in points],
                    marker=".",
                    label=name.removeprefix("block_"),
                    **style,
                )
            panel.axhline(1, color="grey", linewidth=0.8)
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(DENSITIES_SHOWN, [f"{d:g}" for d in DENSITIES_SHOWN])
            low, high = panel.get_ylim()
            ticks = [t for t in (0.5, 1, 2, 3, 5, 10, 20, 30) if low <= t <= high]
            panel.set_yticks(ticks, [f"{t:g}x" for t in ticks])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        line[0].set_ylabel(f"{family}\ntimes as fast as dense")
        line[0].legend(fontsize=8)
    for panel, layer in zip(panels[0], LAYERS):
        panel.set_title(layer)
    for panel in panels[-1]:
        panel.set_xlabel("density")
    figure.suptitle("One layer under every scheme, against the dense layer on the same engine, 1 thread")
    figure.savefig(path, dpi=80)


def chosen(text: str, table: dict[str, Any]) -> list[str]:
    names = [name.strip() for name in text.split(";")] if text else list(table)
    unknown = [name for name in names if name not in table]
    if unknown:
        raise SystemExit(f"unknown: {unknown[0]}; there are {'; '.join(table)} (several joined by ;)")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="", help="several joined by ;")
    parser.add_argument("--variants", default="", help="several joined by ;")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    path = given.out / "blocks.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    for layer in chosen(given.layers, LAYERS):
        for variant in chosen(given.variants, VARIANTS):
            key = f"{layer} / {variant}"
            if key in held["rows"] and not given.again:
                continue
            held["rows"][key] = row = measure(LAYERS[layer], variant, given.rounds)
            held["machine"] = es.machine()
            given.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
            told = (
                "cannot take it"
                if row is None
                else "  ".join(
                    f"{p['density']:.2f}: {p['median_ms']:.3f} ms ({p['speedup']:.1f}x)" for p in row["points"]
                )
            )
            print(f"{key:45s} {told}", flush=True)
    draw(held["rows"], given.out / "blocks.png")


if __name__ == "__main__":
    main()
