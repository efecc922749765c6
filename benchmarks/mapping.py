"""Mapping: accuracy against measured latency for uniform plans, plans by rule and plans by search.

    python benchmarks/mapping.py --data FOLDER --weights cifar10_resnet20.safetensors --workers 2

ResNet-20 on CIFAR-10 from published weights. Every plan aims at the same speedups over our own dense network, as
measured. All are trained by one method and recipe, with the dense network as teacher, for equally many epochs on the
same data; then shrunk, and timed beside the dense network and the dense rivals in one interleaved run. --long adds
plans by rule at speedups of their own, trained for so many epochs by a recipe of their own (--long-*, --teacher).
Layers that the rule spares at first are spared by the uniform plans too. Choices are made on a tenth of the training
set, which the published weights have seen; the test set is for the figures only.

Plans are made and timed first, in this process; then the search tries its trials and the plans are trained, in
--workers processes of one thread each. Stopped and started again it goes on where it was: what is finished lies in
--out, and what was trained already is not trained again, except for --again. Rows that are not finished are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import key_of, numbers, options, run_cells
from torch import nn
from training import Training

import espalier as es
from espalier.errors import EspalierError, PlanError
from espalier.graph import shrink_graph
from espalier.mapping import Here, LatencyModel, Log, Processes, Trial, check, final, mean_error, search, space_of
from espalier.mapping.candidates import find
from espalier.mapping.clock import engine_clock
from espalier.mapping.damage import Damage
from espalier.mapping.picture import draw_front
from espalier.mapping.rules import Rule
from espalier.methods import get
from espalier.planning import SHORT, OneShot, begun, on_split
from espalier.runtime import rival
from espalier.sparsity import Entry
from espalier.train import Data, Recipe, build, evaluate, load_data, load_weights, seed_everything
from espalier.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "mapping.json"
NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # that the published weights were trained with
UNIFORM = {
    "filter": "filter",
    "column": "column",
    "one block (8 x 4)": "block_punched m=8 n=4",
    "pattern": "pattern+kernel",
    "unstructured": "weight",
}
RULE, SEARCH, DENSE = "by rule", "by search", "dense"
SHAPING = 2  # epochs, half of them where there are fewer than four; the rest retrain with the masks frozen
LEAST = 0.01  # density of a uniform plan
FINAL_EPOCHS = 2  # in which the best trials of the search meet again, on all images
HELD_OUT = 1000  # images on which the rule reads how sensitive each layer is
RIVALS = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Cell:
    """A plan in training."""

    plan: str
    speedup: float
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.plan}/{self.speedup:g}"


@dataclass(frozen=True)
class Setting:
    """What making the plans needs. graph: of the network; trial: of another with the same weights, to prune."""

    arguments: argparse.Namespace
    data: Data
    latency: LatencyModel
    network: nn.Module
    graph: es.Graph
    trial: es.Graph

    def speed(self, plan: es.Plan) -> float:
        """Times faster than dense on the engine: the network pruned in one shot, and shrunk."""
        with torch.no_grad():
            for name, tensor in self.trial.tensors.items():
                tensor.copy_(self.graph.tensors[name])
        es.Run(self.trial, plan.resolve(self.trial.sites()), get("magnitude"), None).finish()
        dense, cut = engine_clock([self.graph, shrink_graph(self.trial)[0]], self.latency.threads)
        return dense.whole_ms / cut.whole_ms


def example() -> torch.Tensor:
    return torch.zeros(1, 3, 32, 32)


def pretrained(weights: str) -> nn.Module:
    network = build("resnet20").eval()
    load_weights(network, weights)
    return network


# -- plans ------------------------------------------------------------------------------------------


def uniform(setting: Setting, label: str, speedup: float) -> es.Plan:
    """One scheme and density wherever the rule does not spare, at the density that is measured to give the speedup."""
    latency = setting.latency
    spared = Rule(latency, Damage(setting.graph.tensors, latency.layers)).spared()
    sites = [s for s in latency.layers if s not in spared and label in latency.candidates(s)]

    def plan(density: float) -> es.Plan:
        return es.Plan(tuple(Entry(s, find(label).at(density) if s in sites else None) for s in latency.layers))

    low, high = LEAST, find(label).ceiling
    most = setting.speed(plan(low))
    if most < speedup:
        raise PlanError(f"{label} gives {most:.2f}x at density {low}, where {speedup:g}x was asked")
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (low, middle) if setting.speed(plan(middle)) < speedup else (middle, high)
    return plan(low)


def by_rule(setting: Setting, speedup: float) -> es.mapping.Proposal:
    asked, score = es.Targets(speedup=speedup), on_split(setting.data.holdout, HELD_OUT)
    shared: dict[str, Any] = {"latency": setting.latency, "threads": setting.latency.threads}
    return es.propose(setting.network, example(), asked, evaluate=score, tell=lambda text: print(f"  {text}"), **shared)


def kept_rule(setting: Setting, speedup: float) -> tuple[es.Plan, float]:
    """The rule's plan, made once, and what the table should say of others that are as fast."""
    file = Path(setting.arguments.out) / "rule.json"
    return begun(file, f"{speedup:g}x", lambda: by_rule(setting, speedup))


