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
from espalier.methods.targets import Lane, Target, judged

_MORE = 1.5  # times rho at an update that finds a layer behind
_IN_TIME = 0.8  # of the run: schedules leave too little learning rate behind it


@final
@dataclass(frozen=True)
class ADMM(Method):
    """P-RM's ADMM (arXiv 1905.00136), with one Z, U pair for each rule of a scheme (filters *and* columns).

    stages: rho climbs from `rho_start` to `rho_end` in so many equal factors, one after the other; Z and U start afresh
        in each. The defaults, 1e-4 to 1e-1 times 10 in four stages, are those of the group's public code.
    updates: of Z and U in a run, at most; `every`: steps between them, at least: U sums up what W has not followed yet,
        and momentum makes it follow late, so that training diverges where they are too close.
    residual: how far from its projection a layer may be when the run ends, ``||W - Z|| / ||W||``. That ramp alone gets
        there only in long runs at large learning rates. A layer behind a way that leads there gets a larger rho, up to
        `rho_max`, until it has caught up. Our reading; None keeps to the ramp.
    track: between updates Z follows W wherever the projection leaves it as it is, so that what stays is free to learn:
        only what is to change is drawn. Our reading; False holds all of W to the Z of the last update, as published.
    """

    rho_start: float = 1e-4
    rho_end: float = 1e-1
    stages: int = 4
    updates: int = 40
    every: int = 10
    residual: float | None = 0.05
    rho_max: float = 10.0
    track: bool = True

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("admm")  # fails early when the length is unknown
        state: State = {}
        for target in targets:
            for lane in target.lanes():
                state[lane.key("push")] = torch.ones((), device=target.weight.device)
        self._update(targets, state, progress, restart=True)
        for target in targets:
            for lane in target.lanes():
                state[lane.key("start")] = _apart(lane, state)
        return state

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor | None:
        """``sum_l sum_r rho/2 ||W_l - Z_lr + U_lr||^2``; the state holds Z - U and U."""
        lanes = [lane for target in targets for lane in target.lanes()]
        points = [state[lane.key("pull")] for lane in lanes]
        strengths = [self._strength(state[lane.key("push")], progress) for lane in lanes]
        drawn = [state[lane.key("drawn")] for lane in lanes] if self.track else None
        return draw([lane.target.weight for lane in lanes], points, strengths, drawn)

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        every = max(min(self.every, progress.steps), progress.steps // self.updates)
        if progress.step % every:
            return
        before = Progress(progress.step - every, progress.steps)
        self._update(targets, state, progress, restart=self._rho(before) != self._rho(progress))

    def _update(self, targets: list[Target], state: State, progress: Progress, restart: bool) -> None:
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
                state[lane.key("drawn")] = (z != sums[site]).to(z.dtype)
                if self.residual is not None and lane.key("start") in state:
                    self._steer(lane, state, progress)

    def _steer(self, lane: Lane, state: State, progress: Progress) -> None:
        """More rho for a layer further from its projection than it should be by now; U, scaled by rho, follows."""
        assert self.residual is not None
        share = min(1.0, progress.share("admm") / _IN_TIME) ** 4  # late rather than early: the choice is to mature
        start, push = state[lane.key("start")], state[lane.key("push")]
        allowed = start * (self.residual / start.clamp_min(self.residual)) ** share
        behind = _apart(lane, state) > allowed
        more = torch.where(behind, push * _MORE, push / _MORE).clamp(1.0, max(1.0, self.rho_max / self._rho(progress)))
        z, u = state[lane.key("pull")] + state[lane.key("u")], state[lane.key("u")] * (push / more)
        state[lane.key("push")], state[lane.key("u")], state[lane.key("pull")] = more, u, z - u

    def _strength(self, push: Tensor, progress: Progress) -> Tensor:
        rho = self._rho(progress)
        return (rho * push).clamp_max(max(rho, self.rho_max))

    def _rho(self, progress: Progress) -> float:
        return staircase(self.rho_start, self.rho_end, self.stages, progress.share("admm"))


def _apart(lane: Lane, state: State) -> Tensor:
    """``||W - Z|| / ||W||`` of a lane."""
    w = lane.target.weight.detach().float()
    z = state[lane.key("pull")] + state[lane.key("u")]
    return (w - z).norm() / w.norm().clamp_min(1e-30)
