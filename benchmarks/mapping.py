"""Mapping: accuracy against measured latency for uniform plans, plans by rule and plans by search; targets met or not.

    python benchmarks/mapping.py --data FOLDER --weights FOLDER             # ResNet-20 on CIFAR-10, then latencies
    python benchmarks/mapping.py --only latency                             # ResNet-50 and MobileNetV2: 2x, 3x, 5x

ResNet-20: every plan aims at the same speedups over our own dense network. It is trained by the same method for as many
epochs on the same data (choices are made on a tenth of the training set, which the published weights have seen; the
test set is for the figures), shrunk, and timed beside the dense network and the dense rivals in one interleaved run.
Layers that the rule spares at first are spared by the uniform plans too. ResNet-50 and MobileNetV2 have random weights:
only latency counts there.

Stopped and started again it goes on where it was: everything finished lies in --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import espalier as es
from espalier.errors import EspalierError
from espalier.mapping import Here, LatencyModel, Log, Processes, best, check, front, mean_error, search, space_of
from espalier.mapping.candidates import find
from espalier.mapping.clock import engine_clock
from espalier.mapping.damage import Damage
from espalier.mapping.picture import draw_front
from espalier.mapping.probe import Probe
from espalier.mapping.rules import Rule
from espalier.planning import QUICK_IMAGES, OneShot, on_split
from espalier.runtime import rival
from espalier.sparsity import Entry
from espalier.train import Data, Recipe, build, evaluate, example_shape, fit, load_data, load_weights, seed_everything
from espalier.workspace import Workspace

RESULTS = Path(__file__).parent / "results"
NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # that the published weights were trained with
UNIFORM = {
    "filter": "filter",
    "column": "column",
    "one block (8 x 4)": "block_punched m=8 n=4",
    "pattern": "pattern+kernel",
    "unstructured": "weight",
}
RULE, SEARCH = "by rule", "by search"
RECIPE = Recipe(lr=0.02, batch_size=128, weight_decay=1e-4)
SHAPING = 0.5  # of the epochs by ADMM; the rest retrains with the masks frozen


@dataclass(frozen=True)
class Setting:
    """What every plan shares."""

    data: Data
    weights: Path
    work: Workspace
    latency: LatencyModel
    example: torch.Tensor
    epochs: int
    threads: int
    seed: int

    def network(self) -> nn.Module:
        made = build("resnet20").eval()
        load_weights(made, self.weights)
        return made


def uniform(latency: LatencyModel, graph: es.Graph, label: str, speedup: float) -> es.Plan:
    """One scheme and density wherever the rule does not spare, at the density that is measured to give the speedup."""
    spared = Rule(latency, Damage(graph.tensors, latency.layers)).spared()
    sites = [s for s in latency.layers if s not in spared and label in latency.candidates(s)]
    probe = Probe(graph, latency.layers)

    def plan(density: float) -> es.Plan:
        return es.Plan(tuple(Entry(s, find(label).at(density) if s in sites else None) for s in latency.layers))

    def speed(density: float) -> float:
        dense, cut = engine_clock(
            [probe.variant({}), probe.variant(plan(density).resolve(graph.sites()))], latency.threads
        )
        return dense.whole_ms / cut.whole_ms

    low, high = 0.01, find(label).ceiling
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if speed(middle) < speedup else (middle, high)
    return plan(low)


def searched(setting: Setting, speedup: float, trials: int, images: int, workers: int, data_root: str) -> es.Plan:
    """The best plan of a policy-gradient search that begins at the rule's plan."""
    network = setting.network()
    graph = es.capture(network, setting.example)
    rule = propose(setting, network, speedup)
    limit = rule.dense.latency_ms / speedup
    space = space_of(setting.latency)
    start = space.nearest(rule.plan.resolve(graph.sites()), limit)
    score = OneShot("resnet20", "cifar10", str(setting.weights), data_root, 1, images, norm=NORM)
    file = setting.work.path / "trials.jsonl"
    with Processes(workers) if workers > 1 else _Nothing() as where:
        search(
            space,
            score,
            file,
            limit_ms=limit,
            trials=trials,
            start=start,
            workers=where,
            seed=setting.seed,
            tell=lambda t: print(f"  trial {t.number}: {t.accuracy:.2f} % at {t.latency_ms:.4g} ms", flush=True),
        )
    known = Log(file, space.name).trials
    setting.work.write_text("front.json", json.dumps([dataclasses.asdict(t) for t in front(known)], indent=1))
    return space.plan(best(known, limit).picked)


class _Nothing:
    """No processes: one trial after the other, here."""

    def __enter__(self) -> Here:
        return Here()

    def __exit__(self, *_: object) -> None:
        pass


