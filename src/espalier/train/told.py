"""What training says while it goes: a bar on a terminal, a line an epoch elsewhere. Everything goes to stderr."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Told:
    """The progress of `epochs` of `steps` each, of which `done` steps were done before.

    >>> with Told("train", epochs=2, steps=10, done=0, shown=False) as told:
    ...     told.step()
    ...     told.epoch(1, loss=0.5, accuracy=0.9, seconds=1.0)
    """

    def __init__(self, phase: str, epochs: int, steps: int, done: int, shown: bool) -> None:
        self.phase, self.epochs = phase, epochs
        self.console = Console(stderr=True)
        self.bar_shown = shown and self.console.is_terminal
        self.lines_shown = shown and not self.console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.bar_shown,
            transient=True,
        )
        self.task = self.bar.add_task(phase, total=epochs * steps, completed=done, told="")

    def __enter__(self) -> Told:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def step(self) -> None:
        """A step is done."""
        self.bar.advance(self.task)

    def epoch(self, epoch: int, loss: float, accuracy: float, seconds: float) -> None:
        """An epoch is done."""
        told = f"loss {loss:.4f}  holdout {100 * accuracy:.2f} %"
        self.bar.update(self.task, told=f"epoch {epoch}/{self.epochs}  {told}")
        if self.lines_shown:
            left = timedelta(seconds=round(seconds * (self.epochs - epoch)))
            line = f"{self.phase} {epoch}/{self.epochs}  {told}  {seconds:.1f} s  {left} left"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Tried:
    """A search that evaluates again and again: each try on a status line of a terminal, elsewhere a line now and then.

    >>> tried = Tried("purify", shown=False)
    >>> tried.one("holdout 98.52 %")
    >>> tried.count
    1
    """

    def __init__(self, phase: str, *, shown: bool = True, every_s: float = 5.0) -> None:
        self.phase, self.shown, self.every_s, self.count = phase, shown, every_s, 0
        self.console = Console(stderr=True)
        self.began = self.told_at = time.monotonic()

    def one(self, words: str) -> None:
        """One more was tried; `words` say what came of it."""
        self.count += 1
        now = time.monotonic()
        due = self.count == 1 or now - self.told_at >= self.every_s
        if self.shown and (due or self.console.is_terminal):
            self.told_at = now
            self._line(words, "\r" if self.console.is_terminal else "\n")

    def end(self, words: str) -> None:
        """It is over."""
        if self.shown:
            self._line(words, "\n")

    def _line(self, words: str, end: str) -> None:
        line = f"{self.phase} {self.count}  {words}  {time.monotonic() - self.began:.1f} s"
        if self.console.is_terminal:  # over the line before it, whatever its length, and never onto a second one
            room = self.console.width - 1
            line = line[:room].ljust(room)
        self.console.print(line, highlight=False, markup=False, soft_wrap=True, end=end)
