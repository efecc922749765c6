"""Targets of latency met by measurement, and the latency model against whole networks; no training.

    python benchmarks/mapping_latency.py                                    # ResNet-50 and MobileNetV2: 2x, 3x, 5x
    python benchmarks/mapping_latency.py --networks resnet20 --speedups 2 --no-check

Weights are random: only latency counts. A plan by rule is timed beside the dense network once more when it is finished,
pruned in one shot and shrunk, as a user would run it: medians of rounds in turns; with one thread in processor time,
so that what else runs on the machine hardly counts. Where a target is out of reach, the row says what is reachable and
why. The latency model is checked against whole networks: the dense one, every scheme alone at three densities, and the
plans.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import numbers

import espalier as es
from espalier.errors import EspalierError
from espalier.mapping import LatencyModel, Proposal, check, mean_error
from espalier.mapping.candidates import find
from espalier.mapping.probe import Probe
from espalier.sparsity import Scheme
from espalier.train import build, example_shape

RESULTS = Path(__file__).parent / "results" / "mapping_latency.json"
SECONDS = 0.03  # of one measurement
COMPILED = 5  # times each network is: how its numbers happen to lie in memory counts some per cent
DENSITIES = (0.6, 0.25, 0.12)  # at which the latency model is checked: none is in its table


def network_rows(
    name: str, speedups: list[float], threads: int, rounds: int, checking: bool, before: dict[str, Any]
) -> dict[str, Any]:
    """What the JSON holds of a network; what is not measured now stays as it was `before`."""
    torch.manual_seed(0)
    graph = es.capture(build(name).eval(), torch.zeros(1, *example_shape(name)))
    began = time.perf_counter()
    told: list[str] = []
    model = es.latency_model(graph, threads=threads, tell=told.append)
    table_seconds = time.perf_counter() - began
    rows, plans, proposals = list[dict[str, Any]](), alone(model), dict[float, Proposal]()
    for speedup in speedups:
        began = time.perf_counter()
        try:
            found = es.propose(graph, None, es.Targets(speedup=speedup), latency=model, threads=threads, tell=print)
        except EspalierError as error:
            print(f"{name} {speedup:g}x: {error}", flush=True)
            rows.append({"asked": speedup, "unreachable": str(error)})
            continue
        seconds = time.perf_counter() - began
        plans[f"plan {speedup:g}x"] = found.plan.resolve(graph.sites())
        proposals[speedup] = found
        rows.append({"asked": speedup, "seconds": seconds})
    times = measured(graph, model, proposals, rounds)
    for row in rows:
        if row["asked"] in proposals:
            row |= facts(model, proposals[row["asked"]], row["asked"], times[row["asked"]])
            print(f"{name} {row['asked']:g}x asked, {row['measured']:.2f}x measured: {row['gap']:+.1%}", flush=True)
    known = {row["asked"]: row for row in before.get("rows", [])} | {row["asked"]: row for row in rows}
    made = {**before, "network": name, "threads": threads, "rows": [known[asked] for asked in sorted(known)]}
    if told:  # it was not there yet
        made["table_seconds"] = table_seconds
    if checking:
        checked = check(model, graph, plans)
        print(f"{name}: latency model, mean error {mean_error(checked):.1%} over {len(checked)} networks", flush=True)
        made["model_mean_error"] = mean_error(checked)
        made["model_check"] = [dataclasses.asdict(row) | {"error": row.error} for row in checked]
    return made


def measured(
    graph: es.Graph, model: LatencyModel, proposals: dict[float, Proposal], rounds: int
) -> dict[float, dict[str, list[float]]]:
    """Plans, pruned in one shot and shrunk, each beside the dense network in turns: milliseconds by what was asked.

    All of them once, then all of them again, freshly compiled: a minute in which the machine is slower is nobody's.
    """
    probe, x = Probe(graph, model.layers), torch.randn(1, *graph.values[graph.inputs[0]].shape[1:])
    dense = probe.variant({})
    cut = {asked: probe.variant(p.plan.resolve(graph.sites()), own=True) for asked, p in proposals.items()}
    ms: dict[float, dict[str, list[float]]] = {asked: {"dense": [], "plan": []} for asked in cut}
    for _ in range(COMPILED):
        for asked, small in cut.items():
            programs = {k: es.compile(g, threads=model.threads) for k, g in (("dense", dense), ("plan", small))}
            calls = {key: p.bind(x) for key, p in programs.items()}
            for key, values in in_turns(calls, rounds // COMPILED, model.threads).items():
                ms[asked][key] += values
    return ms


def facts(model: LatencyModel, found: Proposal, speedup: float, ms: dict[str, list[float]]) -> dict[str, Any]:
    """What stands in the JSON of a plan that was measured."""
    medians = {key: float(np.median(values)) for key, values in ms.items()}
    got = medians["dense"] / medians["plan"]
    whole = sum(layer.site.weights for layer in model.layers.values())
    return {
        "measured": got,
        "gap": got / speedup - 1,
        "verified": found.measured_speedup,  # when the plan was made
        "density": sum(c.density * model.layers[s].site.weights for s, c in found.choices.items()) / whole,
        "median_ms": medians,
        "quartiles_ms": {key: np.quantile(values, [0.25, 0.75]).tolist() for key, values in ms.items()},
        "toml": found.plan.to_toml(),
    }


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns. With one thread it is processor time: other programs hardly count."""
    now = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start, count = now(), 0
            while now() - start < SECONDS:
                call()
                count += 1
            taken[name].append((now() - start) / count * 1e3)
    return taken


def alone(model: LatencyModel) -> dict[str, dict[str, Scheme]]:
    """Plans to check the model with: dense, and every scheme wherever it fits, at several densities."""
    plans: dict[str, dict[str, Scheme]] = {"dense": {}}
    for label in dict.fromkeys(each for s in model.layers for each in model.candidates(s)):
        for density in DENSITIES:
            sites = [s for s in model.layers if label in model.candidates(s)]
            sites = [s for s in sites if not model.layers[s].site.depthwise]  # which shrinks all that is around them
            plans[f"{label}, {density:g}"] = {s: find(label).at(density) for s in sites}
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet20,resnet50,mobilenetv2")
    parser.add_argument("--speedups", default="2,3,5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-check", action="store_true", help="leave the check of the latency model as it stands")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    held = json.loads(RESULTS.read_text())["networks"] if RESULTS.exists() else {}
    for name in a.networks.split(","):
        speedups = numbers(a.speedups) if a.speedups else []
        key = f"{name}, {a.threads} threads"
        held[key] = network_rows(name, speedups, a.threads, a.rounds, not a.no_check, held.get(key, {}))
        report = {"machine": es.machine(), "networks": held}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
