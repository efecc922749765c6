"""The folder of a run: what is finished is kept, and whatever goes wrong there is told with what to do."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from espalier.errors import TrainingError
from espalier.train import checkpoint
from espalier.workspace import Workspace

STATE = {"model": {"w": torch.arange(3.0)}, "score": 1.5}


def test_a_phase_is_done_once(tmp_path: Path) -> None:
    count = []

    def work() -> dict[str, Any]:
        count.append(1)
        return STATE

    first = Workspace(tmp_path, {"seed": 1}, resume=False).phase("dense", work)
    again = Workspace(tmp_path, {"seed": 1}, resume=True).phase("dense", work)
    assert len(count) == 1 and torch.equal(first["model"]["w"], again["model"]["w"]) and again["score"] == 1.5
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["dense.pt"]


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = {"scheme_options": {"widths": (1, 2)}, "density": 0.1, "plan": None}
    Workspace(tmp_path, settings, resume=True)
    Workspace(tmp_path, settings, resume=True)
    with pytest.raises(TrainingError, match=r"density \(was 0.1, now 0.2\)"):
        Workspace(tmp_path, {**settings, "density": 0.2}, resume=True)
    with pytest.raises(TrainingError, match="--resume, or choose another --out"):
        Workspace(tmp_path, settings, resume=False)


def test_only_a_run_that_is_gone_on_with_has_texts_of_before(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("of somebody else")
    assert Workspace(tmp_path, {}, resume=True).begun_with("plan.toml") is None
    work = Workspace(tmp_path, {}, resume=True)
    assert work.begun_with("plan.toml") == "of somebody else" and work.begun_with("nothing.toml") is None
    (tmp_path / "plan.toml").write_bytes(b"\xff")
    with pytest.raises(TrainingError, match=r"plan\.toml cannot be read: .* Choose another --out"):
        work.begun_with("plan.toml")


@pytest.mark.parametrize("text", ["", "{", "[]", "\ud800"])
def test_settings_that_are_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(TrainingError, match=r"run\.json cannot be read: .* Choose another --out, or remove it"):
        Workspace(tmp_path, {}, resume=True)


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_phase_that_is_damaged(damage: bytes | None, tmp_path: Path) -> None:
    work = Workspace(tmp_path, {}, resume=False)
    work.phase("dense", lambda: STATE)
    file = tmp_path / "work" / "dense.pt"
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(TrainingError, match=r"dense\.pt cannot be read: .* Remove it: --resume does the phase dense"):
        work.phase("dense", lambda: STATE)


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workspace(tmp_path, {}, resume=False)
    work.phase("dense", lambda: STATE)

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file") from OSError(errno.ENOSPC, "No space left")

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)  # torch makes a RuntimeError of it
        with pytest.raises(TrainingError, match=r"cannot write the checkpoint .*shape\.pt"):
            work.phase("shape", lambda: STATE)
        patch.setattr(
            Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
        )
        with pytest.raises(TrainingError, match=r"No space left. What was finished is kept: make room"):
            work.write_text("report.json", "{}")
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["dense.pt", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text()) == {}
    assert work.phase("shape", lambda: STATE)["score"] == 1.5


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(TrainingError, match=r"cannot write to .* make room or permission"):
            Workspace(out, {}, resume=False)