def by_search(setting: Setting, speedup: float) -> es.Plan:
    """The best plan of a policy-gradient search that begins at the rule's plan; its trials serve every speedup."""
    a = setting.arguments
    plan, limit = kept_rule(setting, speedup)
    space = space_of(setting.latency, Damage(setting.graph.tensors, setting.latency.layers))
    recipe = dataclasses.replace(SHORT, precision=a.precision)
    file, folder = Path(a.out) / f"trials_{space.name}.jsonl", str(Path(a.data).resolve())
    score = OneShot("resnet20", "cifar10", str(Path(a.weights).resolve()), folder, 1, a.trial_images, recipe, NORM)
    start = space.nearest(plan.resolve(setting.graph.sites()), limit)

    def told(trial: Trial) -> None:
        print(f"  {trial.source} {trial.number}: {trial.accuracy:.2f} % at {trial.latency_ms:.4g} ms", flush=True)

    with Processes(a.workers) if a.workers > 1 else nullcontext(Here()) as where:
        search(space, score, file, limit_ms=limit, trials=a.trials, start=start, workers=where, seed=a.seed, tell=told)
        tried = space.timed(Log(file, space.name).trials)
        longer = dataclasses.replace(score, epochs=FINAL_EPOCHS, images=None)
        finals = Path(a.out) / f"finals_{space.name}.jsonl"
        taken = final(space, longer, finals, tried, limit_ms=limit, start=start, workers=where, tell=told)
    return space.plan(taken.picked)


def made_plans(setting: Setting, speedups: list[float], work: Workspace) -> dict[str, dict[str, str]]:
    """name of a cell -> its plan as TOML, or why there is none; each is made once and kept."""
    makers: dict[str, Callable[[float], es.Plan]] = {
        title: (lambda speedup, label=label: uniform(setting, label, speedup)) for title, label in UNIFORM.items()
    }
    makers[RULE] = lambda speedup: kept_rule(setting, speedup)[0]
    makers[SEARCH] = lambda speedup: by_search(setting, speedup)
    file = work.path / "plans.json"
    plans: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    a = setting.arguments
    for title, make in makers.items():
        for speedup in [*speedups, *(numbers(a.long_speedups) if a.long and title == RULE else [])]:
            name = f"{title}/{speedup:g}"
            if name not in plans:
                try:
                    plan = make(speedup)
                    plans[name] = {"toml": plan.to_toml(), "one_shot": f"{setting.speed(plan):.3f}"}
                except EspalierError as error:
                    plans[name] = {"unreachable": str(error)}
                work.write_text("plans.json", json.dumps(plans, indent=1))
            told = plans[name].get("unreachable") or f"{plans[name]['one_shot']}x pruned in one shot"
            print(f"{name:24s} {told}", flush=True)
    return plans


def forget(titles: list[str], a: argparse.Namespace) -> None:
    """Drop the plans of these titles and all that was trained into them."""
    folder = Path(a.out)
    for name in ("plans.json", "cells.json"):
        if (folder / name).exists():
            held = json.loads((folder / name).read_text())
            rows = held["cells"] if name == "cells.json" else held
            for key in [key for key in rows if key.partition("/")[0] in titles]:
                del rows[key]
            (folder / name).write_text(json.dumps(held, indent=1), encoding="utf-8")
    for title in titles:
        for old in folder.glob(f"{_plain(title)}_*"):
            shutil.rmtree(old)
    if RULE in titles:
        (folder / "rule.json").unlink(missing_ok=True)


# -- training ---------------------------------------------------------------------------------------


