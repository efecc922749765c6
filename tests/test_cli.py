"""The command line as a user meets it: the whole way, wrong input, Ctrl-C, resuming."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import espalier as es
from espalier.cli import COMMANDS, main
from espalier.cli_options import written

QUICK = ["--density", "0.2", "--epochs", "6", "--dense-epochs", "4", "--recipe.batch_size", "64", "--seed", "1"]


COMPRESS = [sys.executable, "-m", "espalier.cli", "compress", "lenet_digits", "--data", "digits", *QUICK]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # equal threads everywhere: sums depend on how they are divided


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    subprocess.run([*COMPRESS, "--out", str(out)], env=ALONE, check=True)
    return out


def test_the_whole_way_leaves_what_it_says(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    dense, small = report["dense"], report["compressed"]
    assert small["nonzero"] <= 0.2 * dense["weights"] * 1.02 and small["file_bytes"] < dense["file_bytes"] / 3
    assert small["accuracy"] > 80 and report["achieved"]["density"] == small["nonzero"] / dense["weights"]
    assert set(report["latency_ms"]["compressed"]) == {"torch", "torch_spread", "engine", "engine_spread"}
    assert report["machine"]["cpu"] and report["phases"]["purified"] > 0
    assert es.Plan.load(finished / "plan.toml").entries
    program = es.load(finished / "model.esp")
    assert program(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_info_run_and_bench(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(finished / "model.esp")
    assert main(["info", file]) == 0
    assert "conv1.weight" in capsys.readouterr().out
    x = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    assert main(["run", file, "--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]) == 0
    want = es.load(file).to_module()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, rtol=1e-4, atol=1e-4)
    assert main(["bench", file, "--against", "torch", "--rounds", "3"]) == 0
    assert main(["bench", "lenet5", "--density", "0.1", "--rounds", "3"]) == 0
    assert "espalier" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["compress", "resnet20a", "--data", "digits", "--density", "0.5"], "did you mean 'resnet20'"),
        (["compress", "nowhere.nets:make", "--data", "digits", "--density", "0.5"], "nowhere"),
        (["compress", "lenet_digits", "--data", "digit", "--density", "0.5"], "digits"),
        (["compress", "lenet_digits", "--data", "mnist", "--data-root", "/nowhere", "--density", "0.5"], "idx"),
        (["compress", "lenet_digits", "--density", "0.5"], "--data"),
        (
            ["compress", "lenet_digits", "--data", "digits", "--density", "0.5", "--scheme", "filtr"],
            "did you mean 'filter'",
        ),
        (
            ["compress", "lenet_digits", "--data", "digits", "--density", "0.5", "--method", "admn"],
            "did you mean 'admm'",
        ),
        (["compress", "lenet_digits", "--data", "digits", "--density", "1.5"], "density"),
        (["compress", "lenet_digits", "--data", "digits"], "either density"),
        (["compress", "lenet_digits", "--data", "digits", "--nonzero", "0"], "nonzero is 0: how many"),
        (["compress", "lenet_digits", "--data", "digits", "--recipe.batch_size", "0"], "batch_size is 0, expected"),
        (
            ["compress", "lenet_digits", "--data", "digits", "--density", "0.5", "--method-options", '{"foo": 3}'],
            "unknown option of method magnitude 'foo': Known: ramp",
        ),
        (["plan", "lenet_digits", "--macs", "-1"], "macs is -1.0"),
        (["compress", "lenet_digits", "--data", "digits", "--plan", "none.toml"], "cannot be read"),
        (["compress", "lenet_digits", "--data", "digits", "--density", "0.5", "--weights", "none.st"], "none.st"),
        (
            ["compress", "lenet5", "--data", "digits", "--density", "0.5"],
            "on inputs of [1, 1, 8, 8]",
        ),
        (["info", "nowhere.esp"], "cannot be read"),
        (["run", "nowhere.esp", "--input", "x.npy", "--output", "y.npy"], "cannot be read"),
        (["bench", "lenet5", "--against", "tensort"], "unknown rival"),
        (["bench", "lenet5", "--threads", "0"], "--threads is 0, expected 1 or more"),
        (["bench", "lenet5", "--rounds", "-1"], "--rounds is -1"),
        (["compress", "lenet_digits", "--data", "digits", "--density", "0.5", "--epochs", "-1"], "epochs is -1"),
        (["compress", "lenet_digits", "--data", "digits", "--density", "0.5", "--threads", "-1"], "threads is -1"),
        (["compress", "lenet_digits", "--data", "digits", "--density", "0.5", "--out", "/dev/null/a"], "cannot write"),
    ],
)
def test_wrong_input_is_told(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def test_wrong_shapes_and_damaged_files(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    data = (finished / "model.esp").read_bytes()
    (tmp_path / "cut.esp").write_bytes(data[: len(data) // 2])
    (tmp_path / "x.txt").write_text("no array")
    np.savez(tmp_path / "x.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(tmp_path / "wide.npy", np.zeros((1, 1, 8, 8)))
    np.save(tmp_path / "right.npy", np.zeros((1, 1, 8, 8), np.float32))
    output = ["--output", str(tmp_path / "y.npy")]
    file = str(finished / "model.esp")
    for arguments, message in (
        (["run", file, "--input", str(tmp_path / "x.npy"), *output], "expected"),
        (["run", file, "--input", str(tmp_path / "x.txt"), *output], "npy"),
        (["run", file, "--input", str(tmp_path / "x.npz"), *output], "holds several arrays (a, b)"),
        (["run", file, "--input", str(tmp_path / "wide.npy"), *output], "expected float32, got float64"),
        (["run", file, "--input", str(tmp_path / "right.npy"), "--output", str(tmp_path)], "cannot be written"),
        (["run", file], "--input"),
        (["info", str(tmp_path / "cut.esp")], "cut off"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "y.npy").exists()


def test_a_finished_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", "lenet_digits", "--data", "digits", "--out", str(finished), *QUICK]
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--epochs", "7"]) == 2
    assert "epochs (was 6, now 7)" in capsys.readouterr().err


@pytest.mark.parametrize("blow,status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_to_the_same_end(finished: Path, tmp_path: Path, blow: int, status: int) -> None:
    command = [*COMPRESS, "--out", "again"]
    first = subprocess.Popen(command, cwd=tmp_path, env=ALONE, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("shape 2/"):
            break
    time.sleep(0.05)
    first.send_signal(blow)
    told = first.stderr.read()
    assert first.wait(60) == status
    if blow == signal.SIGINT:
        assert "--resume" in told and "Traceback" not in told
    second = subprocess.run([*command, "--resume"], cwd=tmp_path, env=ALONE, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "dense 1/" not in second.stderr
    ours, theirs = (es.load(path / "model.esp").graph.tensors for path in (tmp_path / "again", finished))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_options_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: lenet_digits\ndata: digits\ndensity: 0.3\nscheme: weight\nmethod: magnitude\nepochs: 2\n"
        f"dense_epochs: 1\nout: {tmp_path / 'out'}\nrecipe:\n  batch_size: 64\n"
    )
    assert main(["compress", "--config", str(config)]) == 0
    assert "weight" in (tmp_path / "out" / "plan.toml").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_writes_options_as_the_readme_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and told.startswith(f"usage: espalier {command} [options]")
    names = [name for name, p in inspect.signature(COMMANDS[command]).parameters.items() if p.default is not p.empty]
    assert all(f"--{name.replace('_', '-')}" in told for name in names)
    assert not re.search(r"--\w*_", told) and "null" not in told


def test_the_help_names_every_scheme_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    words = set(re.findall(r"\w+", capsys.readouterr().out))
    assert {*es.CATALOG, *es.METHODS} <= words


def test_options_are_told_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compress", "lenet5", "--max-drop", "much"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "max" in told and len(told.splitlines()) < 6
    for option, value, problem in (
        ("--density", "nan", " is nan, expected float"),
        ("--latency-ms", "soon", " is soon, expected float"),
        ("--strategy", "dp", " is dp, expected 'auto', 'ddp', 'fsdp'"),
        ("--recipe.lr", "inf", " is inf, expected float"),
        ("--recipe.epoch", "3", ": there is no such option"),
    ):
        with pytest.raises(SystemExit):
            main(["compress", "lenet5", option, value])
        assert capsys.readouterr().err.endswith(f"error: {option}{problem}\n")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"espalier {es.__version__}\n"


def test_flags_need_no_value() -> None:
    def command(resume: bool = False, max_drop: float = 1.0) -> None: ...

    def made(*given: str) -> list[str]:
        return written(given, [command])

    assert made("--resume", "--max-drop", "0.5") == ["--resume=true", "--max_drop", "0.5"]
    assert made("--resume", "false") == ["--resume", "false"] and made("--resume=false") == ["--resume=false"]
    assert made("--out=a-b", "c-d") == ["--out=a-b", "c-d"]


def test_folders_of_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, long paths are not broken, letters may be any."""
    out = tmp_path / ("[red] äß " + "long " * 30)
    options = ["--epochs", "1", "--dense-epochs", "0", "--density", "0.5", "--method", "magnitude"]
    assert main(["compress", "lenet_digits", "--data", "digits", *options, "--out", str(out)]) == 0
    assert f"written to {out}: model.esp" in capsys.readouterr().out
    assert main(["info", str(out / "model.esp")]) == 0
    told = capsys.readouterr().out
    assert "takes: x float32[N, 1, 8, 8]" in told and "conv and linear weights are not zero" in told


def test_without_epochs_the_choice_is_made_at_once(tmp_path: Path) -> None:
    for method in ("magnitude", "admm"):
        made = es.compress(
            "lenet_digits", "digits", out=tmp_path / method, density=0.3, epochs=0, dense_epochs=0, method=method
        )
        assert made.report["achieved"]["density"] < 0.32, method
