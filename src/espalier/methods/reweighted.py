"""Reweighted group regularisation: weak groups are pressed harder at each milestone, then cut (the mapping paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.methods.base import Method, Progress, State, pull
from espalier.methods.ramps import ramp
from espalier.methods.shares import shares
from espalier.methods.targets import Lane, Target, freeze, judged
from espalier.sparsity import Frozen

LEAST = 1e-12  # of a norm that others are measured by: its square is still a number
STEER = 1.5  # the factor by which lambda changes at a milestone
FALLING = 0.8  # energy that fell to so much of itself since the last milestone is falling fast enough
STIFFEST = 20.0  # pull of the penalty over the weights it pulls at: plain SGD at a rate of 0.1 is stable up to here


@final
@dataclass(frozen=True)
class Reweighted(Method):
    """The penalty ``lambda sum_g a_g ||W_g||`` with ``a_g = 1 / (||W_g||^2 + eps)`` refreshed at milestones.

    Source: arXiv 2111.11581, section on training. It is of the live weights. Our reading: norms are in units of the
    layer: of the norm on the border between what stays and what goes where a rule has a density, of the root mean
    square at the start where it has none; the norm is smoothed by sqrt(eps), which keeps the pull on a vanishing group
    within what a step can follow; and lambda is divided by the length of the run, since what counts is their product
    (with the learning rate). For other snaps than zero the penalty is on what the snap takes away.

    strength: lambda times steps. Where a rule has a density it is only the start: at each milestone lambda is steered
        by feedback until the groups that are to go hold less of the layer's energy than a ramp down to `left` wants.
    threshold: where a rule has no density, groups below this norm are cut at the end.
    density: of all sites of the plan together, for the rules that have none: then one threshold for all says what goes.
    milestones: of a run.
    """

    strength: float = 8.0
    threshold: float = 0.2
    density: float | None = None
    left: float = 1e-3
    milestones: int = 30
    eps: float = 1e-2

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("reweighted")
        assert progress.steps is not None
        state: State = {}
        for target in targets:
            w = target.weight.detach().float()
            for lane in target.lanes():
                state[lane.key("start")] = _squares(lane, w).mean().sqrt().clamp_min(LEAST)
                state[lane.key("unit")] = state[lane.key("start")]
                state[lane.key("lambda")] = torch.tensor(self.strength / progress.steps, device=w.device)
        self._refresh(targets, state, 0.0)
        return state

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor | None:
        """``sum_l unit_l^2 lambda_l sum_g size_g a_g sqrt(||W_g / unit_l||^2 + eps)``, norms as root mean squares."""
        weights, gradients, values = [], [], []
        for target in targets:
            w = target.weight.detach().float()
            for lane in target.lanes():
                with torch.no_grad():
                    outside, unit = lane.outside(w), state[lane.key("unit")]
                    norms = (lane.mean(outside.square()) + self.eps * unit.square()).sqrt()
                    press = state[lane.key("press")]
                    values.append((press * norms).dot(lane.sizes.to(press.device)))
                    gradients.append(outside * lane.spread(press / norms))
                weights.append(target.weight)
        return pull(weights, gradients, torch.stack(values).sum()) if weights else None

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        if progress.step % max(1, progress.steps // self.milestones) == 0:
            self._refresh(targets, state, progress.share("reweighted"))

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        ranked = self._ranked(targets, state)
        wanted = shares(targets, {key: squares.sqrt() for key, squares in ranked.items()}, self.density)
        found: dict[str, list[Tensor | None]] = {}
        for target in targets:
            found[target.site] = []
            for lane in target.lanes():
                squares, share = ranked[lane.key("")], wanted[lane.key("")]
                alive = (squares > self.threshold**2) | (squares == squares.max())
                if share is not None:
                    alive = torch.ones_like(alive)
                    alive[squares.argsort()[: round((1 - share) * len(squares))]] = False
                found[target.site].append(alive if lane.open else None)
        return freeze(targets, found=found)

    def _ranked(self, targets: list[Target], state: State) -> dict[str, Tensor]:
        """lane -> the mean squares of its groups that decide, in units of the layer at the start."""
        made: dict[str, Tensor] = {}
        for r in range(max((len(t.scheme.rules) for t in targets), default=0)):
            lanes = [t.lanes()[r] for t in targets if r < len(t.scheme.rules)]
            weights = {lane.target.site: lane.target.weight.detach().float() for lane in lanes}
            by = judged([lane.target for lane in lanes], weights, r)
            for lane in lanes:
                squares = _squares(lane, by[lane.target.site])
                if by[lane.target.site] is not weights[lane.target.site]:
                    squares = squares * (_squares(lane, weights[lane.target.site]).mean() / squares.mean())
                made[lane.key("")] = squares / state[lane.key("start")].square()
        return made

    def _refresh(self, targets: list[Target], state: State, share: float) -> None:
        """A milestone: lambda steered, units and weightings made anew."""
        ranked = self._ranked(targets, state)
        wanted = shares(targets, {key: squares.sqrt() for key, squares in ranked.items()}, self.density)
        for lane in [lane for target in targets for lane in target.lanes()]:
            squares, keep = ranked[lane.key("")], wanted[lane.key("")]
            if keep is not None:
                w = lane.target.weight.detach().float()
                lost = round((1 - keep) * len(squares))
                order = squares.argsort()
                energy = _squares(lane, w)[order[:lost]].sum() / w.square().mean().clamp_min(LEAST)
                self._steer(lane, state, energy.double(), share)
                border = squares[order[min(lost, len(order) - 1)]].sqrt() if keep > 0 else squares.mean().sqrt()
                state[lane.key("unit")] = (border * state[lane.key("start")]).clamp_min(LEAST)
            unit = state[lane.key("unit")]
            a = 1 / (squares * (state[lane.key("start")] / unit).square() + self.eps)
            pressed = (a * state[lane.key("lambda")]).clamp_max(STIFFEST * self.eps**0.5)
            state[lane.key("press")] = pressed * unit

    def _steer(self, lane: Lane, state: State, energy: Tensor, share: float) -> None:
        """Press harder while what is to go holds more of the energy than it should by now and is not falling."""
        if share == 0:
            state[lane.key("energy")] = state[lane.key("first")] = energy
            return
        before, first = state[lane.key("energy")], state[lane.key("first")]
        wanted = first * ramp("linear", 1.0, self.left, share)
        if energy <= wanted:
            state[lane.key("lambda")] = state[lane.key("lambda")] / STEER
        elif energy > FALLING * before:
            state[lane.key("lambda")] = state[lane.key("lambda")] * STEER
        state[lane.key("energy")] = energy


def _squares(lane: Lane, w: Tensor) -> Tensor:
    return lane.mean(lane.outside(w).square())
