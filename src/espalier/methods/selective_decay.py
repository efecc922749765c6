"""Selective weight decay: what is to be pruned decays, ever faster, until nothing is lost by cutting it (SWD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from espalier.methods.base import Method, Progress, State
from espalier.methods.ramps import staircase
from espalier.methods.targets import Target, freeze


@final
@dataclass(frozen=True)
class SelectiveDecay(Method):
    """SWD (arXiv 2011.10520): ``W <- W - k (W - proj(W))`` after each step, k growing exponentially.

    What is to be pruned is chosen anew `updates` times in a run (the paper does it at every step), by what the weights
    are then: what the loss defends may leave the choice again. Tied blocks decay towards their shared magnitude.
    The paper adds the decay to the loss; ours is decoupled from the optimizer (as in AdamW), so that it is stable with
    any optimizer and learning rate and does not end where a schedule ends.

    start, end: the decay at the start and the end of a run, in factors of e per length of the run: with the defaults
    what is to be pruned ends some 14 factors of e smaller.
    """

    start: float = 0.1
    end: float = 100.0
    updates: int = 100

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("selective_decay")
        state: State = {}
        self._choose(targets, state)
        return state

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        rate = staircase(self.start, self.end, progress.steps + 1, progress.share("selective_decay"))
        shrink = 1 - math.exp(-rate / progress.steps)
        for target in targets:
            weight, point = target.weight, state.get(f"{target.site}/point")
            apart = weight if point is None else weight - point.to(weight.dtype)
            weight.sub_(apart * state[f"{target.site}/off"], alpha=shrink)
        if progress.step % max(1, progress.steps // self.updates) == 0:
            self._choose(targets, state)

    def _choose(self, targets: list[Target], state: State) -> None:
        """off: what the projection changes; point: what it changes it to, where that is not zero."""
        for target, frozen in zip(targets, freeze(targets).values()):
            state[f"{target.site}/off"] = ~frozen.mask
            if frozen.ties:
                w = target.weight.detach().float()
                point = frozen.apply(w)
                state[f"{target.site}/point"], state[f"{target.site}/off"] = point, point != w
