"""Structure parameters: one number per group learns whether the group is needed (PSP).

The network uses nu(a_g) W_g, with nu(a) = 0 if |a| < eps else a, and a straight-through gradient for a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from espalier.errors import UnknownNameError
from espalier.methods.base import Method, Progress, State
from espalier.methods.ramps import ramp
from espalier.methods.targets import Lane, Target, freeze
from espalier.sparsity import Frozen

KINDS = ("weight_decay", "l1", "fixed")


@final
@dataclass(frozen=True)
class StructureParameters(Method):
    """PSP (arXiv 1905.05180): a parameter a per group, starting at 1, that decays unless the loss sustains it.

    The module's own parameter always holds what the network uses, nu(a) W, so that checkpoints, copies, clipping and
    compilation see an ordinary weight, and folding at the end is exact. After each optimizer step its move D is handed
    on by the chain rule: ``dW = nu(a) D`` and, straight through the threshold, ``da_g = sum over g of W D``. With plain
    SGD that is PSP's gradient step on both; with any other optimizer it is that optimizer's step, handed on. Pruned
    groups can come back. Our reading: a's step is divided by the layer's mean squared group norm, so that a and W move
    alike whatever the size of a group; and weight decay on W comes with the optimizer's.

    kind: "weight_decay" (``a <- (1 - s) a``), "l1" (``a <- a - s sign a``), or "fixed": no decay; the threshold is such
        that the share of groups alive follows a ramp down to the rule's.
    decay: total of s over a run. Where a rule has a density it is only the start, and steered by feedback so that the
        share of groups alive follows the ramp. until: the share of the run after which the ramp is over.
    eps: threshold on |a|. updates: of s, thresholds and patterns in a run.

    Patterns and N:M keep what is largest, straight through as well; ties (unification) are made when the run finishes.
    """

    kind: str = "weight_decay"
    decay: float = 4.0
    until: float = 0.7
    eps: float = 0.1
    updates: int = 100

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("kind of structure_parameters", self.kind, KINDS)

    def begin(self, targets: list[Target], progress: Progress) -> State:
        progress.share("structure_parameters")
        state: State = {}
        for target in targets:
            w = target.weight.detach().float()
            state[f"{target.site}/w"] = w.clone()
            for lane in _pruning(target):
                squares = lane.sum(w.square())
                state[lane.key("a")] = torch.ones_like(squares)
                state[lane.key("scale")] = squares.mean().clamp_min(1e-30)
                state[lane.key("s")] = torch.tensor(0.0 if self.kind == "fixed" else self.decay, dtype=torch.float64)
                state[lane.key("eps")] = torch.tensor(0.0 if self.kind == "fixed" else self.eps, dtype=torch.float64)
            self._choose(target, state)
        return state

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        assert progress.steps is not None
        update = progress.step % max(1, progress.steps // self.updates) == 0
        for target in targets:
            lanes, w = _pruning(target), state[f"{target.site}/w"]
            spreads = [lane.spread(self._nu(lane, state)) for lane in lanes]
            used = _product(w, spreads)
            support = state.get(f"{target.site}/support")
            move = target.weight.detach().float() - (used if support is None else used * support)
            along = w * move
            for k, lane in enumerate(lanes):
                others = _product(along, spreads[:k] + spreads[k + 1 :])
                self._move(lane, state, lane.sum(others), 1 / progress.steps)
            w.add_(_product(move, spreads))
            if update:
                for lane in lanes:
                    self._steer(lane, state, progress.share("structure_parameters") / self.until)
                self._choose(target, state)
            target.weight.copy_(self._used(target, state))

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        by: dict[str, list[Tensor]] = {}
        found: dict[str, list[Tensor | None]] = {}
        for target in targets:
            w = state[f"{target.site}/w"]
            spreads, by[target.site], found[target.site] = [], [], []
            for lane in target.lanes():
                if not lane.prunes:
                    by[target.site].append(_product(w, spreads))
                    found[target.site].append(None)
                    continue
                a = state[lane.key("a")]
                living = self._nu(lane, state) if lane.open else a
                spreads.append(lane.spread(living))
                by[target.site].append(lane.spread(a / lane.sum(torch.ones_like(w)).sqrt()))
                found[target.site].append(living != 0 if lane.open else None)
            target.weight.copy_(_product(w, spreads))  # what a density keeps may lie below the threshold
        return freeze(targets, by, found)

    # -- inside ------------------------------------------------------------------------------------

    def _nu(self, lane: Lane, state: State) -> Tensor:
        """nu(a); the largest is never cut, so that no layer dies."""
        a = state[lane.key("a")]
        size = a.abs()
        return a.masked_fill((size < state[lane.key("eps")].to(a.device)) & (size < size.max()), 0)

    def _move(self, lane: Lane, state: State, gradient: Tensor, dt: float) -> None:
        a = state[lane.key("a")]
        a.add_(gradient / state[lane.key("scale")])
        s = float(state[lane.key("s")]) * dt
        if self.kind == "weight_decay":
            a.mul_(max(0.0, 1 - s))
        elif self.kind == "l1":
            a.copy_(a.sign() * (a.abs() - s).clamp_min(0))

    def _steer(self, lane: Lane, state: State, share: float) -> None:
        if lane.open:
            return
        a = state[lane.key("a")].abs()
        wanted = ramp("cubic", 1.0, lane.rule.free, share)
        if self.kind == "fixed":
            dead = min(len(a) - 1, round((1 - wanted) * len(a)))
            state[lane.key("eps")] = a.sort().values[dead].double() if dead else torch.tensor(0.0, dtype=torch.float64)
        else:
            alive = float((a >= self.eps).float().mean())
            state[lane.key("s")] = state[lane.key("s")] * (1.25 if alive > wanted else 0.8)

    def _choose(self, target: Target, state: State) -> None:
        """The positions that patterns and N:M leave."""
        rules = [lane for lane in target.lanes() if not lane.prunes and not lane.rule.snap.ties]
        if rules:
            w = state[f"{target.site}/w"]
            masks = [lane.rule.mask(w, target.conv_groups) for lane in rules]
            state[f"{target.site}/support"] = torch.stack(masks).all(0)

    def _used(self, target: Target, state: State) -> Tensor:
        used = _product(state[f"{target.site}/w"], [lane.spread(self._nu(lane, state)) for lane in _pruning(target)])
        support = state.get(f"{target.site}/support")
        return used if support is None else used * support


def _pruning(target: Target) -> list[Lane]:
    return [lane for lane in target.lanes() if lane.prunes]


def _product(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    for factor in factors:
        tensor = tensor * factor
    return tensor
