"""A network trained phase by phase; what a phase came to is kept in a workspace, and not done again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from espalier.methods import Run
from espalier.train import Data, Recipe, fit, recalibrate
from espalier.workspace import Workspace


@dataclass
class Training:
    """What trains, on what, and where it is kept. run: set once pruning starts. teacher: for recipes that distill."""

    model: nn.Module
    data: Data
    work: Workspace
    run: Run | None = None
    teacher: nn.Module | None = None
    progress: bool = False

    def fit(self, phase: str, recipe: Recipe) -> None:
        """Train by the recipe; stopped in the middle of a phase, it goes on from the checkpoint."""
        checkpoint = self.work.checkpoint(phase)
        fit(
            self.model,
            self.data,
            recipe,
            hooks=self.run,
            teacher=self.teacher,
            checkpoint=checkpoint,
            resume=checkpoint.exists(),
            phase=phase,
            progress=self.progress,
            on_epoch=None if self.progress else lambda epoch: print(f"{phase} {epoch}", flush=True),
        )

    def phase(self, name: str, work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Do the work of a phase, or load what it came to: the seconds it took, and what `work` returned."""

        def timed() -> dict[str, Any]:
            start = time.perf_counter()
            extra = work() or {}
            run = self.run.state_dict() if self.run else {}
            return {"model": self.model.state_dict(), "run": run, "seconds": time.perf_counter() - start, **extra}

        state = self.work.phase(name, timed)
        self.model.load_state_dict(state["model"])
        if self.run is not None:
            self.run.load_state_dict(state["run"])
        return state

    def into_plan(self, run: Run, recipe: Recipe, shaping: int, retraining: int) -> None:
        """Shape the network in so many epochs (0: not at all), cut, and retrain what lives; `run` knows the steps."""
        self.run = run

        def shape() -> None:
            if shaping:
                self.fit("shape", replace(recipe, epochs=shaping))
            run.finish()
            recalibrate(self.model, self.data.train)

        self.phase("shape", shape)
        again = replace(recipe, epochs=retraining)
        self.phase("retrain", lambda: self.fit("retrain", again) if retraining else None)
