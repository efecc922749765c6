"""The engine against others: the table of targets, dense and pruned, in turns in one run.

    python benchmarks/engines.py --threads 1,2,4
    python benchmarks/engines.py --networks resnet50 --threads 1 --rounds 5

Random weights and one-shot magnitude masks (accuracy is another benchmark): block-punched 8 x 4 at every layer that
can take it, single weights for "unstructured", 1 x 1 windows only in MobileNetV2. Rivals run the unpruned network: they
gain nothing from zeros. Batch 1, fp32, equal threads; medians and quartiles of interleaved rounds. How many times the
fastest rival's speed a variant has is the median of the ratios within each round.

A row is one network at one number of threads. Rows that stand in the JSON are not measured again (--again does), so a
run that was stopped goes on where it was. On a machine that others use, too, rows can be measured several times
(--steadier): the one stands whose times, ours and the rivals', spread least. Beside the times stand the arithmetic
peak of the machine in that moment, the useful share of it that every step reaches, compile times, and how much memory
an engine holds after a run.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import espalier as es
from espalier.runtime import peak_gflops, rival
from espalier.train import build, example_shape

RESULTS = Path(__file__).parent / "results" / "engines.json"
RIVALS = ("onnxruntime", "openvino", "torch", "torch_compile")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to prune a network, and how many times the speed of the fastest rival it is to have."""

    scheme: str
    density: float
    at_least: float
    aim: float

    @property
    def name(self) -> str:
        return f"{self.scheme} {self.density}"


DENSE = Variant("dense", 1.0, 0.9, 1.2)
LARGE = tuple(
    Variant("block_punched", density, at_least, aim)
    for density, at_least, aim in ((0.3, 2.0, 2.5), (0.2, 2.8, 3.5), (0.1, 4.0, 6.0), (0.05, 5.5, 9.0))
)
UNSTRUCTURED = Variant("weight", 0.1, 2.0, 4.0)
TARGETS: dict[str, tuple[Variant, ...]] = {
    "resnet18_cifar": (DENSE, Variant("block_punched", 0.1, 4.0, 6.0), UNSTRUCTURED),
    "resnet50": (DENSE, *LARGE, UNSTRUCTURED),
    "vgg16": (DENSE, *LARGE, UNSTRUCTURED),
    "mobilenetv2": (DENSE, Variant("block_punched", 0.2, 1.6, 2.4)),
}


