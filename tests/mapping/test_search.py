"""Search: it finds what is known to be best, goes on bit for bit after a kill, and serves another target."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import espalier as es
from espalier.errors import DataError, MissingExtraError, TrainingError, UnknownNameError
from espalier.mapping import (
    Cluster,
    Here,
    LatencyModel,
    Log,
    Processes,
    Space,
    best,
    final,
    front,
    search,
    space_of,
    study,
)
from espalier.mapping.latency import Curve
from espalier.mapping.layers import layers
from espalier.mapping.picture import draw_front
from espalier.mapping.space import Option

SITES = tuple("abcdef")


def toy() -> Space:
    """Six layers with three choices each; dense takes 1 ms, so the fastest network takes 2.4."""
    options = (Option(None, 1.0, 1.0), Option("weight", 0.5, 0.8), Option("column", 0.2, 0.4))
    return Space(SITES, (options,) * len(SITES), 0.0)


@dataclass(frozen=True)
class Table:
    """What each choice loses: columns are harmless in a, b and c only. `pause`, `die`: for the tests of killing."""

    pause: float = 0.0
    die: str = ""

    def __call__(self, plan: es.Plan) -> float:
        time.sleep(self.pause)
        if self.die and not Path(self.die).exists():
            Path(self.die).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        lost = 0.0
        for entry in plan.entries:
            name = entry.scheme.name if entry.scheme else "dense"
            lost += {"dense": 0.0, "weight": 0.5, "column": 0.2 if entry.match in "abc" else 4.0}[name]
        return 92.0 - lost


def test_the_policy_finds_the_best_plan(tmp_path: Path) -> None:
    found = search(toy(), Table(), tmp_path / "t.jsonl", limit_ms=4.25, trials=160)
    assert found.latency_ms <= 4.25 and found.accuracy >= 92 - 1.1 - 1e-9  # the best there is loses 0.6
    rewards = [t.reward(4.25, 1.0) for t in Log(tmp_path / "t.jsonl", toy().name).trials]
    assert np.mean(rewards[-40:]) > np.mean(rewards[:40]) + 5
    schemes = toy().plan(found.picked).entries
    assert {e.match for e in schemes if e.scheme and e.scheme.name == "column"} <= set("abc")


def test_it_is_at_least_as_good_as_where_it_starts(tmp_path: Path) -> None:
    start = (2, 2, 2, 0, 0, 0)
    found = search(toy(), Table(), tmp_path / "t.jsonl", limit_ms=4.25, trials=3, start=start)
    assert found.picked == start and Log(tmp_path / "t.jsonl", toy().name).trials[0].number == 0


@pytest.mark.parametrize("among", [12, 300])
def test_it_begins_near_its_start_however_much_there_is_to_choose(among: int, tmp_path: Path) -> None:
    """What it tries takes what was asked, and loses little more than where it starts; what is worse is hardly tried."""
    at = np.linspace(0.05, 0.9, among)
    good = [Option("column", float(d), 0.2 + 2 * float(d), float((1 - d) ** 2)) for d in at]
    poor = [Option("filter", float(d), 0.2 + 2 * float(d), float(1 - d**2)) for d in at]
    options = (Option(None, 1.0, 3.0, 0.0), *good, *poor)
    space = Space(tuple("abcdefghij"), (options,) * 10, 0.0)
    start = (1 + among // 3,) * 10
    limit = space.latency_ms(start)

    def lost(picked: Sequence[int]) -> float:
        return sum(options[k].damage for k in picked)

    search(space, lambda plan: 50.0, tmp_path / "t.jsonl", limit_ms=limit, trials=24, start=start)
    trials = Log(tmp_path / "t.jsonl", space.name).trials
    assert trials[0].picked == start and len({t.picked for t in trials}) > 20
    assert all(0.9 * limit < t.latency_ms <= limit + 1e-9 for t in trials)
    assert np.median([lost(t.picked) for t in trials]) < 1.25 * lost(start) < lost([k + among for k in start])
    assert np.mean([k > among for t in trials for k in t.picked]) < 0.15


def test_the_policy_learns_which_layers_are_sensitive(tmp_path: Path) -> None:
    """All lose equally much by the table, but the network suffers from the first three only; scores are noisy."""
    at = np.geomspace(0.9, 0.05, 24)
    options = (Option(None, 1.0, 1.0), *(Option("column", float(d), 0.1 + 0.9 * d, float((1 - d) ** 2)) for d in at))
    space, noise = Space(tuple("abcdef"), (options,) * 6, 0.0), np.random.default_rng(0)

    def score(plan: es.Plan) -> float:
        density = {e.match: e.scheme.density if e.scheme else 1.0 for e in plan.entries}
        return 90 - sum(4 * (1 - density[s]) ** 2 for s in "abc") + float(noise.normal(0, 0.3))

    start = (12,) * 6
    found = search(space, score, tmp_path / "t.jsonl", limit_ms=space.latency_ms(start), trials=96, start=start)
    kept = [options[k].density for k in found.picked]
    assert np.mean(kept[:3]) > 1.3 * options[12].density > 1.6 * np.mean(kept[3:])


def test_the_finalists_meet_again_under_a_better_score(tmp_path: Path) -> None:
    space, asked = toy(), []
    tried = [
        es.mapping.Trial("policy", "r", k, picked, accuracy, space.latency_ms(picked))
        for k, (picked, accuracy) in enumerate(
            [((2, 2, 2, 0, 0, 0), 80.0), ((2, 2, 2, 0, 1, 0), 90.0), ((0,) * 6, 95.0), ((2, 2, 2, 1, 1, 1), 70.0)]
        )
    ]

    def score(plan: es.Plan) -> float:
        asked.append(plan)
        return Table()(plan) - (5 if len(asked) == 1 else 0)  # the start does badly

    def found(count: int) -> es.mapping.Trial:
        start = (2, 2, 1, 1, 0, 0)
        return final(space, score, tmp_path / "f.jsonl", tried, limit_ms=4.25, start=start, count=count)

    first = found(2)
    assert len(asked) == 3 and first.picked == tried[0].picked and first.accuracy == Table()(space.plan(first.picked))
    assert found(2) == first and len(asked) == 3  # those that were scored are not scored again
    assert found(3).picked == first.picked and len(asked) == 4
    assert final(space, score, tmp_path / "g.jsonl", tried[2:3], limit_ms=4.25).picked == tried[2].picked


def test_a_plan_becomes_a_choice_that_keeps_to_the_limit() -> None:
    options = (Option(None, 1.0, 1.0), *(Option("column", d, d) for d in (0.5, 0.3, 0.2)), Option("weight", 0.5, 0.7))
    space = Space(("a", "b"), (options, options), 0.1)
    schemes = {"a": es.scheme("column", 0.42), "b": es.scheme("column", 0.27)}
    assert space.nearest(schemes) == [1, 2] and space.latency_ms([1, 2]) == pytest.approx(0.9)
    assert space.nearest(schemes, 0.85) == [1, 3] and space.nearest(schemes, 0.65) == [2, 3]
    assert space.nearest(schemes, 0.01) == [3, 3] and space.nearest({"a": es.scheme("filter", 0.3)}) == [0, 0]


def test_a_choice_is_brought_to_a_latency() -> None:
    """All its layers alike, and no further than it keeps to the limit; what has one density only stays."""
    densities = (0.8, 0.4, 0.2, 0.1)
    options = (Option(None, 1.0, 1.0), *(Option("column", d, d) for d in densities), Option("weight", 0.5, 0.7))
    space = Space(tuple("abc"), (options,) * 3, 0.1)
    assert space.fitted((1, 1, 5), 1.5) == (3, 2, 5) and space.latency_ms((3, 2, 5)) == pytest.approx(1.4)
    assert space.fitted((4, 4, 5), 3.0) == (1, 1, 5) and space.fitted((0, 0, 0), 1.0) == (0, 0, 0)
    assert space.fitted((1, 1, 1), 0.01) == (4, 4, 4)
    for limit in (0.5, 0.91, 1.31, 2.01):
        for picked in ((1, 1, 1), (4, 1, 2), (4, 4, 4)):
            fit = space.fitted(picked, limit)
            assert space.latency_ms(fit) <= limit and fit == space.fitted(fit, limit)
            raised = [k for k in range(3) if fit[k] > 1]  # nothing more would fit
            assert all(space.latency_ms([f - (j == k) for j, f in enumerate(fit)]) > limit - 1e-9 for k in raised)


def test_a_finished_search_serves_another_target(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    search(toy(), Table(), file, limit_ms=4.25, trials=120)
    trials = Log(file, toy().name).trials
    easier = best(trials, 5.0)
    assert easier.latency_ms <= 5.0 and easier.accuracy >= best(trials, 4.25).accuracy
    known = search(toy(), Table(), file, limit_ms=3.2, trials=16)
    fresh = search(toy(), Table(), tmp_path / "u.jsonl", limit_ms=3.2, trials=16)
    assert known.reward(3.2, 1) >= fresh.reward(3.2, 1)
    assert len(Log(file, toy().name).trials) == 136


def test_trials_outlive_the_table_that_they_were_made_with(tmp_path: Path) -> None:
    """Measured anew, everything takes twice as long, and a column more than dense: the trials still serve."""
    file, tables = tmp_path / "t.jsonl", []
    layer = layers(es.capture(torch.nn.Linear(32, 32), torch.zeros(1, 32)))
    for column, dense in ((0.4, 1.0), (2.2, 2.0)):
        curve = Curve(np.array([0.05, 1.0]), np.array([column, column]))
        tables.append(LatencyModel(layer, {"weight": dense}, {("weight", "column"): curve}, 0.0, 0.0, 1, 1))
    first, second = (space_of(table, densities=(0.5, 0.2)) for table in tables)
    found = search(first, lambda plan: 90.0 if plan.entries[0].scheme is None else 80.0, file, limit_ms=0.5, trials=8)
    assert found.picked != (0,) and first.name == second.name
    again = search(second, Table(), file, limit_ms=2.1, trials=0)
    assert again.picked == (0,) and again.latency_ms == 2.0


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_study_finds_the_front(tmp_path: Path, sampler: str) -> None:
    file = tmp_path / "t.jsonl"
    study(toy(), Table(), file, trials=30, sampler=sampler, start=(0,) * 6)
    trials = study(toy(), Table(), file, trials=70, sampler=sampler)
    assert len(trials) == 70
    edge = front(trials)
    assert edge[-1].accuracy == 92.0 and edge[0].latency_ms < 4.5
    assert all(a.latency_ms < b.latency_ms and a.accuracy < b.accuracy for a, b in pairwise(edge))


def test_searches_learn_from_each_other(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    study(toy(), Table(), file, trials=24, sampler="tpe")
    search(toy(), Table(), file, limit_ms=4.25, trials=8)
    assert [t.source for t in Log(file, toy().name).trials].count("tpe") == 24
    with pytest.raises(UnknownNameError, match="sampler"):
        study(toy(), Table(), file, trials=1, sampler="grid")  # type: ignore[arg-type]


# -- what is kept -----------------------------------------------------------------------------------

SCRIPT = """
import sys
from tests.mapping.test_search import Table, toy
from espalier.mapping import search
search(toy(), Table(pause=0.02), sys.argv[1], limit_ms=4.25, trials=24, population=4)
"""


def _told(file: Path) -> list[tuple]:
    return [(t.number, t.picked, t.accuracy) for t in Log(file, toy().name).trials]


def test_killed_and_resumed_it_chooses_what_it_would_have_chosen(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    search(toy(), Table(), whole, limit_ms=4.25, trials=24, population=4)
    running = subprocess.Popen([sys.executable, "-c", SCRIPT, str(broken)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not broken.exists() or broken.read_bytes().count(b"\n") < 7:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.005)
    running.kill()
    running.wait()
    before = _told(broken)
    assert 6 <= len(before) < 24
    search(toy(), Table(), broken, limit_ms=4.25, trials=24, population=4)
    assert _told(broken) == _told(whole) and _told(broken)[: len(before)] == before


def test_a_last_line_that_was_cut_off_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    search(toy(), Table(), file, limit_ms=4.25, trials=8)
    data = file.read_bytes()
    file.write_bytes(data[:-20])
    assert len(Log(file, toy().name).trials) == 7
    search(toy(), Table(), file, limit_ms=4.25, trials=8)
    assert _told(file) == _told(file) and len(_told(file)) == 8


def test_files_that_are_no_trials(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    Log(file, "another")
    with pytest.raises(DataError, match="another network"):
        search(toy(), Table(), file, limit_ms=4.25, trials=1)
    file.write_text(json.dumps({"space": toy().name}) + '\n{"source": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        Log(file, toy().name)
    with pytest.raises(DataError, match="no trial"):
        best([], 1.0)
    with pytest.raises(DataError, match="cannot be kept"):
        Log("/dev/null/t.jsonl", "x")


# -- where trials run -------------------------------------------------------------------------------


def test_processes_do_what_one_does_and_one_that_dies_loses_no_trial(tmp_path: Path) -> None:
    search(toy(), Table(), tmp_path / "a.jsonl", limit_ms=4.25, trials=8, population=4)
    score = Table(die=str(tmp_path / "died"))
    with Processes(2) as workers:
        search(toy(), score, tmp_path / "b.jsonl", limit_ms=4.25, trials=8, population=4, workers=workers)
        with pytest.raises(ValueError, match="this job"):
            list(workers.run(_fails, [0]))
    assert (tmp_path / "died").exists()
    assert sorted(_told(tmp_path / "a.jsonl")) == sorted(_told(tmp_path / "b.jsonl"))


def _dies(_job: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fails(_job: int) -> None:
    raise ValueError("this job")


def test_work_that_always_kills_its_process_is_an_error() -> None:
    with pytest.raises(TrainingError, match="fewer workers"):
        list(Processes(1, tries=1).run(_dies, [0]))


def test_errors_of_the_work_come_through() -> None:
    with pytest.raises(ValueError, match="this job"):
        list(Here().run(_fails, [0]))


def test_a_cluster_that_loses_a_machine_loses_no_trial(tmp_path: Path) -> None:
    """Two workers of a local Ray cluster; one is killed in the middle of its trials."""
    import ray  # only here: importing it takes seconds
    from ray.cluster_utils import Cluster as Local

    local = Local(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [local.add_node(num_cpus=1, include_dashboard=False) for _ in range(2)]
    seen: list[int] = []

    def kill_one(trial) -> None:
        seen.append(trial.number)
        if len(seen) == 2:
            local.remove_node(nodes[0], allow_graceful=False)

    try:
        workers = Cluster(local.address)
        found = search(
            toy(), Table(pause=0.3), tmp_path / "t.jsonl", limit_ms=4.25, trials=8, workers=workers, tell=kill_one
        )
        search(toy(), Table(), tmp_path / "alone.jsonl", limit_ms=4.25, trials=8)
        assert sorted(_told(tmp_path / "t.jsonl")) == sorted(_told(tmp_path / "alone.jsonl"))
        assert found.accuracy > 0 and sorted(seen) == list(range(8))
        with pytest.raises(ValueError, match="this job"):
            list(workers.run(_fails, [0]))
    finally:
        ray.shutdown()
        local.shutdown()


@pytest.mark.parametrize("extra", ["ray", "optuna", "matplotlib.figure"])
def test_an_extra_that_is_missing_is_named(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, extra, None)  # importing it raises ImportError
    tasks = {
        "ray": lambda: list(Cluster("local").run(_fails, [0])),
        "optuna": lambda: study(toy(), Table(), tmp_path / "t.jsonl", trials=1),
        "matplotlib.figure": lambda: draw_front({"a": [(1.0, 90.0)]}, tmp_path / "a.png"),
    }
    with pytest.raises(MissingExtraError, match=r"pip install"):
        tasks[extra]()
