"""ADMM: weights are drawn towards their projection until they lie in it (P-RM).

min f(W)  subject to  W in S:   W <- SGD on f + rho/2 ||W - Z + U||^2,   Z <- proj(W + U),   U <- U + W - Z
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.methods.base import Method, Progress, State, draw
from espalier.methods.ramps import staircase
from espalier.methods.targets import Target, judged


@final
@dataclass(frozen=True)
class ADMM(Method):
    """P-RM's ADMM (arXiv 1905.00136), with one Z, U pair for each rule of a scheme (filters *and* columns).

    stages: rho climbs from `rho_start` to `rho_end` in so many equal factors, one after the other; Z and U start afresh
        in each. The defaults, 1e-4 to 1e-1 times 10 in four stages, are those of the group's public code.
    """

    rho_start: float = 1e-4
    rho_end: float = 1e-1
    stages: int = 4
    updates: int = 40

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("admm")  # fails early when the length is unknown
        state: State = {}
        self._update(targets, state, restart=True)
        return state

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor | None:
        """``sum_l sum_r rho/2 ||W_l - Z_lr + U_lr||^2``; the state holds Z - U and U."""
        lanes = [lane for target in targets for lane in target.lanes()]
        return draw(
            [lane.target.weight for lane in lanes], [state[lane.key("pull")] for lane in lanes], self._rho(progress)
        )

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        every = max(1, progress.steps // self.updates)
        if progress.step % every:
            return
        before = Progress(progress.step - every, progress.steps)
        self._update(targets, state, restart=self._rho(before) != self._rho(progress))

    def _update(self, targets: list[Target], state: State, restart: bool) -> None:
        """``Z <- proj(W + U), U <- U + W - Z``, or from U = 0 anew."""
        for r in range(max((len(t.scheme.rules) for t in targets), default=0)):
            lanes = [target.lanes()[r] for target in targets if r < len(target.scheme.rules)]
            sums = {}
            for lane in lanes:
                w = lane.target.weight.detach().float()
                sums[lane.target.site] = w.clone() if restart else w + state[lane.key("u")]
            by = judged([lane.target for lane in lanes], sums, r)
            for lane in lanes:
                site = lane.target.site
                z = lane.rule.project(sums[site], lane.target.conv_groups, None if by[site] is sums[site] else by[site])
                u = torch.zeros_like(z) if restart else sums[site] - z
                state[lane.key("u")], state[lane.key("pull")] = u, z - u

    def _rho(self, progress: Progress) -> float:
        return staircase(self.rho_start, self.rho_end, self.stages, progress.share("admm"))
