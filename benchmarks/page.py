"""Writes docs/results.md, and the README's table of latencies, from the JSON files of the benchmarks.

    python benchmarks/page.py

What stands there was measured by a script here. Cells of a grid that have not been run yet stand as "open".
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- engines: written by benchmarks/page.py -->\n", "<!-- /engines -->\n"
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


RIVALS = ("one-shot", "group_norm", "group_sl")  # of methods_resnet20.py: one density for all, and Torch-Pruning's


def methods_resnet20(report: dict[str, Any]) -> str:
    """Methods and schemes down, factors of multiply-accumulates across."""
    cells = {tuple(key.split("/")): value for key, value in report["cells"].items()}
    factors = sorted({key[2] for key in cells}, key=int)
    grid = {tuple(key.split("/"))[:3] for key in report["grid"]}
    rows = []
    for theirs, title in ((False, "**best of ours**"), (True, "**best rival**")):
        found = {
            f: [v["test"] for key, v in cells.items() if (key[0] in RIVALS) == theirs and key[2] == f] for f in factors
        }
        rows.append([title, "", *(f"**{max(found[f]):.2f}**" if found[f] else "open" for f in factors)])
    for method, scheme in dict.fromkeys(key[:2] for key in cells):
        found = {f: [v for key, v in cells.items() if key[:3] == (method, scheme, f)] for f in factors}
        left = {f: "open" if (method, scheme, f) in grid else "" for f in factors}
        made = [f"{mean(v['test'] for v in found[f]):.2f}" if found[f] else left[f] for f in factors]
        rows.append([f"{method} (rival)" if method in RIVALS else method, scheme, *made])
    taught = f", {report['distill']:.0%} of the loss taught by the dense network" if report.get("distill") else ""
    epochs = f"{report['epochs']} epochs each{taught}, {report['precision']}, Torch-Pruning {report['torch_pruning']}."
    headings = ["method", "scheme", *(f"{f}x fewer MACs" for f in factors)]
    return f"{epochs} Top-1 %:\n\n{table(headings, rows)}"


def allocation(report: dict[str, Any]) -> str:
    """Schemes and densities down, ways across."""
    cells = {tuple(key.split("/")): value for key, value in report["cells"].items()}
    ways = list(dict.fromkeys(key[0] for key in cells))
    rows = []
    for scheme, density in sorted(dict.fromkeys(key[1:3] for key in cells), reverse=True):
        found = [[v["test"] for key, v in cells.items() if key[:3] == (way, scheme, density)] for way in ways]
        rows.append([scheme, density, *(f"{mean(each):.2f}" if each else "open" for each in found)])
    return f"LeNet-5 / MNIST, magnitude along its ramp. Top-1 %:\n\n{table(['scheme', 'density', *ways], rows)}"


def published(report: dict[str, Any]) -> str:
    """Every published figure; ours beside it, where the row has been run."""
    rows = []
    for name, claim in report["claims"].items():
        ours = report["cells"].get(name)
        made = (
            [
                f"{ours['test']:.2f} of {ours['dense_test']:.2f}",
                f"{ours['fewer_macs']:.2f}x",
                f"{ours['fewer_weights']:.2f}x",
                ours["split"],
            ]
            if ours
            else ["open", "", "", ""]
        )
        wanted = f"{claim['top1']:.2f}" if claim["top1"] else ""
        rows.append([name, claim["source"], wanted, claim["method"], claim["scheme"], *made])
    headings = [
        "row",
        "source",
        "published",
        "method",
        "scheme",
        "ours, top-1 %",
        "fewer MACs",
        "fewer weights",
        "split",
    ]
    return f"{report['epochs']} epochs each, from published or own dense weights.\n\n{table(headings, rows)}"


def engines(report: dict[str, Any]) -> str:
    """A table for each number of threads: the rivals' times, ours, and the targets."""
    again = [f"{r['network']} on {r['threads']} ({r['passes']})" for r in report["rows"] if r.get("passes", 1) > 1]
    whole = [r for r in report["rows"] if not next(iter(r["variants"].values())).get("each_ms")]
    older = ", ".join(f"{r['network']} on {r['threads']}" for r in whole)
    parts = [
        "Times are medians; a ratio is the median of the ratios within each round, which takes all engines in turns."
        + (f" Rows measured before rounds were kept have the ratio of medians: {older}." if whole else "")
        + (
            "\n\nThe machine was shared. Of rows measured more than once the one stands whose times, ours and the "
            f"rivals', spread least (network on threads, in brackets how often): {', '.join(again)}."
            if again
            else ""
        )
    ]
    for threads in sorted({row["threads"] for row in report["rows"]}):
        rows = [row for row in report["rows"] if row["threads"] == threads]
        names = list(rows[0]["rivals"])
        peak = max(row["peak_gflops"] for row in rows)
        parts.append(f"**{threads} thread{'s' if threads > 1 else ''}** (peak {peak:.0f} GFLOP/s), ms:")
        lines = [
            [row["network"], name, f"{v['median_ms']:.3g}"]
            + [f"{row['rivals'][rival]['median_ms']:.3g}" for rival in names]
            + [f"**{v['achieved']:.2f}x**", f"{v['at_least']}x", f"{v['aim']}x", _met(v)]
            for row in rows
            for name, v in row["variants"].items()
        ]
        titles = [name.replace("_", ".") for name in names]
        parts.append(table(["network", "weights", "ours", *titles, "of the fastest", "at least", "aim", ""], lines))
    held = report.get("memory_mb", {})
    if held:
        names = list(next(iter(held.values())))
        parts.append("Memory that a process holds after a run beyond what it held before, MB, 1 thread, dense:")
        parts.append(table(["network", *names], [[n, *(f"{v:.0f}" for v in row.values())] for n, row in held.items()]))
    return "\n\n".join(part for part in (*parts, layers(report)) if part)