def network(name: str, variant: Variant = DENSE) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights, pruned, and an input."""
    torch.manual_seed(0)
    example = torch.randn(1, *example_shape(name))
    module = build(name).eval()
    if variant is not DENSE:
        plan = es.Plan.uniform(variant.scheme, variant.density)
        if name == "mobilenetv2":
            windows = {n: m.kernel_size for n, m in module.named_modules() if isinstance(m, nn.Conv2d)}
            chosen = es.scheme(variant.scheme, variant.density)
            plan = es.Plan.of({n: chosen for n, w in windows.items() if w == (1, 1)}, unfit="dense")
        es.start(module, plan, "magnitude", example).finish()
    return module, example


def measure(name: str, threads: int, rivals: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """A row of the results."""
    torch.set_num_threads(threads)
    module, example = network(name)
    candidates: dict[str, Any] = {}
    compiled, variants = {}, {}
    for variant in TARGETS[name]:
        pruned, _ = network(name, variant)
        start = time.perf_counter()
        program = es.compile(pruned, example, threads=threads)
        variants[variant.name] = {"compile_s": time.perf_counter() - start}
        compiled[variant.name] = candidates[variant.name] = program
    candidates = {key: program.bind(example) for key, program in compiled.items()}
    candidates |= {key: rival(key)(module, example, threads) for key in rivals}
    timings = es.bench(candidates, rounds=rounds, seconds=0.03)
    fastest = min(rivals, key=lambda key: timings[key].median_ms)
    peak = peak_gflops(threads)
    for variant in TARGETS[name]:
        row = variants[variant.name]
        row |= dataclasses.asdict(timings[variant.name])
        row |= {"at_least": variant.at_least, "aim": variant.aim}
        row["achieved"] = timings[variant.name].times_faster(timings[fastest])
        row["steps"] = steps(compiled[variant.name], example, peak)
    return {
        "network": name,
        "threads": threads,
        "rounds": rounds,
        "peak_gflops": peak,
        "fastest_rival": fastest,
        "rivals": {key: dataclasses.asdict(timings[key]) for key in rivals},
        "variants": variants,
        "machine": es.machine(),
    }


def unrest(row: dict[str, Any]) -> float:
    """The mean distance between the quartiles of a row's times, ours and the rivals', as a share of their medians."""
    times = [*row["variants"].values(), *row["rivals"].values()]
    return float(np.mean([(t["high_ms"] - t["low_ms"]) / t["median_ms"] for t in times]))


def steps(program: Any, example: torch.Tensor, peak: float, runs: int = 7) -> list[dict[str, Any]]:
    """What every layer takes, most first, and its useful arithmetic (that of the weights that are not zero)."""
    measured: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        of_run: defaultdict[str, float] = defaultdict(float)
        for step, spent in program.profile(example).items():
            of_run[step.partition("/")[0]] += spent  # the phases and tiles of a conv belong to it
        for layer, spent in of_run.items():
            measured[layer].append(spent)
    nodes = {node.name: node for node in program.graph.nodes}
    pixels = {
        name: float(np.prod(program.graph.values[node.outputs[0]].shape[2:]))
        for name, node in nodes.items()
        if node.op in ("conv", "linear")
    }
    rows = []
    described = {row.step: row for row in program.describe() if row.weights}
    for layer, times in measured.items():
        ms, row = float(np.median(times)), described.get(layer)
        entry: dict[str, Any] = {"layer": layer, "kind": _kind(program.graph, nodes.get(layer)), "ms": ms}
        if row is not None:
            gflops = 2 * row.nonzeros * pixels[layer] / ms * 1e-6
            entry |= {"gflops": gflops, "of_peak": gflops / peak, "kernel": row.kernel, "format": row.format}
        rows.append(entry)
    return sorted(rows, key=lambda entry: -entry["ms"])


def _kind(graph: Any, node: Any) -> str:
    """What a layer has in common with others that take as long: "3 x 3 /2, 128 -> 128, 28 x 28"."""
    if node is None or node.op != "conv":
        return node.op if node is not None else "other"
    rows, _, *window = graph.values[node.inputs[1]].shape
    channels, (*_, height, width) = graph.values[node.inputs[0]].shape[1], graph.values[node.outputs[0]].shape
    stride = f" /{node.attrs['stride'][-1]}" if node.attrs["stride"][-1] > 1 else ""
    return f"{' x '.join(map(str, window))}{stride}, {channels} -> {rows}, {height} x {width}"


def memory_mb(name: str, engine: str) -> float:
    """What a process holds more after `engine` has been made and run than before, exporters and scraps given back."""
    command = [sys.executable, __file__, "--memory-of", f"{name}:{engine}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _print_memory(name: str, engine: str) -> None:
    torch.set_num_threads(1)
    module, example = network(name)
    before = _resident_mb()
    call = es.compile(module, example, threads=1) if engine == "espalier" else rival(engine)(module, example, 1)
    for _ in range(3):
        call(example) if engine == "espalier" else call()  # type: ignore[call-arg]
    print(_resident_mb() - before)


def _resident_mb() -> float:
    """Of this process, free memory given back to the system first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['network']}, {row['threads']} threads, peak {row['peak_gflops']:.0f} GFLOP/s")
    for key, timing in row["rivals"].items():
        note = "fastest rival" if key == row["fastest_rival"] else ""
        print(f"  {key:20s} {timing['median_ms']:9.3f} ms ({timing['low_ms']:.3f} .. {timing['high_ms']:.3f}) {note}")
    for key, v in row["variants"].items():
        met = "aim met" if v["achieved"] >= v["aim"] else "met" if v["achieved"] >= v["at_least"] else "NOT met"
        print(
            f"  {key:20s} {v['median_ms']:9.3f} ms ({v['low_ms']:.3f} .. {v['high_ms']:.3f})  {v['achieved']:5.2f}x"
            f"  at least {v['at_least']}x, aim {v['aim']}x: {met};  compiled in {v['compile_s']:.1f} s"
        )


def networks(text: str) -> list[str]:
    """Names of networks, given with commas between them."""
    for name in text.split(","):
        if name not in TARGETS:
            raise argparse.ArgumentTypeError(f"{name!r}: there are {', '.join(TARGETS)}")
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=networks, default=list(TARGETS))
    parser.add_argument("--threads", default="1,2,4")
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--again", action="store_true", help="measure rows anew that stand in the results")
    parser.add_argument("--steadier", action="store_true", help="measure them anew, and keep the steadier ones")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of the engines")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.memory_of:
        _print_memory(*a.memory_of.split(":"))
        return
    results = json.loads(a.results.read_text()) if a.results.exists() else {"rows": [], "memory_mb": {}}
    rivals = tuple(a.rivals.split(","))

    def save() -> None:
        a.results.parent.mkdir(exist_ok=True)
        a.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for name in a.networks:
        for threads in map(int, a.threads.split(",")):
            found = [r for r in results["rows"] if (r["network"], r["threads"]) == (name, threads)]
            if a.again or a.steadier or not found:
                row = measure(name, threads, rivals, a.rounds)
                row["passes"] = 1
                if a.steadier and found:
                    row["passes"] = passes = found[0].get("passes", 1) + 1
                    row = min({**found[0], "passes": passes}, row, key=unrest)
                results["rows"] = [r for r in results["rows"] if r not in found] + [row]
                save()
                found = [row]
            show(found[0])
        held = results["memory_mb"].setdefault(name, {})
        for engine in () if a.no_memory else ("espalier", *rivals):
            if engine not in held:
                held[engine] = memory_mb(name, engine)
                save()
        print("  memory held, MB: " + ", ".join(f"{engine} {mb:.0f}" for engine, mb in held.items()))


if __name__ == "__main__":
    main()
