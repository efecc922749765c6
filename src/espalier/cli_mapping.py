"""The commands that choose: espalier plan | sensitivity | search."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from espalier.errors import DataError, MissingExtraError
from espalier.graph import capture
from espalier.mapping import (
    Cluster,
    Here,
    LatencyModel,
    Log,
    Processes,
    Proposal,
    Sensitivity,
    Space,
    Targets,
    Trial,
    Workers,
    best,
    check,
    explain,
    final,
    latency_model,
    mean_error,
    measure_sensitivity,
    propose,
    search,
    space_of,
    study,
)
from espalier.mapping.candidates import find
from espalier.mapping.damage import Damage
from espalier.mapping.picture import draw_sensitivity, draw_trials
from espalier.mapping.search import FINALISTS
from espalier.planning import QUICK_IMAGES, SHORT, OneShot, begun, on_split, print_proposal
from espalier.report import screen, tell
from espalier.sparsity import Plan
from espalier.train import Data, Recipe, build, example_shape, load_data, load_weights


def plan_command(
    model: str,
    data: str = "",
    speedup: float | None = None,
    latency_ms: float | None = None,
    size_mb: float | None = None,
    macs: float | None = None,
    max_drop: float | None = None,
    threads: int = 1,
    beta: float = 0.2,
    sensitivity: str | None = None,
    weights: str | None = None,
    data_root: str | None = None,
    images: int = QUICK_IMAGES,
    check_model: bool = False,
    out: str = "plan.toml",
) -> None:
    """Choose scheme, block and density for every layer under targets, by rule and without training.

    Args:
        model: a name of the zoo, or package.module:factory
        data: digits, mnist, cifar10 and so on: how sensitive layers are is read on its held-out images; may be left out
        speedup: times faster than the dense network on the engine
        latency_ms: milliseconds of one sample, at most
        size_mb: 10^6 bytes of stored weights, at most
        macs: useful multiply-accumulates, at most; below 1 a share of the dense ones
        max_drop: points of accuracy, as predicted (roughly); alone, the fastest plan that keeps to it
        threads: that the latency is meant for
        beta: how much slower than coarse structured pruning a smaller block may be
        sensitivity: a file that `espalier sensitivity` wrote, instead of reading it on a few images
        weights: safetensors file of the network's weights
        data_root: the folder of the data set's files
        images: held-out images to read sensitivities on
        check_model: check the latency model against whole networks, and print its mean error
        out: the plan file to write
    """
    console, file = screen(), _place(out)  # before time is spent
    targets = Targets(speedup, latency_ms, size_mb, macs, max_drop)
    network, loaded, example = _network(model, data, data_root, weights)
    graph = capture(network, example)
    latency = latency_model(graph, threads=threads, tell=_teller(console))
    found = propose(
        network,
        example,
        targets,
        evaluate=on_split(loaded.holdout, images) if loaded else None,
        harms=Sensitivity.load(sensitivity).harms() if sensitivity else None,
        threads=threads,
        beta=beta,
        latency=latency,
        tell=_teller(console),
    )
    _save(found.plan, file)
    print_proposal(found, console)
    for site in found.choices:
        tell(console, explain(found.plan, site))
    if check_model:
        _print_check(latency, graph, found, console)
    tell(console, f"written to {out}; use it by: espalier compress {model} --plan {out}")


def sensitivity_command(
    model: str,
    data: str = "",
    weights: str | None = None,
    data_root: str | None = None,
    images: int | None = None,
    schemes: str = "",
    out: str = "sensitivity.json",
    picture: str | None = None,
) -> None:
    """Measure accuracy and loss against density for every layer and scheme, on held-out images, without retraining.

    Args:
        model: a name of the zoo, or package.module:factory
        data: digits, mnist, cifar10, cifar100, folder:PATH and so on
        weights: safetensors file of the network's weights
        data_root: the folder of the data set's files
        images: held-out images to use; default: all
        schemes: comma-separated, such as column,block_punched; default: every one that a layer can take
        out: the JSON file; stopped at any moment, the same command goes on from there
        picture: the picture to draw (.png, .svg, .pdf); default: beside the JSON file, where matplotlib is installed
    """
    console = screen()
    network, loaded, example = _scorable("sensitivity", model, data, data_root, weights)
    names = [name.strip() for name in schemes.split(",") if name.strip()]
    found = measure_sensitivity(
        capture(network, example),
        network,
        on_split(loaded.holdout, images),
        out,
        schemes=names,
        tell=_teller(console),
    )
    title, target = f"{model} on {loaded.name}, held out", picture or Path(out).with_suffix(".png")
    drawn = _drawn(lambda: draw_sensitivity(found, target, title), asked=picture is not None)
    tell(console, f"{len(found.points)} points in {out}{drawn}")


def search_command(
    model: str,
    data: str = "",
    speedup: float | None = None,
    latency_ms: float | None = None,
    trials: int = 64,
    sampler: Literal["policy", "tpe", "nsga2"] = "policy",
    epochs: int = 1,
    images: int | None = None,
    finalists: int = FINALISTS,
    final_epochs: int = 3,
    workers: int = 1,
    ray_address: str = "",
    threads: int = 1,
    weights: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    out: str = "search",
    recipe: Recipe | None = None,
) -> None:
    """Search scheme, block and density for every layer by trials: pruned in one shot, retrained briefly, scored.

    Args:
        model: a name of the zoo, or package.module:factory
        data: digits, mnist, cifar10, cifar100, folder:PATH and so on
        speedup: times faster than the dense network on the engine
        latency_ms: or milliseconds of one sample, at most
        trials: of this search; those that stand in the folder already count
        sampler: policy (policy gradient with the target in its reward), tpe or nsga2 (optuna, for the whole front)
        epochs: of retraining in a trial
        images: of the training set that a trial uses; default: all
        finalists: how many of the best trials, and the rule's plan, are retrained for longer before one is taken
        final_epochs: of their retraining, on the whole training set
        workers: processes on this machine
        ray_address: of a Ray cluster to run trials on instead: host:port, auto or local
        threads: that the latency is meant for
        weights: safetensors file of the dense network's weights
        data_root: the folder of the data set's files
        seed: of the choices
        out: the folder for trials.jsonl and plan.toml; stopped at any moment, the same command goes on from there
        recipe: how a trial retrains
    """
    console, targets = screen(), Targets(speedup, latency_ms)
    if targets.empty:
        raise DataError("a search needs a latency to aim at: give --speedup 3 or --latency-ms 5")
    say = _teller(console)
    network, loaded, example = _scorable("search", model, data, data_root, weights)
    graph = capture(network, example)
    latency = latency_model(graph, threads=threads, tell=say)
    folder, space = Path(out), space_of(latency, Damage(graph.tensors, latency.layers))
    asked = " ".join(f"{name} {value:g}" for name, value in targets.told().items())
    rule = partial(propose, network, example, targets, threads=threads, latency=latency, tell=say)
    named, scored = f"{model} {weights or ''} {asked} on {threads} threads", on_split(loaded.holdout, QUICK_IMAGES)
    plan, limit = begun(folder / "rule.json", named, partial(rule, evaluate=scored))
    say(f"asked: {asked}, which is {limit:.4g} ms by the table")
    start = space.nearest(plan.resolve(graph.sites()), limit)
    root = None if data_root is None else str(Path(data_root).resolve())
    score = OneShot(model, data, weights and str(Path(weights).resolve()), root, epochs, images, recipe or SHORT)
    told = _trial_teller(console)
    with _workers(workers, ray_address) as where:
        shared: dict[str, Any] = {"start": start, "workers": where, "tell": told}
        known = _searched(space, score, folder, sampler, limit, trials=trials, seed=seed, **shared)
        taken = best(known, limit)
        if finalists:
            longer, finals = replace(score, epochs=final_epochs, images=None), folder / f"finals-{final_epochs}.jsonl"
            tell(console, f"the {finalists} best, and the rule's plan, are retrained for {final_epochs} epochs")
            taken = final(space, longer, finals, known, limit_ms=limit, count=finalists, **shared)
    plan = space.plan(taken.picked)
    _tell_found(console, known, taken, plan, folder, f"{model}: the front of {len(known)} trials")


def _tell_found(console: Console, known: Sequence[Trial], taken: Trial, plan: Plan, folder: Path, title: str) -> None:
    """The trial that was taken: its plan in a file, the others around it in a picture."""
    _save(plan, folder / "plan.toml")
    drawn = _drawn(lambda: draw_trials(known, folder / "front.png", title))
    found = f"{taken.accuracy:.2f} % held out at {taken.latency_ms:.4g} ms by the table"
    tell(console, f"best of {len(known)} trials: {found}; written to {folder / 'plan.toml'}{drawn}")


def _searched(
    space: Space,
    score: OneShot,
    folder: Path,
    sampler: Literal["policy", "tpe", "nsga2"],
    limit: float,
    **shared: Any,
) -> list[Trial]:
    """All trials of the folder, once the search has added to them."""
    file = folder / "trials.jsonl"
    if sampler == "policy":
        search(space, score, file, limit_ms=limit, **shared)
    else:
        study(space, score, file, sampler=sampler, **shared)
    return space.timed(Log(file, space.name).trials)


MAPPING_COMMANDS: dict[str, Any] = {
    "plan": plan_command,
    "sensitivity": sensitivity_command,
    "search": search_command,
}


def _network(
    model: str, data: str, root: str | None, weights: str | None
) -> tuple[nn.Module, Data | None, torch.Tensor]:
    if data and weights is None and ":" not in model:
        raise DataError(f"{model} would have random weights, whose accuracy says nothing: give --weights FILE")
    loaded = load_data(data, root) if data else None
    network = build(model, classes=loaded.classes if loaded else None).eval()
    if weights is not None:
        load_weights(network, weights)
    return network, loaded, torch.zeros(1, *(loaded.shape if loaded else example_shape(model)))


def _scorable(
    command: str, model: str, data: str, root: str | None, weights: str | None
) -> tuple[nn.Module, Data, torch.Tensor]:
    """As `_network`, for a command that needs data."""
    network, loaded, example = _network(model, data, root, weights)
    if loaded is None:
        raise DataError(f"{command} needs data: --data cifar10")
    return network, loaded, example


def _workers(count: int, ray_address: str) -> AbstractContextManager[Workers]:
    """Where trials run: on a Ray cluster, in processes of this machine, or here."""
    if ray_address:
        return nullcontext(Cluster(ray_address))
    return Processes(min(count, os.cpu_count() or 1)) if count > 1 else nullcontext(Here())


def _place(out: str) -> Path:
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: the folder cannot be made: {error.strerror}") from error
    return path


def _save(plan: Plan, path: Path) -> None:
    try:
        plan.save(path)
    except (OSError, ValueError) as error:  # ValueError: no name for a file
        raise DataError(f"{path}: the plan cannot be written: {error}") from error


def _drawn(draw: Callable[[], Path], asked: bool = False) -> str:
    """Where the picture is, as the end of a sentence; without matplotlib it is left out unless it was asked for."""
    try:
        return f", drawn in {draw()}"
    except MissingExtraError as error:
        if asked:
            raise
        return f"; no picture: {error}"


def _teller(console: Console) -> Any:
    return lambda text: tell(console, text, style="dim")


def _trial_teller(console: Console) -> Any:
    def told(trial: Trial) -> None:
        text = f"trial {trial.number}: {trial.accuracy:.2f} % at {trial.latency_ms:.4g} ms, {trial.seconds:.0f} s"
        tell(console, text)

    return told


def _print_check(latency: LatencyModel, graph: Any, found: Proposal, console: Console) -> None:
    """The plan, the dense network, and every scheme alone at two densities."""
    sites = graph.sites()
    chosen = found.plan.resolve(sites)
    plans: dict[str, Any] = {"dense": {}, "the plan": chosen}
    for label in dict.fromkeys(c for s in latency.layers for c in latency.candidates(s)):
        for density in (0.4, 0.15):
            alone = {s: c for s, c in _alone(latency, label, density).items() if s in sites}
            plans[f"{label}, {density}"] = alone
    rows = check(latency, graph, plans)
    table = Table(title=f"latency model against whole networks: mean error {mean_error(rows):.1%}")
    for heading in ("plan", "predicted ms", "measured ms", "error"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for row in rows:
        table.add_row(row.plan, f"{row.predicted_ms:.4g}", f"{row.measured_ms:.4g}", f"{row.error:+.1%}")
    console.print(table)


def _alone(latency: LatencyModel, label: str, density: float) -> dict[str, Any]:
    return {s: find(label).at(density) for s in latency.layers if label in latency.candidates(s)}