def train(cell: Cell, a: argparse.Namespace) -> dict[str, Any]:
    """The network trained into a plan: shaped, then with the masks frozen; what it came to."""
    data = cifar10(a)
    network, teacher = pretrained(a.weights), teacher_of(cell, a)
    recipe = Recipe(lr=a.lr, weight_decay=1e-4, distill=a.distill, precision=a.precision, seed=a.seed)
    facts: dict[str, Any] = {"method": a.method}
    shaping = max(1, min(SHAPING, cell.epochs // 2))
    if cell.epochs == a.long:
        recipe = dataclasses.replace(recipe, lr=a.long_lr, distill=a.long_distill)
        facts["teacher"], shaping = Path(a.teacher).name, a.long_shaping
    work = Workspace(cell_folder(cell, a), {"recipe": dataclasses.asdict(recipe), **facts}, resume=True)
    method = get(a.method) if shaping else get("magnitude", ramp="jump")
    steps = max(1, shaping * data.train.steps(recipe.batch_size))
    plan = es.Plan.from_toml(json.loads((Path(a.out) / "plans.json").read_text())[cell.name]["toml"])
    seed_everything(a.seed)
    run = es.start(network, plan, method, example(), steps=steps)

    Training(network, data, work, teacher=teacher).into_plan(run, recipe, shaping, cell.epochs - shaping)
    size = es.size(es.capture(es.shrink(network.eval(), example()), example()))
    return {
        "test": 100 * evaluate(network, data.test).accuracy,
        "holdout": 100 * evaluate(network, data.holdout).accuracy,
        "nonzero": size.nonzero,
        "useful_macs": size.useful_macs,
    }


def teacher_of(cell: Cell, a: argparse.Namespace) -> nn.Module:
    """Who teaches: the dense network itself, or for the long training the one that is named."""
    if cell.epochs != a.long or not a.teacher:
        return pretrained(a.weights)
    name, _, weights = a.teacher.partition(":")
    teacher = build(name).eval()
    load_weights(teacher, weights)
    return teacher


def cell_folder(cell: Cell, a: argparse.Namespace) -> Path:
    return Path(a.out) / _plain(key_of(cell))


def _plain(name: str) -> str:
    return name.translate(str.maketrans(" /", "__", "()"))


def cifar10(a: argparse.Namespace) -> Data:
    """The data; with --images fewer of all, to try things out."""
    data = load_data("cifar10", a.data).normalised_by(*NORM)
    if not a.images:
        return data
    few = {part: getattr(data, part).only(torch.arange(a.images)) for part in ("train", "holdout", "test")}
    return dataclasses.replace(data, **few)


# -- the result -------------------------------------------------------------------------------------


def timed(cells: list[Cell], a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Everything that is trained, the dense network and the dense rivals, in one interleaved run."""
    dense = pretrained(a.weights)
    modules = {DENSE: dense}
    for cell in cells:
        network = pretrained(a.weights)
        state = torch.load(cell_folder(cell, a) / "work" / "retrain.pt", weights_only=True)
        network.load_state_dict(state["model"])
        modules[key_of(cell)] = es.shrink(network.eval(), example())
    x = torch.randn(example().shape, generator=torch.Generator().manual_seed(0))
    programs = {name: es.compile(module, x, threads=a.threads) for name, module in modules.items()}
    calls: dict[str, Callable[[], object]] = {name: p.bind(x) for name, p in programs.items()}
    calls |= {name: rival(name)(dense, x, a.threads) for name in RIVALS}
    return {name: dataclasses.asdict(t) for name, t in es.bench(calls, rounds=a.rounds).items()}


def report(setting: Setting, plans: dict[str, dict[str, str]], done: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """What the JSON holds; printed on the way."""
    a = setting.arguments
    timings = timed(list(done), a)
    fastest = min(RIVALS, key=lambda name: timings[name]["median_ms"])
    accuracy = 100 * evaluate(setting.network, cifar10(a).test).accuracy
    rows = {}
    for cell, result in done.items():
        timing = timings[key_of(cell)]
        rows[key_of(cell)] = {
            **dataclasses.asdict(cell),
            **result,
            "drop": accuracy - result["test"],
            "latency": timing,
            "speedup_measured": timings[DENSE]["median_ms"] / timing["median_ms"],
            "of_fastest_rival": timings[fastest]["median_ms"] / timing["median_ms"],
            "toml": plans[cell.name]["toml"],
        }
        if cell.epochs == a.long:
            told = {"lr": a.long_lr, "distill": a.long_distill, "shaping": a.long_shaping}
            rows[key_of(cell)] |= {**told, "teacher": a.teacher.partition(":")[0] or DENSE}
    for row in rows.values():  # those of equal epochs that are as fast and more accurate
        row["beaten_by"] = [
            key
            for key, other in rows.items()
            if other["epochs"] == row["epochs"]
            and other["latency"]["median_ms"] <= row["latency"]["median_ms"]
            and other["test"] > row["test"]
        ]
    sites = setting.graph.sites()
    resolved = {n: es.Plan.from_toml(p["toml"]).resolve(sites) for n, p in plans.items() if "toml" in p}
    checked = check(setting.latency, setting.graph, {DENSE: {}, **resolved})
    print(f"dense {accuracy:.2f} %: " + ", ".join(f"{n} {timings[n]['median_ms']:.4f} ms" for n in (DENSE, *RIVALS)))
    for key, row in rows.items():
        print(
            f"{key:28s} test {row['test']:.2f} % ({-row['drop']:+.2f})  {row['latency']['median_ms']:.4f} ms  "
            f"{row['speedup_measured']:.2f}x dense  {row['of_fastest_rival']:.2f}x {fastest}  "
            f"{'beaten by ' + ', '.join(row['beaten_by']) if row['beaten_by'] else 'on the front'}"
        )
    print(f"latency model: mean error {mean_error(checked):.1%} over {len(checked)} networks")
    return {
        "claim": "mapped plans lie on or above the front of the uniform ones",
        "network": "resnet20",
        "dense_accuracy": accuracy,
        "dense": {name: timings[name] for name in (DENSE, *RIVALS)},
        "rows": rows,
        "unreachable": {n: p["unreachable"] for n, p in plans.items() if "unreachable" in p},
        "model_check": [dataclasses.asdict(row) | {"error": row.error} for row in checked],
        "model_mean_error": mean_error(checked),
        **{name: getattr(a, name) for name in FACTS},
        "machine": es.machine(),
    }


FACTS = ("images", "trials", "trial_images", "method", "lr", "distill", "precision", "threads", "seed")


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(out="out/mapping")
    parser.add_argument("--weights", default="cifar10_resnet20.safetensors")
    parser.add_argument("--epochs", type=int, default=4, help="of each plan")
    parser.add_argument("--long", type=int, default=15, help="epochs of more trainings of plans by rule; 0: none")
    parser.add_argument("--long-speedups", default="2.6,2.55", help="of these")
    parser.add_argument("--long-lr", type=float, default=0.05)
    parser.add_argument("--long-distill", type=float, default=0.5)
    parser.add_argument("--long-shaping", type=int, default=SHAPING, help="epochs of it; 0: pruned in one shot")
    parser.add_argument("--teacher", default="", help="of the long training, as resnet56:FILE; default: dense itself")
    parser.add_argument("--speedups", default="3.3", help="over our own dense network")
    parser.add_argument("--method", choices=list(es.METHODS), default="magnitude")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--distill", type=float, default=0.5)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--trials", type=int, default=96, help="of the search, for each speedup")
    parser.add_argument("--trial-images", type=int, default=5000)
    parser.add_argument("--images", type=int, default=0, help="of each part of the data, to try it out; 0: all")
    parser.add_argument("--threads", type=int, default=1, help="of the latency")
    parser.add_argument("--rounds", type=int, default=50, help="of the interleaved run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", default="", help="plans to make and train anew, such as 'by rule,by search'")
    a = parser.parse_args()
    torch.set_num_threads(1)
    forget([title for title in a.again.split(",") if title], a)
    settings = {name: getattr(a, name) for name in FACTS}
    work = Workspace(a.out, settings, resume=True)
    network = pretrained(a.weights)
    graph = es.capture(network, example())
    latency = es.latency_model(graph, threads=a.threads, tell=print)
    setting = Setting(a, cifar10(a), latency, network, graph, es.capture(pretrained(a.weights), example()))
    speedups = numbers(a.speedups)
    plans = made_plans(setting, speedups, work)
    cells = [Cell(title, s, a.epochs) for s in reversed(speedups) for title in (RULE, SEARCH, *UNIFORM)]
    if a.long:
        cells = [*(Cell(RULE, s, a.long) for s in numbers(a.long_speedups)), *cells]
    cells = [cell for cell in dict.fromkeys(cells) if "toml" in plans[cell.name]]
    file = Path(a.out) / "cells.json"
    try:
        run_cells(cells, train, a, file, settings)
    finally:
        made = json.loads(file.read_text())["cells"] if file.exists() else {}
        result = report(setting, plans, {cell: made[key_of(cell)] for cell in cells if key_of(cell) in made})
        target = Path(a.out) / RESULTS.name if a.images else RESULTS
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in result["rows"].values():
            title = row["plan"] if row["epochs"] == a.epochs else f"{row['plan']}, {row['epochs']} epochs"
            lines.setdefault(title, []).append((row["latency"]["median_ms"], row["test"]))
        title = f"ResNet-20, CIFAR-10, {a.threads} thread, {a.epochs} epochs where no number is told"
        level = f"dense, {result['dense'][DENSE]['median_ms']:.3f} ms", result["dense_accuracy"]
        draw_front(lines, target.with_suffix(".png"), title, level=level)


if __name__ == "__main__":
    main()