def propose(setting: Setting, network: nn.Module, speedup: float) -> es.mapping.Proposal:
    return es.propose(
        network,
        setting.example,
        es.Targets(speedup=speedup),
        evaluate=on_split(setting.data.holdout, QUICK_IMAGES),
        latency=setting.latency,
        threads=setting.threads,
        tell=lambda text: print(f"  {text}", flush=True),
    )


def trained(setting: Setting, name: str, plan: es.Plan) -> nn.Module:
    """The network trained into a plan, shrunk: half of the epochs by ADMM, half with the masks frozen."""
    network = setting.network()
    shaping = max(1, round(setting.epochs * SHAPING)) if setting.epochs > 1 else 1
    steps = shaping * setting.data.train.steps(RECIPE.batch_size)
    seed_everything(setting.seed)
    run = es.start(network, plan, "admm", setting.example, steps=steps)

    def phase(kind: str, epochs: int) -> dict[str, Any]:
        if epochs:
            recipe = dataclasses.replace(RECIPE, epochs=epochs, seed=setting.seed)
            checkpoint = setting.work.checkpoint(f"{name} {kind}")
            fit(network, setting.data, recipe, hooks=run, checkpoint=checkpoint, resume=checkpoint.exists(), phase=name)
        run.finish()
        return {"model": network.state_dict(), "run": run.state_dict()}

    for kind, epochs in (("shape", shaping), ("retrain", setting.epochs - shaping)):
        state = setting.work.phase(f"{name} {kind}", lambda k=kind, e=epochs: phase(k, e))
        network.load_state_dict(state["model"])
        run.load_state_dict(state["run"])
    return es.shrink(network.eval(), setting.example).eval()


def accuracy_part(setting: Setting, speedups: list[float], make_search: Callable[[float], es.Plan]) -> dict[str, Any]:
    dense = setting.network()
    graph = es.capture(dense, setting.example)
    modules: dict[str, nn.Module] = {}
    rows: dict[str, dict[str, Any]] = {}
    for speedup in speedups:
        makers: dict[str, Callable[[], es.Plan]] = {
            title: (lambda label=label, s=speedup: uniform(setting.latency, graph, label, s))
            for title, label in UNIFORM.items()
        }
        makers[RULE] = lambda s=speedup: propose(setting, setting.network(), s).plan
        makers[SEARCH] = lambda s=speedup: make_search(s)
        for title, make in makers.items():
            name = f"{title} {speedup:g}x"
            try:
                text = setting.work.phase(f"{name} plan", lambda make=make: {"toml": make().to_toml()})["toml"]
            except EspalierError as error:
                print(f"{name}: {error}")
                rows[name] = {"plan": title, "asked": speedup, "unreachable": str(error)}
                continue
            small = modules[name] = trained(setting, name, es.Plan.from_toml(text))
            size = es.size(es.capture(small, setting.example))
            rows[name] = {
                "plan": title,
                "asked": speedup,
                "test_accuracy": 100 * evaluate(small, setting.data.test).accuracy,
                "nonzero": size.nonzero,
                "useful_macs": size.useful_macs,
                "toml": text,
            }
            print(f"{name:28s} test {rows[name]['test_accuracy']:.2f} %  {size.nonzero:,} weights", flush=True)
    timings = timed(dense, modules, setting.example, setting.threads)
    for name, row in rows.items():
        if name in timings:
            row["latency"] = timings[name]
            row["speedup"] = timings["dense"]["median_ms"] / timings[name]["median_ms"]
            fastest = min(timings[r]["median_ms"] for r in timings if r.startswith("rival "))
            row["of_fastest_rival"] = fastest / timings[name]["median_ms"]
            told = f"{row['test_accuracy']:.2f} %  {row['speedup']:.2f}x  of rival {row['of_fastest_rival']:.2f}x"
            print(f"{name:28s} {told}")
    known = {"dense": {}} | {
        n: es.Plan.from_toml(r["toml"]).resolve(graph.sites()) for n, r in rows.items() if "toml" in r
    }
    checked = check(setting.latency, graph, known)
    print(f"latency model: mean error {mean_error(checked):.1%} over {len(checked)} networks")
    return {
        "network": "resnet20",
        "dense_accuracy": 100 * evaluate(dense, setting.data.test).accuracy,
        "rows": rows,
        "dense": {name: timings[name] for name in timings if name == "dense" or name.startswith("rival ")},
        "model_check": [dataclasses.asdict(row) | {"error": row.error} for row in checked],
        "model_mean_error": mean_error(checked),
    }


