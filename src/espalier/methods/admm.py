"""ADMM: weights are drawn towards their projection until they lie in it (P-RM).

min f(W)  subject to  W in S:   W <- SGD on f + rho/2 ||W - Z + U||^2,   Z <- proj(W + U),   U <- U + W - Z
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.methods.base import Method, Progress, State, Target
from espalier.methods.ramps import staircase


@final
@dataclass(frozen=True)
class ADMM(Method):
    """P-RM's ADMM (arXiv 1905.00136), with one Z, U pair for each rule of a scheme (filters *and* columns).

    stages: rho climbs from `rho_start` to `rho_end` in so many equal factors, one after the other; Z and U start afresh
        in each. The defaults, 1e-4 to 1e-1 times 10 in four stages, are those of the group's public code.
    updates: how many times Z and U are updated in a run; the papers do it every few epochs.
    """

    rho_start: float = 1e-4
    rho_end: float = 1e-1
    stages: int = 4
    updates: int = 40

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("admm")  # fails early when the length is unknown
        state: State = {}
        for target in targets:
            self._restart(target, state)
        return state

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor | None:
        """``sum_l sum_r rho/2 ||W_l - Z_lr + U_lr||^2``."""
        rho = self._rho(progress)
        terms = []
        for target in targets:
            for r in range(len(target.scheme.rules)):
                pull = state[f"{target.site}/z{r}"] - state[f"{target.site}/u{r}"]
                terms.append((target.weight.float() - pull).square().sum())
        return 0.5 * rho * torch.stack(terms).sum() if terms else None

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        every = max(1, progress.steps // self.updates)
        if progress.step % every:
            return
        before = Progress(progress.step - every, progress.steps)
        restart = self._rho(before) != self._rho(progress)
        for target in targets:
            if restart:
                self._restart(target, state)
                continue
            w = target.weight.detach().float()
            for r, rule in enumerate(target.scheme.rules):
                u = state[f"{target.site}/u{r}"]
                z = rule.project(w + u, target.conv_groups)
                state[f"{target.site}/z{r}"] = z
                state[f"{target.site}/u{r}"] = u + w - z

    def _restart(self, target: Target, state: State) -> None:
        w = target.weight.detach().float()
        for r, rule in enumerate(target.scheme.rules):
            state[f"{target.site}/z{r}"] = rule.project(w, target.conv_groups)
            state[f"{target.site}/u{r}"] = torch.zeros_like(w)

    def _rho(self, progress: Progress) -> float:
        return staircase(self.rho_start, self.rho_end, self.stages, progress.share("admm"))
