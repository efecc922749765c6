"""Search-based mapping: plans are tried, pruned in one shot and briefly retrained, and the choice learns from it.

    reward = accuracy - price * (latency above the target, in per cent)

`search` is the policy gradient; `study` the same space as an optuna study. Both keep their trials in one file, each
as it ends: a search that was killed goes on where it was, choosing what it would have chosen, and one that is over
serves another target by `best`, or starts from what is known.

Source: arXiv 2111.11581 (search-based mapping by policy gradient). Price, population and the policy are our reading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from espalier.errors import MissingExtraError, UnknownNameError
from espalier.mapping.policy import Policy
from espalier.mapping.space import Space
from espalier.mapping.trials import Log, Trial, best, ranked
from espalier.mapping.workers import Here, Workers
from espalier.sparsity import Plan

PRICE = 1.0  # points of accuracy for every per cent of latency above the target
POPULATION = 8
FINALISTS = 4
_PRIME = 1_000_003

Score = Callable[[Plan], float]
"""Accuracy in points, on held-out data, of the network pruned by a plan in one shot and briefly retrained."""
Sampler = Literal["tpe", "nsga2"]


@dataclass(frozen=True)
class Timed:
    """A score with the seconds that it took; sent to workers."""

    score: Score

    def __call__(self, plan: Plan) -> tuple[float, float]:
        start = time.monotonic()
        return self.score(plan), time.monotonic() - start


def search(
    space: Space,
    score: Score,
    file: str | Path,
    *,
    limit_ms: float,
    trials: int,
    start: Sequence[int] | None = None,
    workers: Workers | None = None,
    population: int = POPULATION,
    price: float = PRICE,
    seed: int = 0,
    tell: Callable[[Trial], None] = lambda _: None,
) -> Trial:
    """The best plan for a latency after so many trials of this search (those that stand in `file` already count).

    start: a choice that is known to be good, such as the rule's (`space.nearest`): it is tried first, and the policy
        begins near it. What the policy emits is brought to the limit before it is tried (`space.fitted`), so that
        trials differ in what they lose and not in what they take (our reading).
    population: trials between two updates of the policy; they may run in parallel.
    workers: where trials run. seed: of the policy and its choices.

    Trials of other searches in the file, for another target or by a study, are learnt from before the first one.
    Raises DataError when the file belongs to another space, and what `score` raises; finished trials are kept.

    >>> found = search(space, score, "trials.jsonl", limit_ms=2.0, trials=64, workers=Processes(4))
    >>> plan = space.plan(found.picked)
    """
    log, run = Log(file, space.name), f"policy {limit_ms:.6g} {seed} {population} {price:g}"
    policy = Policy(space, seed, limit_ms, start)
    tried = space.timed(log.trials)
    learnt = [(t.picked, t.reward(limit_ms, price)) for t in tried if t.run != run]
    for first in range(0, len(learnt), population):
        _learn(policy, learnt[first : first + population], learnt[:first])
    done = {t.number: t for t in tried if t.run == run}
    for first in range(0, trials, population):
        numbers = range(first, min(first + population, trials))
        emitted = {n: _pick(policy, seed, n, start) for n in numbers}
        fitted = {n: space.fitted(picked, limit_ms) for n, picked in emitted.items()}
        if start is not None and 0 in fitted:
            fitted[0] = tuple(start)
        wanted = [(n, fitted[n]) for n in numbers if n not in done]
        for trial in _tried(space, score, wanted, "policy", run, workers or Here()):
            log.add(trial)
            done[trial.number] = trial
            tell(trial)
        batch = [(emitted[n], done[n].reward(limit_ms, price)) for n in numbers]
        _learn(policy, batch, learnt)
        learnt += batch
    return best(space.timed(log.trials), limit_ms, price)


def final(
    space: Space,
    score: Score,
    file: str | Path,
    tried: Sequence[Trial],
    *,
    limit_ms: float,
    start: Sequence[int] | None = None,
    count: int = FINALISTS,
    workers: Workers | None = None,
    price: float = PRICE,
    tell: Callable[[Trial], None] = lambda _: None,
) -> Trial:
    """The best of the `count` best trials and of `start`, scored once more.

    A trial retrains briefly, and its score says little about small differences: the most promising ones meet again
    under a `score` that trains for longer. Their scores stand in `file`, another than that of the search; those that
    are there already are not made again. Our reading.

    >>> found = final(space, longer, "finals.jsonl", space.timed(Log("trials.jsonl", space.name).trials), limit_ms=2.0)
    """
    log = Log(file, space.name)
    known = {t.picked: t for t in space.timed(log.trials)}
    hopeful = [tuple(start)] if start is not None else []
    hopeful += [t.picked for t in ranked(tried, limit_ms, price)]
    chosen = list(dict.fromkeys(hopeful))[: count + (start is not None)]
    wanted = [(len(known) + k, picked) for k, picked in enumerate(p for p in chosen if p not in known)]
    for trial in _tried(space, score, wanted, "final", "final", workers or Here()):
        log.add(trial)
        known[trial.picked] = trial
        tell(trial)
    return best([known[picked] for picked in chosen], limit_ms, price)


def study(
    space: Space,
    score: Score,
    file: str | Path,
    *,
    trials: int,
    sampler: Sampler = "nsga2",
    start: Sequence[int] | None = None,
    workers: Workers | None = None,
    population: int = POPULATION,
    seed: int = 0,
    tell: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:
    """All trials of a space after an optuna study of accuracy against latency has added to them; see `front`.

    trials: of this sampler, those in `file` already included. Everything in the file is told to the study first.
    Raises MissingExtraError without optuna; else as `search`.
    """
    if sampler not in _SAMPLERS:
        raise UnknownNameError("sampler", sampler, _SAMPLERS)
    optuna = _optuna()
    log, run = Log(file, space.name), f"{sampler} {seed}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(
        directions=["maximize", "minimize"], sampler=_SAMPLERS[sampler](optuna, seed, population)
    )
    names = [f"{k} {site}" for k, site in enumerate(space.sites)]
    ranges = {
        name: optuna.distributions.CategoricalDistribution(list(range(len(each))))
        for name, each in zip(names, space.options)
    }
    for trial in space.timed(log.trials):
        made.add_trial(
            optuna.trial.create_trial(
                params=dict(zip(names, trial.picked)),
                distributions=ranges,
                values=[trial.accuracy, trial.latency_ms],
            )
        )
    if start is not None and not log.trials:
        made.enqueue_trial(dict(zip(names, start)))
    number = sum(1 for t in log.trials if t.run == run)
    while number < trials:
        asked = [made.ask(ranges) for _ in range(min(population, trials - number))]
        wanted = [(number + k, tuple(int(a.params[n]) for n in names)) for k, a in enumerate(asked)]
        for trial in _tried(space, score, wanted, sampler, run, workers or Here()):
            log.add(trial)
            made.tell(asked[trial.number - number], [trial.accuracy, trial.latency_ms])
            tell(trial)
        number += len(asked)
    return space.timed(log.trials)


_SAMPLERS: dict[str, Callable[[Any, int, int], Any]] = {
    "tpe": lambda optuna, seed, size: optuna.samplers.TPESampler(seed=seed, n_startup_trials=size),
    "nsga2": lambda optuna, seed, size: optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, size)),
}


def _optuna() -> Any:
    try:
        import optuna  # here: an optional extra that takes its time, which few need
    except ImportError as error:
        raise MissingExtraError("optuna", "search") from error
    return optuna


def _pick(policy: Policy, seed: int, number: int, start: Sequence[int] | None) -> tuple[int, ...]:
    """The choice of a trial: the same whenever the policy is the same, however often the search was broken off."""
    if number == 0 and start is not None:
        return tuple(start)
    return policy.sample(torch.Generator().manual_seed(seed * _PRIME + number))


_Learnt = tuple[tuple[int, ...], float]  # what the policy emitted, and its reward


def _learn(policy: Policy, batch: Sequence[_Learnt], before: Sequence[_Learnt]) -> None:
    """One update by a population, and the best of what came before it: what was good is not forgotten (our reading)."""
    elite = sorted(before, key=lambda each: each[1], reverse=True)[: len(batch) // 2]
    together = [*batch, *elite]
    if len(together) > 1:
        policy.learn([picked for picked, _ in together], [reward for _, reward in together])


def _tried(
    space: Space, score: Score, wanted: Sequence[tuple[int, tuple[int, ...]]], source: str, run: str, workers: Workers
) -> Iterator[Trial]:
    """Trials as they end."""
    plans = [space.plan(picked) for _, picked in wanted]
    for index, (accuracy, seconds) in workers.run(Timed(score), plans):
        number, picked = wanted[index]
        yield Trial(source, run, number, picked, float(accuracy), space.latency_ms(picked), seconds)
