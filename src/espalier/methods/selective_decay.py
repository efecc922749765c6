"""Selective weight decay: what is to be pruned decays, ever faster, until nothing is lost by cutting it (SWD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.methods.base import Method, Progress, State, pull
from espalier.methods.ramps import staircase
from espalier.methods.targets import Target, freeze


@final
@dataclass(frozen=True)
class SelectiveDecay(Method):
    """SWD (arXiv 2011.10520): ``loss + a/2 ||W - proj(W)||^2`` with `a` growing exponentially from `start` to `end`.

    What is to be pruned is chosen anew `updates` times in a run (the paper does it at every step), by what the weights
    are then: what the loss defends may leave the choice again. Tied blocks decay towards their shared magnitude.
    start, end: as a coefficient of the penalty; the paper's, times its weight decay, are 5e-5 and 25. Ours end where
    plain SGD with a learning rate of 0.1 is still stable.
    """

    start: float = 1e-4
    end: float = 10.0
    updates: int = 100

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("selective_decay")
        state: State = {}
        self._choose(targets, state)
        return state

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor | None:
        """``a/2 sum_l ||(W_l - P_l) off_l||^2``: off says what the projection P changes."""
        if not targets:
            return None
        strength = staircase(self.start, self.end, 10**6, progress.share("selective_decay"))
        with torch.no_grad():
            apart = []
            for t in targets:
                w = t.weight.detach().float()
                point = state.get(f"{t.site}/point")
                apart.append((w if point is None else w - point) * state[f"{t.site}/off"])
            value = 0.5 * strength * torch.stack(torch._foreach_norm(apart)).square().sum()
            torch._foreach_mul_(apart, strength)
        return pull([t.weight for t in targets], apart, value)

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        if progress.step % max(1, progress.steps // self.updates) == 0:
            self._choose(targets, state)

    def _choose(self, targets: list[Target], state: State) -> None:
        for target, frozen in zip(targets, freeze(targets).values()):
            state[f"{target.site}/off"] = ~frozen.mask
            if frozen.ties:
                w = target.weight.detach().float()
                point = frozen.apply(w)
                state[f"{target.site}/point"], state[f"{target.site}/off"] = point, point != w