def timed(dense: nn.Module, modules: dict[str, nn.Module], example: torch.Tensor, threads: int) -> dict[str, Any]:
    """Everything in one interleaved run: the dense network, the dense rivals, the pruned ones."""
    calls: dict[str, Callable[[], object]] = {}
    for name, module in {"dense": dense, **modules}.items():
        program = es.compile(module, example, threads=threads)
        calls[name] = lambda p=program: p(example)
    for name in ("onnxruntime", "openvino"):
        calls[f"rival {name}"] = rival(name)(dense, example, threads)
    return {name: dataclasses.asdict(t) for name, t in es.bench(calls, rounds=25).items()}


def latency_part(name: str, threads: int, speedups: list[float]) -> dict[str, Any]:
    """Targets of one network, by rule; measured by the bench of the runtime, not by the clock that planned."""
    torch.manual_seed(0)
    example = torch.randn(1, *example_shape(name))
    graph = es.capture(build(name).eval(), example)
    model = es.latency_model(graph, threads=threads, tell=print)
    probe, rows = Probe(graph, model.layers), []
    for speedup in speedups:
        try:
            found = es.propose(graph, None, es.Targets(speedup=speedup), latency=model, threads=threads, tell=print)
        except EspalierError as error:
            print(f"{name} {speedup}x: {error}")
            rows.append({"asked": speedup, "unreachable": str(error)})
            continue
        variants = {"dense": probe.variant({}), "plan": probe.variant(found.plan.resolve(graph.sites()))}
        programs = {key: es.compile(variant, threads=threads) for key, variant in variants.items()}
        timings = es.bench({key: (lambda p=p: p(example)) for key, p in programs.items()}, rounds=25)
        got = timings["dense"].median_ms / timings["plan"].median_ms
        print(f"{name} {speedup:g}x asked, {got:.2f}x measured: {100 * (got / speedup - 1):+.1f} %", flush=True)
        rows.append(
            {
                "asked": speedup,
                "measured": got,
                "gap": got / speedup - 1,
                "timings": {key: dataclasses.asdict(timing) for key, timing in timings.items()},
                "density": sum(c.density * model.layers[s].site.weights for s, c in found.choices.items())
                / sum(layer.site.weights for layer in model.layers.values()),
                "toml": found.plan.to_toml(),
            }
        )
    return {"network": name, "threads": threads, "points": model.points, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of CIFAR-10")
    parser.add_argument("--weights", default="weights", help="folder of cifar10_resnet20.safetensors")
    parser.add_argument("--out", default="out/mapping")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=0, help="of the training set, to try it out; 0: all")
    parser.add_argument("--speedups", default="2,2.5,3.5")
    parser.add_argument("--targets", default="2,3,5", help="of the networks whose latency alone is measured")
    parser.add_argument("--networks", default="resnet50,mobilenetv2")
    parser.add_argument("--trials", type=int, default=48, help="of the search, for each speedup")
    parser.add_argument("--trial-images", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1, help="processes of the search")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["accuracy", "latency"], default=None)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    RESULTS.mkdir(exist_ok=True)
    facts = {"machine": es.machine(), "threads": a.threads, "seed": a.seed}
    if a.only != "latency":
        settings = {"epochs": a.epochs, "images": a.images, "seed": a.seed, "threads": a.threads}
        work = Workspace(a.out, settings, resume=True)
        data = load_data("cifar10", a.data).normalised_by(*NORM)
        if a.images:
            few = dataclasses.replace(
                data.train, images=data.train.images[: a.images], labels=data.train.labels[: a.images]
            )
            data = dataclasses.replace(data, train=few)
        network, example = build("resnet20").eval(), torch.zeros(1, 3, 32, 32)
        latency = es.latency_model(es.capture(network, example), threads=a.threads, tell=print)
        weights = Path(a.weights) / "cifar10_resnet20.safetensors"
        setting = Setting(data, weights, work, latency, example, a.epochs, a.threads, a.seed)
        speedups = [float(s) for s in a.speedups.split(",")]
        result = accuracy_part(
            setting, speedups, lambda s: searched(setting, s, a.trials, a.trial_images, a.workers, a.data)
        )
        write("mapping.json", {**result, "epochs": a.epochs, "images": a.images, "trials": a.trials, **facts})
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in result["rows"].values():
            if "latency" in row:
                lines.setdefault(row["plan"], []).append((row["latency"]["median_ms"], row["test_accuracy"]))
        draw_front(
            lines, RESULTS / "mapping.png", f"ResNet-20, CIFAR-10, {a.threads} threads, {a.epochs} epochs a plan"
        )
    if a.only != "accuracy":
        targets = [float(s) for s in a.targets.split(",")]
        rows = [latency_part(name, a.threads, targets) for name in a.networks.split(",")]
        write("mapping_latency.json", {"networks": rows, **facts})


def write(name: str, report: dict[str, Any]) -> None:
    (RESULTS / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
