"""The whole way by two processes: the masks of one, files by the first only, errors told, stopped and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import espalier as es

COMMAND = [sys.executable, "-m", "espalier.cli", "compress", "lenet_digits", "--data", "digits", "--accelerator", "cpu"]
QUICK = ["--density", "0.2", "--epochs", "4", "--dense-epochs", "2", "--recipe.batch_size", "64", "--max-drop", "20"]
# One choice: where there are many, each can turn on the last bit of a sum.
QUICK += ["--method", "magnitude", "--method-options", '{"ramp": "jump"}']
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *QUICK, *options], cwd=folder, env=ALONE, capture_output=True, text=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    done = run(folder, "--out", "out")
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_two_processes_come_to_what_one_does(one: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "--out", "out", "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dense against compressed") == 1, "the first process alone tells the end"
    two = tmp_path / "out"
    assert sorted(p.name for p in two.rglob("*")) == sorted(p.name for p in one.rglob("*"))
    ours, theirs = (torch.load(path / "work" / "shape.pt", weights_only=True)["run"] for path in (two, one))
    for site, mask in theirs["masks"].items():
        assert torch.equal(ours["masks"][site], mask), site
    report, expected = (json.loads((path / "report.json").read_text()) for path in (two, one))
    assert report["compressed"]["nonzero"] == pytest.approx(expected["compressed"]["nonzero"], rel=0.1)
    assert report["phases"]["shaped"] == pytest.approx(expected["phases"]["shaped"], abs=1.0)
    assert report["phases"]["purify"]["removed"], "nothing was purified: a weak test"
    assert es.load(two / "model.esp")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    before = (two / "model.esp").read_bytes()
    (two / "work" / "retrain.pt").unlink()  # as if it had been stopped there
    again = run(tmp_path, "--out", "out", "--devices", "2", "--resume")
    assert again.returncode == 0 and "shape 1/" not in again.stderr
    assert (two / "model.esp").read_bytes() == before


def test_an_error_ends_both(one: Path) -> None:
    done = run(one.parent, "--out", "out", "--devices", "2")
    assert done.returncode != 0 and "--resume" in done.stderr and "Traceback" not in done.stderr
