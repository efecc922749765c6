"""Reweighted group regularisation: weak groups are pressed harder at each milestone, then cut (the mapping paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.methods.base import Method, Progress, State, pull
from espalier.methods.ramps import ramp
from espalier.methods.targets import Lane, Target, freeze, judged
from espalier.sparsity import Frozen


@final
@dataclass(frozen=True)
class Reweighted(Method):
    """The penalty ``lambda sum_g a_g ||W_g||`` with ``a_g = 1 / (||W_g||^2 + eps)`` refreshed at milestones.

    Source: arXiv 2111.11581, section on training. Norms are in relation to their root mean square in the layer at the
    start, so one lambda fits all layers; the penalty is of the live weights, its norm smoothed by sqrt(eps) (our
    reading: it keeps the pull on a vanishing group within what a step can follow). For other snaps than zero the
    penalty is on what the snap takes away.

    strength: lambda. Where a rule has a density it is only the start: at each milestone lambda is steered by feedback
        until the groups that are to go hold less of the layer's energy than a ramp down to `left` wants.
    threshold: where a rule has no density, groups below this relative norm are cut at the end.
    milestones: of a run.
    """

    strength: float = 3e-4
    threshold: float = 0.2
    left: float = 1e-3
    milestones: int = 30
    eps: float = 1e-2

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("reweighted")
        state: State = {}
        for target in targets:
            for lane in target.lanes():
                norms = self._squares(lane, target.weight.detach().float())
                state[lane.key("scale")] = norms.mean().sqrt().clamp_min(1e-30)
                state[lane.key("lambda")] = torch.tensor(self.strength, device=target.weight.device)
                state[lane.key("energy")] = torch.tensor(0.0, dtype=torch.float64)
        self._refresh(targets, state, 0.0)
        return state

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor | None:
        """``sum_l sum_g lambda_l a_g sqrt(||W_g||^2 + eps)``, in relative norms times the layer's scale."""
        weights, gradients, values = [], [], []
        for target in targets:
            for lane in target.lanes():
                with torch.no_grad():
                    outside = lane.outside(target.weight.detach().float())
                    scale = state[lane.key("scale")]
                    norms = (lane.sum(outside.square()) + self.eps * scale * scale).sqrt()
                    press = state[lane.key("a")] * state[lane.key("lambda")] * scale
                    values.append((press * norms).sum())
                    gradients.append(outside * lane.spread(press / norms))
                weights.append(target.weight)
        return pull(weights, gradients, torch.stack(values).sum()) if weights else None

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        if progress.step % max(1, progress.steps // self.milestones) == 0:
            self._refresh(targets, state, progress.share("reweighted"))

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        found: dict[str, list[Tensor | None]] = {}
        for target in targets:
            found[target.site] = []
            for lane in target.lanes():
                norms = self._squares(lane, target.weight.detach().float()).sqrt() / state[lane.key("scale")]
                alive = (norms > self.threshold) | (norms == norms.max())
                found[target.site].append(alive if lane.open else None)
        return freeze(targets, found=found)

    def _refresh(self, targets: list[Target], state: State, share: float) -> None:
        for r in range(max((len(t.scheme.rules) for t in targets), default=0)):
            lanes = [t.lanes()[r] for t in targets if r < len(t.scheme.rules)]
            weights = {lane.target.site: lane.target.weight.detach().float() for lane in lanes}
            by = judged([lane.target for lane in lanes], weights, r)
            for lane in lanes:
                w, scores, scale = weights[lane.target.site], by[lane.target.site], state[lane.key("scale")]
                own = self._squares(lane, w)
                squares = own if scores is w else self._squares(lane, scores)
                mean = scale * scale if scores is w else squares.mean().clamp_min(1e-30)
                state[lane.key("a")] = 1 / (squares / mean + self.eps)
                if not lane.open:
                    lost = squares.argsort()[: round((1 - lane.rule.free) * len(squares))]
                    energy = (own[lost].sum() / w.square().sum().clamp_min(1e-30)).double()
                    self._steer(lane, state, energy, share)

    def _steer(self, lane: Lane, state: State, energy: Tensor, share: float) -> None:
        """Press harder where the groups that are to go hold a larger share of the layer's energy than the ramp wants."""
        if share == 0:
            state[lane.key("energy")] = energy
        else:
            wanted = state[lane.key("energy")].to(energy.device) * ramp("linear", 1.0, self.left, share)
            state[lane.key("lambda")] = state[lane.key("lambda")] * (1.3 if energy > wanted else 1 / 1.3)

    def _squares(self, lane: Lane, w: Tensor) -> Tensor:
        return lane.sum(lane.outside(w).square())
