"""Magnitude pruning: the groups with the smallest scores go, at once or along a ramp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from espalier.errors import MethodError, UnknownNameError
from espalier.methods.base import Method, Progress, State
from espalier.methods.ramps import RAMPS, ramp
from espalier.methods.targets import FILTER, Lane, Target, freeze
from espalier.sparsity import Frozen, at_density, ceiling

MEMORY = 0.99  # of the running mean of |w * gradient|


def _taylor(lane: Lane, w: Tensor, state: State) -> Tensor:
    return state[f"{lane.target.site}/taylor"].sqrt()


def _batch_norm(lane: Lane, w: Tensor, state: State) -> Tensor:
    scale = lane.target.scale
    if scale is None or lane.rule.structure.pattern != FILTER:
        return w
    return scale.detach().float().abs().reshape(-1, *[1] * (w.ndim - 1)).expand(w.shape)


# What stands for the weights when groups are chosen; a group's score is the sum of its squares.
SCORES: dict[str, Callable[[Lane, Tensor, State], Tensor]] = {
    "l2": lambda lane, w, state: w,
    "l1": lambda lane, w, state: w.abs().sqrt(),
    "taylor": _taylor,
    "batch_norm": _batch_norm,
}


@final
@dataclass(frozen=True)
class Magnitude(Method):
    """Prune by magnitude.

    score: "l2" or "l1" norm of a group; "taylor", the sum of ``|w * gradient|`` (a running mean over the steps), what
        the loss would change by in first order (Molchanov et al., arXiv 1906.10771); "batch_norm", for filters the size
        of the batch norm's weight behind them (Network Slimming, arXiv 1708.06519), elsewhere l2.
    ramp: "jump" prunes once, when the run finishes; "linear", "cubic" and "cosine" prune bit by bit. By default "cubic"
        in a run whose length is known, and else "jump".
    until: the share of the run after which the density is reached; the rest trains on it.
    updates: how many times the choice is made anew.
    regrow: between two choices the pruned weights go on learning unseen, from the gradients of the pruned network, and
        come back when they have grown larger than others (dynamic pruning with feedback, arXiv 2006.07253). Without it
        they stay zero, and weights are chosen by what they are then.
    `until`, `updates` and the running mean are our reading.

    Source: Han et al., arXiv 1506.02626; ramp by Zhu and Gupta, arXiv 1710.01878.
    """

    score: str = "l2"
    ramp: str | None = None
    until: float = 0.75
    updates: int = 50
    regrow: bool = False

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UnknownNameError("score of magnitude", self.score, SCORES)
        if self.ramp is not None and self.ramp not in RAMPS:
            raise UnknownNameError("ramp of magnitude", self.ramp, RAMPS)

    def begin(self, targets: list[Target], progress: Progress) -> State:
        state: State = {}
        if self._ramp(progress) != "jump":
            progress.share("magnitude along a ramp")  # fails early when the length is unknown
        for target in targets:
            if self.score == "taylor":
                state[f"{target.site}/taylor"] = target.weight.detach().float().square()  # until there are gradients
            if self.regrow and self._ramp(progress) != "jump":
                state[f"{target.site}/unseen"] = target.weight.detach().float().clone()
        return state

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        if self.score == "taylor":
            self._remember(targets, state, progress.step == 1)
        if self._ramp(progress) == "jump":
            return
        assert progress.steps is not None
        every = max(1, int(progress.steps * self.until) // self.updates)
        for target in targets:
            if self.regrow:
                unseen = state[f"{target.site}/unseen"]
                mask = state.get(target.site)
                unseen.add_(target.weight.float() - (unseen if mask is None else unseen * mask))
        if progress.step % every == 0 and progress.step <= progress.steps * self.until:
            self._choose(targets, state, progress)
        for target in targets:
            if target.site in state:
                if self.regrow:
                    target.weight.copy_(state[f"{target.site}/unseen"] * state[target.site])
                else:
                    target.weight.masked_fill_(~state[target.site], 0)

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        """What lives after a ramp stays; without one the choice is made now."""
        scores = self._scores(targets, state)
        for t in targets:
            if t.site in state and self.regrow:
                scores[t.site] = [tensor * state[t.site] for tensor in scores[t.site]]
        return freeze(targets, scores)

    def _ramp(self, progress: Progress) -> str:
        return self.ramp or ("jump" if progress.steps is None else "cubic")

    def _choose(self, targets: list[Target], state: State, progress: Progress) -> None:
        at, share = {}, progress.share("magnitude") / self.until
        for t in targets:
            density = max(ramp(self._ramp(progress), ceiling(t.scheme), t.scheme.density, share), t.scheme.density)
            at[t.site] = at_density(t.scheme, density)
        for site, frozen in freeze(targets, self._scores(targets, state), schemes=at).items():
            state[site] = frozen.mask

    def _scores(self, targets: list[Target], state: State) -> dict[str, list[Tensor]]:
        made = {}
        for t in targets:
            w, mask = state.get(f"{t.site}/unseen", t.weight.detach()), state.get(t.site)
            made[t.site] = [SCORES[self.score](lane, w, state) for lane in t.lanes()]
            if mask is not None and not self.regrow:
                made[t.site] = [scores * mask for scores in made[t.site]]
        return made

    def _remember(self, targets: list[Target], state: State, first: bool) -> None:
        for target in targets:
            if target.weight.grad is None:
                raise MethodError(
                    f"score='taylor' needs the gradient of {target.site}: call run.step() before optimizer.zero_grad()"
                )
            known = (target.weight.detach() * target.weight.grad).abs().float()
            held = state[f"{target.site}/taylor"]
            held.copy_(known) if first else held.lerp_(known, 1 - MEMORY)
