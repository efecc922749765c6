"""Timing: what is known comes out, and in turns."""

import json
import platform
import time

import pytest

from espalier.runtime import Timing, bench, machine


def busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


@pytest.mark.alone
def test_known_times_come_out() -> None:
    made = bench({"short": lambda: busy(0.001), "long": lambda: busy(0.004)}, rounds=7)
    assert list(made) == ["short", "long"]
    for name, expected in (("short", 1.0), ("long", 4.0)):
        timing = made[name]
        assert expected <= timing.median_ms < 3 * expected
        assert timing.low_ms <= timing.median_ms <= timing.high_ms and timing.rounds == 7
        assert timing.spread_ms == timing.high_ms - timing.low_ms


@pytest.mark.alone
def test_cores_are_those_that_work() -> None:
    made = bench({"busy": lambda: busy(0.002), "asleep": lambda: time.sleep(0.002)}, rounds=5)
    assert made["busy"].cores <= 1.1 and made["asleep"].cores < 0.6 * made["busy"].cores


def test_candidates_take_turns_and_are_called_once_before_each_measurement() -> None:
    order: list[str] = []
    bench({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=6, seconds=0, warm_up=2)
    assert order[:6] == ["a"] * 3 + ["b"] * 3
    rounds = [order[k : k + 4] for k in range(6, len(order), 4)]
    assert len(rounds) == 6 and all(r in (["a", "a", "b", "b"], ["b", "b", "a", "a"]) for r in rounds)
    assert len({tuple(r) for r in rounds}) == 2


def test_what_cannot_be_timed() -> None:
    assert bench({}) == {}
    with pytest.raises(ValueError, match="0 rounds"):
        bench({"x": lambda: None}, rounds=0)
    with pytest.raises(ZeroDivisionError):
        bench({"x": lambda: 1 / 0})


def test_facts_name_no_host() -> None:
    facts = machine()
    assert {"cpu", "cores", "isa", "system", "python", "torch", "numpy"} <= set(facts)
    assert platform.node() not in json.dumps(facts) and "/" not in str(facts["cpu"])
    assert Timing(1.0, 0.5, 1.5, 3).spread_ms == 1.0
