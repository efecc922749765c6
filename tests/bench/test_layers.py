"""The table that says where the time goes, and what is made of it."""

import json
import logging
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import espalier as es
from espalier.cli import main
from espalier.errors import DataError
from espalier.report.picture import Bar, svg, write_picture
from espalier.runtime import layers, peak_gflops, rival


def test_every_step_is_timed_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 64, 5)
    )
    with torch.no_grad():
        model[2].weight[4:] = 0
    x = torch.randn(2, 3, 10, 10)
    program = es.compile(model.eval(), x, threads=1)
    rows = layers(program, x, rounds=5)
    assert [row.step for row in rows] == [row.step for row in program.describe()]
    assert sum(row.share for row in rows) == pytest.approx(1)
    work = {row.step: row.useful_gflops * row.time_ms * 1e6 for row in rows}
    assert work["conv2d"] == pytest.approx(2 * 2 * (16 * 3 * 9) * 100)
    assert work["conv2d_1"] == pytest.approx(2 * 2 * (4 * 16 * 9) * 64)  # zero weights are no useful work
    assert work["linear"] == pytest.approx(2 * 2 * 8 * 64 * 5)
    conv = next(row for row in rows if row.step == "conv2d_1")
    assert conv.density == pytest.approx(0.5) and conv.format and 0 < conv.peak_share < 1.5


def test_products_of_activations_count_as_work() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.transpose(1, 2)).cumsum(1)

    x = torch.randn(1, 32, 8)
    rows = {row.kernel.split("/")[0]: row for row in layers(es.compile(Product(), x, threads=1), x, rounds=3)}
    assert rows["matmul"].useful_gflops * rows["matmul"].time_ms * 1e6 == pytest.approx(2 * 32 * 32 * 8)
    assert rows["torch"].time_ms > 0


def test_the_peak_is_that_of_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {}
    for isa in (row.name for row in es.runtime.isas() if row.supported):
        monkeypatch.setenv("ESPALIER_ISA", isa)
        speeds[isa] = peak_gflops(1)
    assert all(1 < speed < 2000 for speed in speeds.values())
    assert max(speeds, key=lambda name: speeds[name]) != "baseline" or len(speeds) == 1
    assert peak_gflops(0) == 0


def test_bench_writes_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, picture = tmp_path / "bench.json", tmp_path / "bench.html"
    given = ["bench", "lenet5", "--density", "0.2", "--rounds", "2", "--against", "torch"]
    assert main([*given, "--json", str(data), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed and "where the time goes" in printed
    report = json.loads(data.read_text())
    assert set(report["timings"]) == {"espalier", "espalier, uncut", "torch"}
    assert report["facts"]["threads"] == 1 and report["peak_gflops"] > 1
    assert {"step", "time_ms", "share", "useful_gflops", "peak_share", "format", "reason"} <= set(report["layers"][0])
    slowest = max(report["layers"], key=lambda row: row["time_ms"])
    assert slowest["step"] in picture.read_text()
    assert main(["bench", "lenet5", "--rounds", "1", "--picture", str(tmp_path / "bench.bmp")]) == 2
    assert main(["bench", "lenet5", "--rounds", "1", "--json", str(tmp_path / "nowhere" / "bench.json")]) == 2


def test_pictures_are_sound(tmp_path: Path) -> None:
    drawn = svg([("a < b", [Bar("x & y", 2.0, '"2"', 1.0), Bar("z", 0.0)]), ("empty", [])])
    root = ElementTree.fromstring(drawn)
    bars = [float(e.attrib["width"]) for e in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars[0] > bars[1] > 0
    with pytest.raises(DataError, match=r"\.svg or \.html"):
        write_picture(tmp_path / "x.png", drawn)


def test_exporting_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rival("onnxruntime")(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(1, 3, 8, 8), 1)()
    captured = capfd.readouterr()
    assert captured.out + captured.err == "" and not caplog.records
    assert logging.root.manager.disable == 0
