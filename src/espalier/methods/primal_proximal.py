"""Primal-proximal: a single run with soft constraints finds its own densities (SS-Auto).

min f(W) + sum_r lambda_g ||W_g||:   W <- SGD on f + rho/2 sum_r ||W - Z_r||^2,   Z_r <- group soft threshold of W
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.methods.base import Method, Progress, State
from espalier.methods.ramps import ramp, staircase
from espalier.methods.shares import shares
from espalier.methods.targets import Target, freeze, judged
from espalier.sparsity import Frozen

SOFT = 0.3  # of the threshold's pull on the groups that live, at the start


@final
@dataclass(frozen=True)
class PrimalProximal(Method):
    """SS-Auto (arXiv 2001.08839): one copy of the weights for each rule, and a group soft threshold on each copy.

    ``Z_g = max(0, 1 - lambda_g / (rho ||W_g||)) W_g`` with ``lambda_g / rho = threshold / (||W_g||^2 + eps)``, where
    the norms are in relation to their root mean square in the layer, and the weighting is refreshed at `milestones`:
    groups that matter are hardly penalised. For other snaps than zero the same happens to what a snap takes away. Of a
    group that Z has lost the final mask loses all: rows of one copy and columns of the other.

    Our reading: towards `until` the threshold turns from soft to hard, so that living groups get back their size.

    threshold: where a rule has no density, lambda / rho once the ramp is over; the densities come out.
    density: of all sites of the plan together, for the rules that have none: then too lambda is steered, one for all.
    until: the share of the run after which threshold or density is reached. Where a rule has a density, lambda is
        steered: at each update it is the one that leaves as many groups alive as the ramp wants.
    rho_start, rho_end: the pull towards the mean of the copies, decoupled from the optimizer (as in AdamW), so that it
        is stable with any and does not end where a schedule ends; in factors of e per length of the run, growing
        exponentially.
    updates: of Z in a run. milestones: how often the weighting is made anew.
    All defaults are our reading: the paper gives none.
    """

    threshold: float = 0.3
    density: float | None = None
    until: float = 0.6
    rho_start: float = 10.0
    rho_end: float = 100.0
    updates: int = 60
    milestones: int = 20
    eps: float = 1e-2

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("primal_proximal")
        state: State = {}
        self._update(targets, state, 0.0, refresh=True)
        return state

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        rate = staircase(self.rho_start, self.rho_end, progress.steps + 1, progress.share("primal_proximal"))
        pull = 1 - math.exp(-rate / progress.steps)
        for target in targets:
            target.weight.lerp_(state[f"{target.site}/z"].to(target.weight.dtype), pull)
        every = max(1, progress.steps // self.updates)
        if progress.step % every:
            return
        update = progress.step // every
        refresh = update % max(1, self.updates // self.milestones) == 0
        self._update(targets, state, progress.share("primal_proximal") / self.until, refresh)

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        if self.density is not None:  # met also where the run ends before its ramp
            self._update(targets, state, 1.0, refresh=False)
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
        norms: dict[str, Tensor] = {}
        for r in range(max((len(t.scheme.rules) for t in targets), default=0)):
            lanes = [t.lanes()[r] for t in targets if r < len(t.scheme.rules)]
            weights = {lane.target.site: lane.target.weight.detach().float() for lane in lanes}
            by = judged([lane.target for lane in lanes], weights, r)
            for lane in lanes:
                found = lane.mean(lane.outside(by[lane.target.site]).square()).sqrt()
                norms[lane.key("")] = found / found.square().mean().sqrt().clamp_min(1e-30)
        wanted = shares(targets, norms, self.density)
        for target in targets:
            copies = []
            for lane in target.lanes():
                if refresh:
                    state[lane.key("a")] = 1 / (norms[lane.key("")].square() + self.eps)
                reach = norms[lane.key("")] / state[lane.key("a")]
                shrunk = 1 - self._threshold(wanted[lane.key("")], reach, share) / reach.clamp_min(1e-30)
                shrunk = torch.where(shrunk > 0, 1 - SOFT * max(0.0, 1 - share) * (1 - shrunk), 0)
                w = target.weight.detach().float()
                copies.append(torch.lerp(lane.nearest(w), w, lane.spread(shrunk)))
                state[lane.key("z")] = copies[-1]
            state[f"{target.site}/z"] = torch.stack(copies).mean(0) if len(copies) > 1 else copies[0]

    def _threshold(self, wanted: float | None, reach: Tensor, share: float) -> float:
        """lambda / rho: a group dies when its `reach`, its norm over its weighting, is not above it."""
        if wanted is None:
            return ramp("linear", 0.0, self.threshold, share)
        dead = round((1 - ramp("cubic", 1.0, wanted, share)) * len(reach))
        return float(reach.kthvalue(min(dead, len(reach))).values) if dead else 0.0


def _or_first(alive: Tensor, scores: Tensor) -> Tensor:
    """`alive`, but never nothing: then the group with the highest score lives."""
    return alive | (~alive.any() & (scores == scores.max()))
