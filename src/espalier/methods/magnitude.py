"""Magnitude pruning: the groups with the smallest norms go, at once or along a ramp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from espalier.methods.base import Method, Progress, State, Target
from espalier.methods.ramps import ramp
from espalier.sparsity import at_density, ceiling


@final
@dataclass(frozen=True)
class Magnitude(Method):
    """Prune by magnitude.

    ramp: "jump" prunes once, when the run finishes; "linear", "cubic" and "cosine" prune bit by bit.
    until: the share of the run after which the density is reached; the rest trains on it.
    updates: how many times the choice is made anew. In between, what is pruned stays zero; at the next choice weights
        are chosen by what they are then, so pruned ones do not come back. Both are our reading.

    Source: Han et al., arXiv 1506.02626; ramp by Zhu and Gupta, arXiv 1710.01878.
    """

    ramp: str = "jump"
    until: float = 0.75
    updates: int = 50

    def begin(self, targets: list[Target], progress: Progress) -> State:
        if self.ramp != "jump":
            progress.share("magnitude along a ramp")  # fails early when the length is unknown
        return {}

    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        if self.ramp == "jump":
            return
        assert progress.steps is not None
        every = max(1, int(progress.steps * self.until) // self.updates)
        share = progress.share("magnitude") / self.until
        for target in targets:
            if progress.step % every == 0 and progress.step <= progress.steps * self.until:
                top = ceiling(target.scheme)
                density = ramp(self.ramp, top, target.scheme.density, share)
                made = at_density(target.scheme, max(density, target.scheme.density))
                state[target.site] = made.mask(target.weight, target.conv_groups)
            if target.site in state:
                target.weight.masked_fill_(~state[target.site], 0)
