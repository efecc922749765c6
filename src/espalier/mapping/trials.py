"""Trials: what a search has tried, in a file of JSON lines that a kill cannot damage beyond its last line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from espalier.errors import DataError


@dataclass(frozen=True)
class Trial:
    """One plan that was pruned, briefly retrained and scored.

    source: who chose it ("policy", "tpe", "nsga2", "rule", "final"). run: of which search, number: the place in it.
    picked: the option of every site of the space. accuracy: in points. latency_ms: by the table.
    """

    source: str
    run: str
    number: int
    picked: tuple[int, ...]
    accuracy: float
    latency_ms: float
    seconds: float = 0.0

    def reward(self, limit_ms: float, price: float) -> float:
        """Accuracy minus the latency above the limit: `price` points for every per cent of it."""
        return self.accuracy - price * 100 * max(0.0, self.latency_ms / limit_ms - 1)


class Log:
    """The trials of one space. Each is on disk before the next is told of.

    >>> log = Log("trials.jsonl", space.name)
    >>> best(log.trials, limit_ms=2.0)
    """

    def __init__(self, path: str | Path, space: str) -> None:
        """Raises DataError when the file holds trials of another space, or lines that are none."""
        self.path, self.trials = Path(path), list[Trial]()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read(space)
            if not self.path.exists() or not self.path.stat().st_size:
                self._write({"space": space})
        except OSError as error:
            raise DataError(f"{path}: trials cannot be kept there: {error.strerror}") from error

    def add(self, trial: Trial) -> None:
        """Keep a trial that has ended."""
        self._write(asdict(trial))
        self.trials.append(trial)

    def _write(self, line: dict[str, object]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise DataError(
                f"{self.path}: the trial cannot be kept: {error.strerror}; what was there is whole"
            ) from error

    def _read(self, space: str) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # killed while it wrote
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines()):
            try:
                held = json.loads(line)
                if number:
                    self.trials.append(Trial(**{**held, "picked": tuple(held["picked"])}))
                elif held["space"] != space:
                    raise DataError(
                        f"{self.path} holds trials of another network or other choices: give another file, or remove it"
                    )
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{self.path}, line {number + 1}: is no trial: {error}") from None


def ranked(trials: Iterable[Trial], limit_ms: float, price: float = 1.0) -> list[Trial]:
    """For a latency the trials that keep to it, the most accurate first; then the others by reward."""

    def key(trial: Trial) -> tuple[bool, float]:
        within = trial.latency_ms <= limit_ms
        return not within, -(trial.accuracy if within else trial.reward(limit_ms, price))

    return sorted(trials, key=key)


def best(trials: Iterable[Trial], limit_ms: float, price: float = 1.0) -> Trial:
    """The trial to take for a latency: the most accurate that keeps to it, else the one of highest reward."""
    held = ranked(trials, limit_ms, price)
    if not held:
        raise DataError("there is no trial to choose from: search first")
    return held[0]


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in both, fastest first."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.latency_ms, -t.accuracy)):
        if not kept or trial.accuracy > kept[-1].accuracy:
            kept.append(trial)
    return kept
