"""The latency model: the table is what the clock says, kept, checked, rising; one real measurement."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import espalier as es
from espalier import compiler
from espalier.errors import PlanError, UnknownNameError
from espalier.mapping import cache, check, clock, latency, latency_model, mean_error
from espalier.mapping.candidates import GRID, WINDOWED, find, ladder
from espalier.mapping.clock import Profile
from espalier.mapping.latency import label_of, rising
from espalier.mapping.layers import layers
from espalier.mapping.probe import Probe
from espalier.runtime.cache import Shelf
from tests.mapping.clocks import OVERHEAD, REST, CountingClock, Net, example, step_ms

WHO = {"test": 1}


@pytest.fixture
def graph() -> es.Graph:
    torch.manual_seed(0)
    return es.capture(Net(), example())


def test_the_sum_is_the_network(graph: es.Graph, tmp_path: Path) -> None:
    model = latency_model(graph, clock=CountingClock(), shelf=Shelf("latency", WHO, tmp_path))
    dense = sum(step_ms(torch.ones(site.shape)) for site in graph.sites().values()) + REST + OVERHEAD
    assert model.dense_ms == pytest.approx(dense)
    assert model.rest_ms == pytest.approx(REST) and model.overhead_ms == pytest.approx(OVERHEAD)
    plans = {
        f"{c} {d}": {s: find(c).at(d) for s in ("a.weight", "b.weight")} for c in ("column", "weight") for d in GRID
    }
    rows = check(model, graph, plans, clock=CountingClock())
    assert mean_error(rows) < 0.02 and all(abs(row.error) < 0.1 for row in rows)


def test_a_wrong_table_is_seen_by_the_check(graph: es.Graph, tmp_path: Path) -> None:
    def late(graphs, threads):
        return [Profile(p.steps, 2 * p.whole_ms) for p in CountingClock()(graphs, threads)]

    model = latency_model(graph, clock=CountingClock(), shelf=Shelf("latency", WHO, tmp_path))
    assert mean_error(check(model, graph, {"dense": {}}, clock=late)) > 0.4


def test_steps_that_were_disturbed_are_scaled_to_whole_calls(graph: es.Graph, tmp_path: Path) -> None:
    """Every step seems to take thrice as long in some programs; whole calls, in processor time, do not."""

    def disturbed(graphs, threads):
        profiles = CountingClock()(graphs, threads)
        return [
            Profile({s: ms * (3 if k % 2 else 1) for s, ms in p.steps.items()}, p.whole_ms)
            for k, p in enumerate(profiles)
        ]

    model = latency_model(graph, clock=disturbed, shelf=Shelf("latency", WHO, tmp_path))
    plans = {f"column {d}": {s: find("column").at(d) for s in ("a.weight", "b.weight")} for d in GRID}
    assert mean_error(check(model, graph, {"dense": {}, **plans}, clock=CountingClock())) < 0.1


def test_a_step_of_several_layers_is_shared(graph: es.Graph) -> None:
    found = layers(graph)
    a, b = (found[f"{name}.weight"].nodes[0] for name in "ab")
    spent, rest = Probe(graph, found).attribute(Profile({f"{a}+{b}/tile": 4.0, f"{a}/phases": 1.0, "else": 0.5}, 6.0))
    assert (spent["a.weight"], spent["b.weight"], rest) == (3.0, 2.0, 0.5)


def test_what_stands_is_not_measured_again(graph: es.Graph, tmp_path: Path) -> None:
    first, again = CountingClock(), CountingClock()
    one = latency_model(graph, clock=first, shelf=Shelf("latency", WHO, tmp_path))
    two = latency_model(graph, clock=again, shelf=Shelf("latency", WHO, tmp_path))
    assert first.graphs > 10 and again.graphs == 0
    assert one.dense_ms == two.dense_ms and one.layer_ms("a.weight", "column", 0.2) == two.layer_ms(
        "a.weight", "column", 0.2
    )
    other = CountingClock()  # of the same shapes in another order: its rest is measured, its layers are not
    shorter = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 3, padding=1))
    latency_model(es.capture(shorter, example()), clock=other, shelf=Shelf("latency", WHO, tmp_path))
    assert 0 < other.graphs < first.graphs


def test_large_networks_are_measured_in_parts(graph: es.Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = latency_model(graph, clock=CountingClock(), shelf=Shelf("latency", WHO, tmp_path / "a"))
    sizes: list[int] = []
    told: list[str] = []
    clock = CountingClock()

    def counting(graphs, threads):
        sizes.append(len(graphs))
        return clock(graphs, threads)

    monkeypatch.setattr(latency, "PROGRAMS", 2 * sum(site.weights for site in graph.sites().values()))
    made = latency_model(graph, clock=counting, shelf=Shelf("latency", WHO, tmp_path / "b"), tell=told.append)
    assert (
        max(sizes) == 2 and clock.graphs == len(WINDOWED) * len(GRID) + 3
    )  # the dense network stands in every third slot
    assert len(told) == len(sizes) and "s left" not in told[0] and all("s left" in line for line in told[1:])
    for site in ("a.weight", "point.weight"):
        for density in GRID:
            ours, theirs = (each.layer_ms(site, "column", density) for each in (made, whole))
            assert ours == pytest.approx(theirs, rel=0.02)


def test_time_goes_on_rising_until_it_is_that_of_dense(graph: es.Graph, tmp_path: Path) -> None:
    """Above the densest measurement, in a straight line; where the line lies above dense, the layer is stored dense."""
    assert latency._towards_dense([(0.2, 2.0), (0.45, 4.5)], 6.0) == [(pytest.approx(0.6), 6.0), (1.0, 6.0)]
    for ms in (4.5, 4.0, 30.0):  # no slower than this already; or the line ends below
        assert latency._towards_dense([(0.2, 2.0), (0.45, 4.5)], ms) == [(1.0, ms)]
    assert latency._towards_dense([(0.2, 2.0), (0.45, 2.0)], 6.0) == [(1.0, 6.0)]
    model = latency_model(graph, clock=CountingClock(), shelf=Shelf("latency", WHO, tmp_path))
    at = {d: model.layer_ms("a.weight", "weight", d) for d in (0.3, 0.45, 0.9, 1.0)}
    assert at[0.3] < at[0.45] < at[0.9] <= at[1.0] == model.dense["a.weight"]


def test_a_damaged_cache_is_measured_anew(graph: es.Graph, tmp_path: Path) -> None:
    shelf = Shelf("latency", WHO, tmp_path)
    model = latency_model(graph, clock=CountingClock(), shelf=shelf)
    whole = shelf.path.read_text()
    wrong_rows = json.dumps({"who": WHO, "ms": {"a": "fast"}})
    for text in (whole[: len(whole) // 2], wrong_rows, json.dumps({"who": {}, "ms": {}}), "[]", "\x00"):
        shelf.path.write_text(text)
        clock = CountingClock()
        with pytest.warns(UserWarning, match="not used"):
            again = latency_model(graph, clock=clock, shelf=shelf)
        assert clock.graphs > 10 and again.dense_ms == model.dense_ms
    assert not list(shelf.path.parent.glob("*.part"))


def test_a_folder_that_cannot_be_written_costs_only_a_warning(graph: es.Graph, tmp_path: Path) -> None:
    (tmp_path / "latency").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept|not used"):
        assert latency_model(graph, clock=CountingClock(), shelf=Shelf("latency", WHO, tmp_path)).dense_ms > 0


def test_a_table_is_of_one_engine_one_compiler_and_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path))
    one = cache.shelf(1)
    assert one.path.is_relative_to(tmp_path / "latency") and one.path != cache.shelf(2).path
    assert one.who["engine"] and one.path == cache.shelf(1).path
    copied = tmp_path / "compiler"
    shutil.copytree(Path(compiler.__file__).parent, copied)
    (copied / "blocks.py").write_text("# another compiler")
    monkeypatch.setattr(compiler, "__file__", str(copied / "__init__.py"))
    cache._compiler.cache_clear()
    assert cache.shelf(1).path != one.path
    cache._compiler.cache_clear()


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_rising_is_the_nearest_rising_sequence(values: list[float]) -> None:
    made = rising(np.array(values))
    assert (np.diff(made) >= -1e-9).all() and made.sum() == pytest.approx(sum(values), abs=1e-6)
    assert np.allclose(rising(made), made)


def test_interpolation_rises_where_measurements_do_not(graph: es.Graph, tmp_path: Path) -> None:
    calls = iter(range(10**6))

    def noisy(graphs, threads):
        profiles = CountingClock()(graphs, threads)
        return [
            Profile({k: v * (1 + 0.9 * (next(calls) % 3)) for k, v in p.steps.items()}, p.whole_ms) for p in profiles
        ]

    model = latency_model(graph, clock=noisy, shelf=Shelf("latency", WHO, tmp_path))
    for site in model.layers:
        for label in model.candidates(site):
            ms = [model.layer_ms(site, label, d) for d in np.linspace(0.01, find(label).ceiling, 60)]
            assert (np.diff(ms) >= 0).all(), (site, label)


def test_layers_and_ladders(graph: es.Graph) -> None:
    found = layers(graph)
    assert found["a.weight"].key == found["b.weight"].key != found["stem.weight"].key
    assert [s for s, layer in found.items() if layer.reads_input] == ["stem.weight"]
    assert [s for s, layer in found.items() if layer.answers] == ["fc.weight"]
    assert ladder(found["deep.weight"]) == ()
    assert "pattern+kernel" in [c.label for c in ladder(found["a.weight"])]
    assert "pattern+kernel" not in [c.label for c in ladder(found["point.weight"])]
    assert "filter" not in [c.label for c in ladder(found["fc.weight"])]
    assert label_of(es.scheme("block_punched", 0.3)) == "block_punched m=8 n=4"


def test_an_unmeasured_scheme_is_named(graph: es.Graph, tmp_path: Path) -> None:
    model = latency_model(graph, clock=CountingClock(), shelf=Shelf("latency", WHO, tmp_path))
    with pytest.raises(UnknownNameError, match="measured scheme of a"):
        model.predict({"a.weight": es.scheme("block_punched", 0.3, m=3, n=1)})


def test_the_clock_runs_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever batch it was captured with; a network that was written for one batch size runs that."""
    seen: list[tuple[int, ...]] = []

    def spied(graph: es.Graph, threads: int) -> es.Executable:
        class Spy(es.Executable):
            def _checked(self, inputs, named):
                seen.append(inputs[0].shape)
                return super()._checked(inputs, named)

        return Spy(graph, threads)

    monkeypatch.setattr(clock, "compile", spied)
    clock.engine_clock([es.capture(Net(), example())], 1)
    assert set(seen) == {(1, 3, 12, 12)}
    seen.clear()

    class Wired(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.reshape(3, 8))

    clock.engine_clock([es.capture(Wired(8, 2), torch.zeros(3, 8))], 1)
    assert set(seen) == {(3, 8)}


