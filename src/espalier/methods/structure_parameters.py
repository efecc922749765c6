"""Structure parameters: one number per group learns whether the group is needed (PSP).

The network uses nu(a_g) W_g, with nu(a) = 0 if |a| < eps else a, and a straight-through gradient for a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.errors import UnknownNameError
from espalier.methods.base import Method, Progress, State
from espalier.methods.ramps import ramp
from espalier.methods.shares import shares
from espalier.methods.targets import Lane, Target, freeze, judged
from espalier.sparsity import Frozen

KINDS = ("weight_decay", "l1", "fixed")
ZERO = 1e-12  # a layer whose mean square is not above it has no unit of its own
LEAST = 1e-3  # of |a| while a group lives: W is the weight over a
# Over an a near zero a small move would blow up W, and then a large W a: below SMALL W stays within so many root mean
# squares of the layer.
SMALL, WIDE = 0.1, 3.0


@final
@dataclass(frozen=True)
class StructureParameters(Method):
    """PSP (arXiv 1905.05180): a parameter a per group, starting at 1, that decays unless the loss sustains it.

    The module's own parameter always holds what the network uses, nu(a) W, so that checkpoints, copies, clipping and
    compilation see an ordinary weight, and folding at the end is exact. After each optimizer step its move D is shared
    out: ``da_g = (mean over g of W D) / scale``, straight through the threshold, and W such that what is alive moves by
    D as the optimizer wants (with the chain rule's ``dW = a D`` the step of a group would grow with a squared). Pruned
    groups move by their a alone and can come back. Our reading: a starts at the group's norm in relation to the root
    mean square of its layer, so that it is 1 on average and a trained network hands on what it knows; `scale` is that
    mean square, so that a stays in this unit. Weight decay on W is the optimizer's.

    kind: "weight_decay" (``a <- (1 - s) a``), "l1" (``a <- a - s sign a``), or "fixed" (no decay).
    decay: the total of s over a run; by default 1 where a rule has no density, 0.3 where it has one.
    eps: threshold on |a| where a rule has no density: the densities come out ("fixed" then prunes nothing). Where it
        has one, the threshold is the one that leaves as many groups as a cubic ramp wants.
    density: of all sites of the plan together, for the rules that have none: then one threshold for all follows a ramp.
    until: the share of the run after which the ramp is over. updates: of thresholds and patterns in a run.
    reach: how far |a| of a pruned group may grow, in times the least that lives: nothing else holds it back while it
        takes no part, and LeNet-5's single weights diverged at a density of 0.025 without. Our reading.

    Patterns and N:M keep what is largest, straight through as well; ties (unification) are made when the run finishes.
    """

    kind: str = "weight_decay"
    decay: float | None = None
    density: float | None = None
    until: float = 0.7
    eps: float = 0.5
    updates: int = 100
    reach: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("kind of structure_parameters", self.kind, KINDS)

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("structure_parameters")
        state: State = {}
        for target in targets:
            w = target.weight.detach().float()
            for lane in _pruning(target):
                squares = lane.mean(w.square())
                scale = squares.mean()
                empty = scale <= ZERO  # an all-zero layer: as if just begun
                scale = torch.where(empty, 1 / w[0].numel(), scale)
                a = torch.where(empty, 1.0, (squares / scale).sqrt().clamp_min(LEAST))
                state[lane.key("scale")], state[lane.key("a")] = scale, a
                state[lane.key("alive")] = torch.ones_like(squares, dtype=torch.bool)
            factor = _product(torch.ones_like(w), [lane.spread(state[lane.key("a")]) for lane in _pruning(target)])
            state[f"{target.site}/w"] = w / factor
        self._choose(targets, state, 0.0)
        return state

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        for target in targets:
            self._share_out(target, state, 1 / progress.steps)
        if progress.step % max(1, progress.steps // self.updates) == 0:
            self._choose(targets, state, progress.share("structure_parameters") / self.until)
        for target in targets:
            target.weight.copy_(_used(target, state))

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        if self.density is not None:  # met also where the run ends before its ramp
            self._choose(targets, state, 1.0)
        by: dict[str, list[Tensor]] = {}
        found: dict[str, list[Tensor | None]] = {}
        for target in targets:
            spreads, w = [], state[f"{target.site}/w"]
            by[target.site], found[target.site] = [], []
            for lane in target.lanes():
                if lane.prunes:
                    a, alive = state[lane.key("a")], state[lane.key("alive")]
                    spreads.append(lane.spread(a * alive if lane.open else a))
                    by[target.site].append(lane.spread(a))
                    found[target.site].append(alive if lane.open else None)
                else:
                    by[target.site].append(_product(w, spreads))
                    found[target.site].append(None)
            target.weight.copy_(_product(w, spreads))  # where a density keeps a group that was below the threshold
        return freeze(targets, by, found)

    # -- inside ------------------------------------------------------------------------------------

    def _share_out(self, target: Target, state: State, dt: float) -> None:
        """Hand the move that the optimizer made on to W and a; then a decays."""
        lanes, w = _pruning(target), state[f"{target.site}/w"]
        alive = [state[lane.key("alive")] for lane in lanes]
        spreads = [lane.spread(state[lane.key("a")] * living) for lane, living in zip(lanes, alive)]
        after, before = target.weight.detach().float(), _product(w, spreads)
        support = state.get(f"{target.site}/support")
        move = after - (before if support is None else before * support)
        if support is not None:
            after = before + move
        along = move.mul_(w)
        for k, (lane, living) in enumerate(zip(lanes, alive)):
            a = state[lane.key("a")]
            moved = a + lane.mean(_product(along, spreads[:k] + spreads[k + 1 :])) / state[lane.key("scale")]
            stuck = living & (moved * a.sign() < LEAST)  # what lives passes zero only by dying first
            moved = torch.where(stuck, a.sign() * LEAST, moved)
            bound = self.reach * moved.abs().masked_fill(~living, math.inf).min()
            a.copy_(torch.where(living, moved, moved.clamp(-bound, bound)))
        factors = [lane.spread(state[lane.key("a")] * living) for lane, living in zip(lanes, alive)]
        moved = after.clone() if not factors else _product(after / factors[0], [1 / factor for factor in factors[1:]])
        for lane, factor in zip(lanes, factors):
            bound = WIDE * float(state[lane.key("scale")]) ** 0.5
            moved = torch.where(factor.abs() < SMALL, torch.where(factor == 0, w, moved.clamp(-bound, bound)), moved)
        w.copy_(moved)
        for lane in lanes:
            a, decay = state[lane.key("a")], (1.0 if lane.open else 0.3) if self.decay is None else self.decay
            if self.kind == "weight_decay":
                a.mul_(math.exp(-decay * dt))
            elif self.kind == "l1":
                a.copy_(a.sign() * (a.abs() - decay * dt).clamp_min(LEAST))

    def _choose(self, targets: list[Target], state: State, share: float) -> None:
        """Which groups are above the threshold, and which positions patterns and N:M leave."""
        sizes: dict[str, Tensor] = {}
        for r in range(max((len(t.scheme.rules) for t in targets), default=0)):
            lanes = [t.lanes()[r] for t in targets if r < len(t.scheme.rules)]
            pruning = {lane.target.site: lane.spread(state[lane.key("a")]) for lane in lanes if lane.prunes}
            by = judged([lane.target for lane in lanes if lane.prunes], pruning, r)
            for lane in lanes:
                site = lane.target.site
                if lane.prunes:
                    joint = by[site] is not pruning[site]
                    sizes[lane.key("")] = lane.mean(by[site].square()) if joint else state[lane.key("a")].abs()
                elif not lane.rule.snap.ties:
                    state[f"{site}/support"] = lane.rule.mask(state[f"{site}/w"], lane.target.conv_groups)
        wanted = shares(targets, sizes, self.density)
        for target in targets:
            for lane in _pruning(target):
                state[lane.key("alive")] = self._alive(sizes[lane.key("")], wanted[lane.key("")], share)

    def _alive(self, size: Tensor, wanted: float | None, share: float) -> Tensor:
        if wanted is None:
            return (size >= self.eps) | (size == size.max()) | (self.kind == "fixed")
        dead = min(len(size) - 1, round((1 - ramp("cubic", 1.0, wanted, share)) * len(size)))
        alive = torch.ones_like(size, dtype=torch.bool)
        alive[size.argsort()[:dead]] = False
        return alive


def _used(target: Target, state: State) -> Tensor:
    """nu(a) W, within what patterns leave."""
    spreads = [lane.spread(state[lane.key("a")] * state[lane.key("alive")]) for lane in _pruning(target)]
    used = _product(state[f"{target.site}/w"], spreads)
    support = state.get(f"{target.site}/support")
    return used if support is None else used * support


def _pruning(target: Target) -> list[Lane]:
    return [lane for lane in target.lanes() if lane.prunes]


def _product(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    for factor in factors:
        tensor = tensor * factor
    return tensor
