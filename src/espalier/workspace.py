"""The folder of a compression run: settings, finished phases, results. Every file is written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from espalier.errors import TrainingError
from espalier.train import Team, write_checkpoint


class Workspace:
    """The output folder. A run that was killed finds here what it had finished (`resumed`: it did).

    out/run.json holds the settings; out/work/NAME.pt what phase NAME left behind; checkpoints lie beside it.
    Of several processes (`team`) the first reads and writes, and tells the others.
    """

    def __init__(self, out: str | Path, settings: dict[str, Any], resume: bool, team: Team | None = None) -> None:
        """Open the folder, or make it.

        Raises TrainingError when another run's results are there, or `settings` differ from those being resumed.
        """
        self.path, self.team = Path(out), team or Team.alone()
        self.resumed = self.team.first(lambda: self._open(out, settings, resume))

    def _open(self, out: str | Path, settings: dict[str, Any], resume: bool) -> bool:
        """Whether a run was there before."""
        text = json.dumps(settings, indent=1, default=repr)
        before, now = self._recorded(), json.loads(text)
        if before is not None and not resume:
            raise TrainingError(f"{out} holds a run already: go on with it by --resume, or choose another --out")
        if before and (changed := sorted(k for k in {**before, **now} if before.get(k) != now.get(k))):
            told = ", ".join(f"{k} (was {before.get(k)!r}, now {now.get(k)!r})" for k in changed)
            raise TrainingError(f"{out} cannot be resumed with other settings: {told}. Choose another --out")
        self._guard(lambda: (self.path / "work").mkdir(parents=True, exist_ok=True))
        self._write("run.json", text)
        return before is not None

    def _recorded(self) -> dict[str, Any] | None:
        """The settings of the run that is here; None where none is."""
        record = self.path / "run.json"
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds no settings")
            return found
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{record} cannot be read: {error}. Choose another --out, or remove it") from error

    def checkpoint(self, phase: str) -> Path:
        """Where the training loop keeps the checkpoint of a phase."""
        return self.path / "work" / f"{phase}.checkpoint.pt"

    def phase(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What phase `name` left behind (tensors and plain values); `work` is done only if it has not been.

        Several processes all work; what the first one came to is what all of them go on with.
        """
        file = self.path / "work" / f"{name}.pt"
        if not self.team.first(file.exists):
            state = work()
            self.team.first(lambda: self._keep(name, file, state))
        return self.team.first(lambda: self._kept(name, file))

    def _keep(self, name: str, file: Path, state: dict[str, Any]) -> None:
        write_checkpoint(file, state)
        self.checkpoint(name).unlink(missing_ok=True)

    def _kept(self, name: str, file: Path) -> dict[str, Any]:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            first = str(error).partition("\n")[0]
            raise TrainingError(
                f"{file} cannot be read: {first}. Remove it: --resume does the phase {name} again"
            ) from error

    def begun_with(self, name: str) -> str | None:
        """A text file of the run that is gone on with; None where there is none, or the run is new."""
        return self.team.first(lambda: self._text(name)) if self.resumed else None

    def _text(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.path / name} cannot be read: {error}. Choose another --out") from error

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run."""
        return self.team.first(lambda: self._write(name, text))

    def _write(self, name: str, text: str) -> Path:
        target, part = self.path / name, self.path / f"{name}.part"
        try:
            self._guard(lambda: part.write_text(text, encoding="utf-8"))
            self._guard(lambda: os.replace(part, target))
        except BaseException:
            with suppress(OSError):  # what went wrong may go wrong here too
                part.unlink(missing_ok=True)
            raise
        return target

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.path}: {error.strerror or error}. What was finished is kept: "
                "make room or permission, then go on with --resume"
            ) from error
