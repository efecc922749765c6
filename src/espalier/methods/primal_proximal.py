"""Primal-proximal: a single run with soft constraints finds its own densities (SS-Auto).

min f(W) + sum_r lambda_g ||W_g||:   W <- SGD on f + rho/2 sum_r ||W - Z_r||^2,   Z_r <- group soft threshold of W
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.methods.admm import short
from espalier.methods.base import Method, Progress, State, draw
from espalier.methods.ramps import ramp, staircase
from espalier.methods.targets import Lane, Target, freeze, judged
from espalier.sparsity import Frozen


@final
@dataclass(frozen=True)
class PrimalProximal(Method):
    """SS-Auto (arXiv 2001.08839): one copy of the weights for each rule, and a group soft threshold on each copy.

    ``Z_g = max(0, 1 - lambda_g / (rho ||W_g||)) W_g`` with ``lambda_g / rho = threshold / (||W_g||^2 + eps)``, where the
    norms are in relation to their root mean square in the layer, and the weighting is refreshed at `milestones`: groups
    that matter are hardly penalised. For other snaps than zero the same happens to what a snap takes away. Of a group
    that Z has lost the final mask loses all: rows of one copy and columns of the other.

    threshold: where a rule has no density, lambda / rho once the ramp is over; the densities come out.
    until: the share of the run after which threshold or density is reached. Where a rule has a density, lambda is
        steered: at each update it is the one that leaves as many groups alive as the ramp wants.
    rho_start, rho_end, stages, long: the strength of the pull towards Z climbs as in `ADMM`.
    updates: of Z in a run. milestones: how often the weighting is made anew.
    All defaults are our reading: the paper gives none.
    """

    threshold: float = 0.05
    until: float = 0.6
    rho_start: float = 1e-3
    rho_end: float = 1e-1
    stages: int = 4
    updates: int = 60
    milestones: int = 6
    eps: float = 1e-2
    long: int = 10_000

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("primal_proximal")
        state: State = {}
        self._update(targets, state, 0.0, refresh=True)
        return state

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor | None:
        """``sum_l sum_r rho/2 ||W_l - Z_lr||^2``."""
        lanes = [lane for target in targets for lane in target.lanes()]
        rho = staircase(self.rho_start, self.rho_end, self.stages, progress.share("primal_proximal"))
        rho *= short(self.long, progress)
        return draw([lane.target.weight for lane in lanes], [state[lane.key("z")] for lane in lanes], rho)

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        every = max(1, progress.steps // self.updates)
        if progress.step % every:
            return
        update = progress.step // every
        refresh = update % max(1, self.updates // self.milestones) == 0
        self._update(targets, state, progress.share("primal_proximal") / self.until, refresh)

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        by, found = {}, {}
        for target in targets:
            lanes, w = target.lanes(), target.weight.detach()
            copies = [state[lane.key("z")] for lane in lanes]
            by[target.site] = [z + 1e-3 * w if lane.prunes else w for lane, z in zip(lanes, copies)]
            found[target.site] = [
                _or_first(lane.sum(z.square()) > 0, lane.sum(w.square())) if lane.open else None
                for lane, z in zip(lanes, copies)
            ]
        return freeze(targets, by, found)

    def _update(self, targets: list[Target], state: State, share: float, refresh: bool) -> None:
        """``Z <- soft threshold of W``; at a milestone the weighting first."""
        for r in range(max((len(t.scheme.rules) for t in targets), default=0)):
            lanes = [t.lanes()[r] for t in targets if r < len(t.scheme.rules)]
            weights = {lane.target.site: lane.target.weight.detach().float() for lane in lanes}
            by = judged([lane.target for lane in lanes], weights, r)
            for lane in lanes:
                w = weights[lane.target.site]
                norms = lane.sum(lane.outside(by[lane.target.site]).square()).sqrt()
                norms = norms / norms.square().mean().sqrt().clamp_min(1e-30)
                if refresh:
                    state[lane.key("a")] = 1 / (norms.square() + self.eps)
                a = state[lane.key("a")]
                shrunk = (1 - self._threshold(lane, norms / a, share) * a / norms.clamp_min(1e-30)).clamp_min(0)
                state[lane.key("z")] = torch.lerp(lane.nearest(w), w, lane.spread(shrunk))

    def _threshold(self, lane: Lane, reach: Tensor, share: float) -> float:
        """lambda / rho: a group dies when its `reach`, its norm over its weighting, is not above it."""
        if lane.open:
            return ramp("linear", 0.0, self.threshold, share)
        dead = round((1 - ramp("cubic", 1.0, lane.rule.free, share)) * len(reach))
        return float(reach.kthvalue(min(dead, len(reach))).values) if dead else 0.0


def _or_first(alive: Tensor, scores: Tensor) -> Tensor:
    """`alive`, but never nothing: then the group with the highest score lives."""
    return alive | (~alive.any() & (scores == scores.max()))
