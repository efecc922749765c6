"""The rule: its decisions one by one, targets met in the clock's terms, reasons that stay with the plan."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import espalier as es
from espalier.errors import PlanError, UnknownNameError
from espalier.mapping import LatencyModel, latency_model, propose
from espalier.mapping.allocate import Options, Unreachable, allocate
from espalier.mapping.candidates import Candidate, find, ladder
from espalier.mapping.damage import Damage, Harm, errors
from espalier.mapping.latency import Curve
from espalier.mapping.layers import layers
from espalier.mapping.probe import Probe
from espalier.mapping.rules import DENSITIES, FLOOR, LOWEST, NARROWED, RELEASED, ROUNDS, Rule, plan_of
from espalier.mapping.targets import Cost, Targets, size_mb
from espalier.runtime.cache import Shelf
from tests.mapping.clocks import CountingClock, Net, example


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def model(net: Net, tmp_path_factory: pytest.TempPathFactory) -> LatencyModel:
    shelf = Shelf("latency", {"test": 1}, tmp_path_factory.mktemp("cache"))
    return latency_model(es.capture(net, example()), clock=CountingClock(), shelf=shelf)


def asked(net: Net, model: LatencyModel, **targets: float) -> "es.mapping.Proposal":
    return propose(net, example(), Targets(**targets), latency=model, clock=CountingClock())


# -- the decision list ------------------------------------------------------------------------------


def test_what_is_spared(net: Net, model: LatencyModel) -> None:
    made = asked(net, model, speedup=1.3)
    dense = {site for site, choice in made.choices.items() if choice.candidate is None}
    assert {"deep.weight", "stem.weight", "fc.weight"} <= dense
    assert "a.weight" not in dense or "b.weight" not in dense
    for site, why in (("deep", "depthwise"), ("stem", "first"), ("fc", "last")):
        assert why in es.explain(made.plan, site)


def test_spared_layers_are_released_when_the_target_needs_them(net: Net, model: LatencyModel) -> None:
    most = asked(net, model, speedup=1.2)
    hard = asked(net, model, speedup=0.99 * most.dense.latency_ms / most.least.latency_ms)
    stem = hard.choices["stem.weight"]
    assert stem.candidate is not None and stem.density >= RELEASED - 1e-9 and "released" in stem.why


def test_what_is_released_in_which_round(net: Net, model: LatencyModel) -> None:
    """First what is sensitive, then the channels of depthwise convs, at last densities below the floor."""
    rule = Rule(model, Damage(es.capture(net, example()).tensors, model.layers))
    seen = set()
    for limit in np.linspace(0.97 * model.dense_ms, 1.001 * rule.least()[0], 60):
        limits = {"latency_ms": float(limit)}
        round, choices = rule.round(limits), rule.choose(limits)
        seen.add(round)
        pruned = {site: choice.density for site, choice in choices.items() if choice.candidate}
        assert "stem.weight" not in pruned or round >= 2
        assert "deep.weight" not in pruned or round >= 3
        assert all(d >= FLOOR - 1e-9 for d in pruned.values()) or round == ROUNDS[-1]
        assert all(d >= LOWEST - 1e-9 for d in pruned.values())
    assert {2, 3, 4} <= seen
    assert all(m.candidate for m in rule.choose({"latency_ms": 1.001 * float(rule.least()[0])}).values())


def test_a_depthwise_conv_loses_channels_with_what_is_around_it(net: Net, model: LatencyModel) -> None:
    graph = es.capture(net, example())
    probe = Probe(graph, model.layers)
    assert probe.narrowing() == ["deep.weight"]
    half = {"deep.weight": find("filter").at(0.5)}
    shapes = {name: tuple(tensor.shape) for name, tensor in probe.variant(half).tensors.items()}
    assert shapes["deep.weight"] == (8, 1, 3, 3) and shapes["b.weight"] == (8, 16, 3, 3)
    assert shapes["point.weight"] == (64, 8, 1, 1) and shapes["a.weight"] == (16, 16, 3, 3)
    assert model.predict(half) == pytest.approx(model.dense_ms - model.dense["deep.weight"] / 2)


def test_a_depthwise_conv_whose_channels_are_the_answer_stays(tmp_path: Path) -> None:
    graph = es.capture(torch.nn.Conv2d(8, 8, 3, groups=8), torch.zeros(1, 8, 6, 6))
    made = latency_model(graph, clock=CountingClock(), shelf=Shelf("latency", {"test": 1}, tmp_path))
    assert made.candidates("weight") == ()
    assert Rule(made, Damage(graph.tensors, made.layers)).spared(ROUNDS[-1])["weight"].name == "no gain"


def test_a_plan_is_measured_with_the_masks_of_its_own_weights(net: Net, model: LatencyModel) -> None:
    graph = es.capture(net, example())
    chosen = {"a.weight": find("weight").at(0.3), "point.weight": find("filter").at(0.25)}
    made = Probe(graph, model.layers).variant(chosen, own=True)
    kept = chosen["a.weight"].project(net.a.weight.detach()) != 0
    assert torch.equal(made.tensors["a.weight"] != 0, kept)
    assert not torch.equal(made.tensors["a.weight"], net.a.weight)
    assert made.tensors["point.weight"].shape == (16, 16, 1, 1) and made.tensors["fc.weight"].shape == (10, 16)


def test_the_smallest_block_within_beta(net: Net, model: LatencyModel) -> None:
    """Hand-made times: halving from rung to rung, columns as fast as the last but one."""
    found = layers(es.capture(net, example()))
    rungs = [c for c in ladder(found["a.weight"])]
    times = dict(zip([c.label for c in rungs], (8.0, 6.0, 5.5, 4.0, 2.2, 2.1, 1.9, 2.0, 2.5)))
    curves = {("a.weight", label): Curve(np.array([0.01, 1.0]), np.array([ms, ms])) for label, ms in times.items()}
    hand = LatencyModel({"a.weight": found["a.weight"]}, {"a.weight": 9.0}, curves, 0.0, 0.0, 1, 1)
    damage = Damage({"a.weight": net.a.weight}, found)
    chosen = {beta: Rule(hand, damage, beta=beta).block("a.weight", 0.2).label for beta in (0.0, 0.07, 0.2, 1.5, 4.0)}
    assert chosen == {
        0.0: "block_punched m=16 n=4",
        0.07: "block_punched m=8 n=4",
        0.2: "block_punched m=8 n=1",
        1.5: "block_punched m=4 n=1",
        4.0: "weight",
    }
    assert Rule(hand, damage, beta=2.2).block("a.weight", 0.3).label == "pattern+kernel"
    assert Rule(hand, damage, beta=2.2).block("a.weight", 0.6).label == "block_punched m=2 n=1"  # above its ceiling


def test_a_layer_that_gains_nothing_stays_dense(net: Net) -> None:
    found = layers(es.capture(net, example()))
    curves = {("a.weight", "column"): Curve(np.array([0.01, 1.0]), np.array([3.0, 3.0]))}
    hand = LatencyModel({"a.weight": found["a.weight"]}, {"a.weight": 2.0}, curves, 0.0, 0.0, 1, 1)
    assert Rule(hand, Damage({"a.weight": net.a.weight}, found)).spared()["a.weight"].name == "no gain"


def test_reasons_survive_the_file(net: Net, model: LatencyModel, tmp_path: Path) -> None:
    made = asked(net, model, speedup=1.5).plan
    made.save(tmp_path / "plan.toml")
    again = es.Plan.load(tmp_path / "plan.toml")
    assert es.explain(again, "b.weight") == es.explain(made, "b") and "smallest block" in es.explain(again, "b")
    with pytest.raises(UnknownNameError, match=r"fc\.weight"):
        es.explain(made, "fd.weight")
    assert "no reason" in es.explain(es.Plan.uniform("filter", 0.5), "b.weight")


# -- targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.0])
def test_a_speedup_is_met_by_measurement(net: Net, model: LatencyModel, speedup: float) -> None:
    made = asked(net, model, speedup=speedup)
    assert made.measured_speedup == pytest.approx(speedup, rel=0.05)
    graph = es.capture(net, example())
    assert model.predict(made.plan.resolve(graph.sites())) == pytest.approx(made.predicted.latency_ms)


def test_a_table_that_is_off_is_corrected(net: Net, model: LatencyModel) -> None:
    """Pruned layers take 20 % longer in the network than the table says."""
    clock = CountingClock()

    def slower(graphs, threads):
        whole, cut = clock(graphs, threads)
        return [whole, type(cut)(cut.steps, 1.2 * cut.whole_ms)]

    wanted = 1.5
    made = propose(net, example(), Targets(speedup=wanted), latency=model, clock=slower)
    assert made.measured_speedup == pytest.approx(wanted, rel=0.05)
    assert made.predicted.latency_ms < 0.9 * made.dense.latency_ms / wanted
    assert made.limit_ms == pytest.approx(made.dense.latency_ms / wanted / 1.2, rel=0.02)  # what a search keeps to
    assert asked(net, model, macs=0.5).limit_ms is None


def test_a_table_that_jumps_is_corrected_from_both_sides(net: Net, model: LatencyModel) -> None:
    """Up to a density the engine is much faster than the table says, beyond it slower: proportion alone would swing."""
    clock = CountingClock()

    def jumpy(graphs, threads):
        whole, cut = clock(graphs, threads)
        share = cut.whole_ms / whole.whole_ms
        return [whole, type(cut)(cut.steps, cut.whole_ms * (0.7 if share < 0.65 else 1.1))]

    made = propose(net, example(), Targets(speedup=2.2), latency=model, clock=jumpy)
    assert made.measured_speedup == pytest.approx(2.2, rel=0.05)


def test_a_network_that_died_in_one_shot_is_stepped_away_from(net: Net, model: LatencyModel) -> None:
    """Cut further than to half of its time it is measured at next to nothing: proportion would lead back to dense."""
    clock, seen = CountingClock(), list[float]()

    def dying(graphs, threads):
        whole, cut = clock(graphs, threads)
        share = cut.whole_ms / whole.whole_ms
        seen.append(share)
        return [whole, type(cut)(cut.steps, 0.02 * whole.whole_ms if share < 0.5 else 0.85 * cut.whole_ms)]

    made = propose(net, example(), Targets(speedup=2.2), latency=model, clock=dying)
    assert seen[0] < 0.5 and max(seen) < 0.8
    assert made.measured_speedup == pytest.approx(2.2, rel=0.05)


def test_several_targets_at_once(net: Net, model: LatencyModel) -> None:
    made = asked(net, model, speedup=1.5, macs=0.3, size_mb=0.012)
    assert made.predicted.latency_ms <= made.dense.latency_ms / 1.5 * 1.03
    assert made.predicted.macs <= 0.3 * made.dense.macs and made.predicted.size_mb <= 0.012
    sites = es.capture(net, example()).sites()
    others = sum(p.numel() for p in net.parameters()) - sum(site.weights for site in sites.values())
    assert size_mb(sites, made.plan.resolve(sites), others) == pytest.approx(made.predicted.size_mb)


def test_out_of_reach_says_what_is_reachable(net: Net, model: LatencyModel) -> None:
    told: list[str] = []
    why = r"latency_ms: asked .*, reachable .*at least: .* depthwise convs, .* other steps and the call, .* lowest"
    with pytest.raises(Unreachable, match=why) as error:
        propose(net, example(), Targets(speedup=500), latency=model, clock=CountingClock(), tell=told.append)
    assert error.value.least["latency_ms"] > 0 and "reachable" in told[0]
    with pytest.raises(PlanError, match="ask for something"):
        asked(net, model)
    with pytest.raises(PlanError, match="needs held-out data"):
        asked(net, model, max_drop=0.5)


def test_the_bound_is_the_least(net: Net, model: LatencyModel) -> None:
    rule = Rule(model, Damage(es.capture(net, example()).tensors, model.layers))
    total, *parts = [float(number) for number in re.findall(r"(?:^|[:,] )([0-9.e-]+) ", rule.bounds())]
    assert total == pytest.approx(rule.least()[0], rel=0.01) == pytest.approx(sum(parts), rel=0.01)
    near = max(d for d in DENSITIES if d < 1.06 * NARROWED)
    assert parts[0] == pytest.approx(near * model.dense["deep.weight"], rel=0.03)


def test_targets_that_exclude_each_other_are_told() -> None:
    """Each can be met alone: the one by the first option, the other by the second."""
    table = {"a": Options(np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([0.0, 1.0]))}
    with pytest.raises(Unreachable, match="each can be met alone"):
        allocate(table, ["ms", "mb"], np.zeros(2), np.array([1.5, 1.5]))


def test_another_limit_that_takes_more_is_not_corrected(net: Net, model: LatencyModel) -> None:
    """The size asks for so much that the latency comes out far below: nothing is to be tried again."""
    told: list[str] = []
    target = Targets(speedup=1.05, macs=0.12)
    made = propose(net, example(), target, latency=model, clock=CountingClock(), tell=told.append)
    assert made.predicted.macs <= 0.12 * made.dense.macs and sum("corrected" in line for line in told) <= 1


def test_a_predicted_drop_above_the_allowed_one_is_told(net: Net, model: LatencyModel) -> None:
    harms = {site: [Harm(1.0, 5.0, 90.0)] for site in es.capture(net, example()).sites()}
    for allowed, warned in ((0.01, True), (50.0, False)):
        told: list[str] = []
        target = Targets(speedup=1.8, max_drop=allowed)
        propose(net, example(), target, latency=model, harms=harms, clock=CountingClock(), tell=told.append)
        assert any("may be lost" in line for line in told) == warned


@pytest.mark.parametrize("beta", [-0.1, float("nan")])
def test_an_impossible_beta(net: Net, model: LatencyModel, beta: float) -> None:
    with pytest.raises(PlanError, match="beta"):
        propose(net, example(), Targets(speedup=2), latency=model, clock=CountingClock(), beta=beta)


@pytest.mark.parametrize("wrong", [{"speedup": 0.5}, {"latency_ms": 0}, {"macs": -1}, {"size_mb": float("nan")}])
def test_impossible_targets(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=r"speedup|latency_ms|macs|size_mb"):
        Targets(**wrong)


def test_limits_take_the_stricter() -> None:
    assert Targets(speedup=2, latency_ms=3).limits(Cost(10, 1, 1)) == {"latency_ms": 3}
    assert Targets(speedup=5, latency_ms=3).limits(Cost(10, 1, 1)) == {"latency_ms": 2}
    assert Targets(macs=5e6).limits(Cost(10, 1, 1e9)) == {"macs": 5e6}


def test_a_drop_alone_finds_the_fastest_that_is_allowed(net: Net, model: LatencyModel) -> None:
    sites = es.capture(net, example()).sites()
    harms = {site: [Harm(0.5, 1.0, 20.0), Harm(1.0, 2.0, 60.0)] for site in sites}
    speeds = []
    for drop in (0.5, 2.0, 8.0):
        made = propose(net, example(), Targets(max_drop=drop), latency=model, harms=harms, clock=CountingClock())
        assert made.predicted_drop is not None and made.predicted_drop <= drop
        speeds.append(made.dense.latency_ms / made.predicted.latency_ms)
    assert speeds == sorted(speeds) and speeds[2] > speeds[0]


def test_what_was_measured_as_sensitive_is_pruned_less(net: Net, model: LatencyModel) -> None:
    sites = es.capture(net, example()).sites()
    harms = {s: [Harm(1.0, 1.0, 1.0)] for s in sites}
    target = Targets(speedup=1.8)
    for sensitive in ("a.weight", "b.weight"):
        table = {**harms, sensitive: [Harm(1.0, 50.0, 50.0)]}
        made = propose(net, example(), target, latency=model, harms=table, clock=CountingClock(), verify=False)
        other = {"a.weight": "b.weight", "b.weight": "a.weight"}[sensitive]
        assert made.choices[sensitive].density > made.choices[other].density


def test_a_network_without_weights_is_told(model: LatencyModel) -> None:
    with pytest.raises(PlanError, match="no conv or linear weight"):
        propose(torch.nn.ReLU(), torch.zeros(1, 4), Targets(macs=0.5), clock=CountingClock())


def test_names_that_look_like_globs(tmp_path: Path) -> None:
    odd = torch.nn.Sequential()
    odd.add_module("[ab]*?", torch.nn.Linear(32, 64))
    odd.add_module("schön", torch.nn.Linear(64, 5))
    graph = es.capture(odd, torch.zeros(1, 32))
    model = latency_model(graph, clock=CountingClock(), shelf=Shelf("latency", {"test": 1}, tmp_path))
    made = propose(graph, None, Targets(macs=0.5), latency=model, clock=CountingClock()).plan
    assert "[ab]*?.weight" in es.Plan.from_toml(made.to_toml()).resolve(graph.sites())


# -- allocation -------------------------------------------------------------------------------------


def test_allocation_is_near_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = {}
        for site in "abcd":
            costs = np.sort(rng.uniform(0.1, 1, 5))[::-1]
            damage = np.cumsum(np.sort(rng.uniform(0, 1, 5)))
            table[site] = Options(costs[:, None], damage - damage[0])
        limit = np.array([sum(0.6 * t.costs[0, 0] + 0.4 * t.costs[-1, 0] for t in table.values())])
        picked = allocate(table, ["ms"], np.zeros(1), limit)
        ours = sum(table[s].damage[k] for s, k in picked.items())
        assert sum(table[s].costs[k, 0] for s, k in picked.items()) <= limit[0] * (1 + 1e-6)
        best = min(
            sum(table[s].damage[k] for s, k in zip("abcd", ks))
            for ks in np.ndindex(5, 5, 5, 5)
            if sum(table[s].costs[k, 0] for s, k in zip("abcd", ks)) <= limit[0]
        )
        assert ours <= 1.6 * best + 1e-9


# -- damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["weight", "column", "filter", "block_punched m=8 n=4", "pattern+kernel"])
def test_errors_are_those_of_the_projection(label: str) -> None:
    torch.manual_seed(0)
    w, candidate = torch.randn(32, 16, 3, 3), find(label)
    at = [min(d, candidate.ceiling) for d in (0.4, 0.25, 0.1)]
    for density, error in zip(at, errors(candidate, w, 1, at)):
        left = (w - candidate.at(density).fit(w).project(w)).square().sum() / w.square().sum()
        assert error == pytest.approx(float(left), abs=0.02)


@pytest.mark.parametrize("label", ["weight", "column", "block_column m=4"])
def test_errors_of_large_weights_are_those_of_some_rows(label: str) -> None:
    torch.manual_seed(0)
    w, candidate = torch.randn(2048, 1024) * torch.rand(2048, 1) * torch.rand(1024), find(label)
    for density, error in zip((0.4, 0.1), errors(candidate, w, 1, [0.4, 0.1])):
        left = (w - candidate.at(density).fit(w).project(w)).square().sum() / w.square().sum()
        assert error == pytest.approx(float(left), abs=0.02)


def test_errors_of_nothing() -> None:
    assert errors(Candidate("filter"), torch.zeros(4, 4), 1, [0.5, 0.1]).tolist() == [0.0, 0.0]


def test_plans_of_choices_resolve(net: Net, model: LatencyModel) -> None:
    made = asked(net, model, speedup=1.7)
    sites = es.capture(net, example()).sites()
    schemes = plan_of(made.choices).resolve(sites)
    assert set(schemes) == {s for s, c in made.choices.items() if c.candidate}
