"""Writes docs/results.md from the JSON files of the benchmarks: what stands there was measured by a script here.

    python benchmarks/page.py

Cells of a grid that have not been run yet stand as "open".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
HEAD = """# Results

Written by `benchmarks/page.py` from the JSON files in `benchmarks/results/`; "open" means not run yet. Accuracies are
those of whole test sets; nothing was chosen on them.
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def lenet5(report: dict[str, Any]) -> str:
    rows = [
        [row["title"], f"{row['test_accuracy']:.2f}", f"{row['nonzero']:,}", f"{row['fewer_weights']:.1f}x"]
        for row in report["rows"]
    ]
    return table(["LeNet-5 / MNIST, all layers count", "top-1 %", "weights", "fewer"], rows)


def methods_lenet5(report: dict[str, Any]) -> str:
    """A table for each density: methods down, schemes across, means over the seeds."""
    cells = {tuple(key.split("/")): value for key, value in report["cells"].items()}
    methods, schemes, densities, seeds = (list(dict.fromkeys(key[k] for key in cells)) for k in range(4))
    parts = [f"{report['epochs']['shape']} epochs of shaping, {report['epochs']['retrain']} of retraining."]
    for density in sorted(densities, key=float, reverse=True):

        def entry(method: str, scheme: str, density: str = density) -> str:
            found = [cells[key]["test"] for seed in seeds if (key := (method, scheme, density, seed)) in cells]
            return f"{mean(found):.2f}" + (f" ({len(found)})" if len(found) != len(seeds) else "") if found else "open"

        rows = [[method, *(entry(method, scheme) for scheme in schemes)] for method in methods]
        parts += [f"Density {density}, top-1 %, means of {len(seeds)} seeds:", table(["method", *schemes], rows)]
    return "\n\n".join(parts)


def methods_resnet20(report: dict[str, Any]) -> str:
    """Methods and schemes down, factors of multiply-accumulates across."""
    cells = {tuple(key.split("/")): value for key, value in report["cells"].items()}
    factors = sorted({key[2] for key in cells}, key=int)
    rows = []
    for method, scheme in dict.fromkeys(key[:2] for key in cells):
        found = {f: [v for key, v in cells.items() if key[:3] == (method, scheme, f)] for f in factors}
        made = [f"{mean(v['test'] for v in found[f]):.2f}" if found[f] else "open" for f in factors]
        rows.append([method, scheme, *made])
    epochs = f"{report['epochs']} epochs each, {report['precision']}, Torch-Pruning {report['torch_pruning']}."
    headings = ["method", "scheme", *(f"{f}x fewer MACs" for f in factors)]
    return f"{epochs} Top-1 %:\n\n{table(headings, rows)}"


def mapping(report: dict[str, Any]) -> str:
    """Every plan in training, fastest first; then the dense engines."""
    rows = [
        [
            row["plan"],
            f"{row['speedup']:g}x",
            row["epochs"],
            f"{row['test']:.2f} ({-row['drop']:+.2f})",
            f"{row['latency']['median_ms']:.3f}",
            f"{row['speedup_measured']:.2f}x",
            f"{row['of_fastest_rival']:.2f}x",
            "; ".join(row["beaten_by"]) or "-",
        ]
        for row in sorted(report["rows"].values(), key=lambda row: row["latency"]["median_ms"])
    ]
    headings = [
        "plan",
        "asked",
        "epochs",
        "top-1 % (drop)",
        "ms",
        "our dense",
        "fastest rival",
        "slower and worse than",
    ]
    dense = ", ".join(f"{name} {timing['median_ms']:.3f} ms" for name, timing in report["dense"].items())
    told = f"Unpruned: {report['dense_accuracy']:.2f} %; {dense}; {report['threads']} thread(s), batch 1."
    model = f"Latency model against the networks in training: mean error {report['model_mean_error']:.1%}."
    missing = [f"{name}: {why}" for name, why in report["unreachable"].items()]
    return "\n\n".join([told, table(headings, rows), *missing, model])


def mapping_latency(report: dict[str, Any]) -> str:
    """Targets asked and met, then how far the latency model is off."""
    rows = []
    for name, network in report["networks"].items():
        for row in network["rows"]:
            if "unreachable" in row:
                rows.append([name, f"{row['asked']:g}x", "", "", row["unreachable"]])
            else:
                rows.append([name, f"{row['asked']:g}x", f"{row['measured']:.2f}x", f"{row['gap']:+.1%}", ""])
    off = [[n, f"{v['model_mean_error']:.1%}", len(v["model_check"])] for n, v in report["networks"].items()]
    return "\n\n".join(
        [
            table(["network", "asked", "measured", "gap", "why not"], rows),
            table(["latency model against whole networks", "mean error", "networks"], off),
        ]
    )


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "lenet5": ("LeNet-5: ADMM, purification, unused path removal", lenet5),
    "lenet5_far": ("LeNet-5: how far it goes at 99.0 %", lenet5),
    "methods_lenet5": ("Every method with every scheme, LeNet-5 / MNIST", methods_lenet5),
    "methods_resnet20": ("Methods, schemes and rivals, ResNet-20 / CIFAR-10", methods_resnet20),
    "mapping": ("Mapping: accuracy against measured latency, ResNet-20 / CIFAR-10", mapping),
    "mapping_latency": ("Mapping: targets of latency, random weights", mapping_latency),
}


def page() -> str:
    parts = [HEAD.strip()]
    for name, (title, render) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            report = json.loads(file.read_text(encoding="utf-8"))
            told = f"`benchmarks/{name}.py`, {report['machine']['cpu']}."
            parts += [f"## {title}", told, render(report)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