def test_a_graph_that_is_given_again_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the dense network beside every correction of a plan; its program goes with it."""
    made: list[str] = []

    def counted(graph: es.Graph, threads: int) -> es.Executable:
        made.append(graph.nodes[0].name)
        return es.Executable(graph, threads)

    monkeypatch.setattr(clock, "compile", counted)
    dense, other = es.capture(Net(), example()), es.capture(Net(), example())
    first, again = clock.engine_clock([dense, other], 1), clock.engine_clock([dense], 1)
    assert len(made) == 2 and list(first[0].steps) == list(again[0].steps)
    ids = {id(dense), id(other)}
    kept = {key[0]: programs for key, programs in clock._KEPT.items()}
    assert all(len(set(kept[each])) == clock.COPIES for each in ids)
    del dense, other, kept
    gc.collect()
    assert not ids & {key[0] for key in clock._KEPT}


def test_no_thread_is_told(graph: es.Graph) -> None:
    with pytest.raises(PlanError, match="1 thread or more"):
        latency_model(graph, threads=0, clock=CountingClock())


def test_a_real_measurement(tmp_path: Path) -> None:
    """Of the engine itself, on whatever machine this is: sparse is faster, and the sum is near the whole."""
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3))
    graph = es.capture(wide, torch.zeros(1, 3, 20, 20))
    chosen = [find("column"), find("block_punched m=8 n=1")]
    model = latency_model(graph, threads=1, candidates=lambda _: chosen, shelf=Shelf("latency", WHO, tmp_path))
    assert model.layer_ms("2.weight", "column", 0.05) < 0.7 * model.dense["2.weight"]
    (row,) = check(model, graph, {"a": {"2.weight": find("column").at(0.1)}})
    assert abs(row.error) < 0.6