def layers(report: dict[str, Any], name: str = "resnet50") -> str:
    """Where a network's time goes on one thread: layers of one kind added up, at three densities."""
    row = next((row for row in report["rows"] if (row["network"], row["threads"]) == (name, 1)), None)
    if row is None or "kind" not in row["variants"]["dense 1.0"]["steps"][0]:
        return ""
    shown = ("dense 1.0", "block_punched 0.2", "block_punched 0.05")
    ms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    work: defaultdict[str, Counter[str]] = defaultdict(Counter)
    number = Counter(step["kind"] for step in row["variants"][shown[0]]["steps"])
    for variant in shown:
        for step in row["variants"][variant]["steps"]:
            ms[step["kind"]][variant] += step["ms"]
            work[step["kind"]][variant] += step.get("gflops", 0) * step["ms"]
    lines = []
    for kind in sorted(ms, key=lambda kind: -ms[kind][shown[1]]):
        line: list[object] = [kind, number[kind]]
        for variant in shown:
            spent, peak = ms[kind][variant], row["peak_gflops"]
            line += [f"{spent:.2f}", f"{100 * work[kind][variant] / spent / peak:.0f} %" if work[kind][variant] else ""]
        lines.append(line)
    sums = [sum(ms[kind][variant] for kind in ms) for variant in shown]
    lines.append(["**all**", "", *(part for total in sums for part in (f"**{total:.1f}**", ""))])
    headings = ["layers", "number", *(part for variant in shown for part in (f"{variant}, ms", "of peak"))]
    told = (
        f"Where {name}'s time goes on one thread, every step timed by itself. Of the peak of {row['peak_gflops']:.0f} "
        "GFLOP/s only products with weights that are not zero count, as in the plain sum, which is how Winograd's "
        "algorithm comes to more than 100 %; phases belong to their layer."
    )
    return f"{told}\n\n{table(headings, lines)}"


def _met(variant: dict[str, Any]) -> str:
    reached = variant["achieved"]
    return "aim met" if reached >= variant["aim"] else "met" if reached >= variant["at_least"] else "not met"


def readme_engines(report: dict[str, Any]) -> str:
    """The README's table: one thread and the most threads."""
    counts = sorted({row["threads"] for row in report["rows"]})
    lines = []
    for row in sorted(report["rows"], key=lambda row: (row["network"], row["threads"])):
        if row["threads"] not in (counts[0], counts[-1]):
            continue
        fastest = row["rivals"][row["fastest_rival"]]["median_ms"]
        entry = [row["network"], row["threads"], f"{row['fastest_rival']} {fastest:.3g}"]
        variants = row["variants"]
        for name in ("dense 1.0", "block_punched 0.2", "block_punched 0.1", "weight 0.1"):
            v = variants.get(name)
            entry.append(f"{v['median_ms']:.3g} ({v['achieved']:.2f}x)" if v else "")
        lines.append(entry)
    headings = [
        "network",
        "threads",
        "fastest rival, ms",
        "ours: dense",
        "blocks, 0.2",
        "blocks, 0.1",
        "single weights, 0.1",
    ]
    return table(headings, lines) + "\n"


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
    off = [
        [n, f"{v['model_mean_error']:.1%}", len(v["model_check"])] if "model_check" in v else [n, "open", ""]
        for n, v in report["networks"].items()
    ]
    return "\n\n".join(
        [
            table(["network", "asked", "measured", "gap", "why not"], rows),
            table(["latency model against whole networks", "mean error", "networks"], off),
        ]
    )


def overhead(report: dict[str, Any]) -> str:
    schemes = list(dict.fromkeys(row["scheme"] for row in report["rows"]))
    by = {(row["method"], row["scheme"]): row["overhead"] for row in report["rows"]}
    rows = [
        [m, *(f"{100 * by[m, s]:+.1f} %" for s in schemes)] for m in dict.fromkeys(m for m, _ in by) if m != "dense"
    ]
    limit = f"at most {100 * report['limit']:.0f} % is allowed"
    told = f"Batch {report['batch']} on {report['device']}, {report['threads']} threads; {limit}."
    return f"{told}\n\n{table(['method', *schemes], rows)}"


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "engines": ("The engine against others", engines),
    "lenet5": ("LeNet-5: ADMM, purification, unused path removal", lenet5),
    "lenet5_far": ("LeNet-5: how far it goes at 99.0 %", lenet5),
    "methods_lenet5": ("Every method with every scheme, LeNet-5 / MNIST", methods_lenet5),
    "allocation": ("One density, split over the layers in three ways", allocation),
    "methods_resnet20": ("Methods, schemes and rivals, ResNet-20 / CIFAR-10", methods_resnet20),
    "published": ("Published figures of others", published),
    "overhead": ("What a method costs beside a dense training step, ResNet-18 / CIFAR", overhead),
    "mapping": ("Mapping: accuracy against measured latency, ResNet-20 / CIFAR-10", mapping),
    "mapping_latency": ("Mapping: targets of latency", mapping_latency),
}


def _read(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def page() -> str:
    parts = [HEAD.strip()]
    for name, (title, render) in SECTIONS.items():
        if report := _read(name):
            machine = report["machine"] if "machine" in report else report["rows"][0]["machine"]
            told = f"`benchmarks/{name}.py`, {machine['cpu']}."
            parts += [f"## {title}", told, render(report)]
    return "\n\n".join(parts) + "\n"


def readme() -> str:
    """The README with its table as the results say."""
    text = README.read_text(encoding="utf-8")
    report = _read("engines")
    if report is None or BEGIN not in text:
        return text
    head, rest = text.split(BEGIN)
    return head + BEGIN + readme_engines(report) + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
