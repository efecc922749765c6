"""Scheme: which weights live and die together. THE idea of Espalier.

A rule = structure + snap + free: it snaps the groups that lose least by it and leaves the share `free` of
them alone. That is the Euclidean projection onto the weights that the rule allows. A scheme applies its
rules in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from espalier.errors import SchemeError
from espalier.sparsity.masked import masked
from espalier.sparsity.permute import row_order
from espalier.sparsity.snaps import Snap
from espalier.sparsity.structures import Structure


@dataclass(frozen=True)
class Rule:
    """structure + snap + the share of groups left alone (0..1).

    permute: the block letter of rows that `fit` may put into another order, or None.
    """

    structure: Structure
    snap: Snap
    free: float = 0.0
    permute: str | None = None

    def fit(self, w: Tensor, conv_groups: int = 1) -> Rule:
        """The same with what of its structure depends on the weights: which rows stand in one block."""
        if self.permute is None:
            return self
        order = row_order(self.structure, self.permute, w, conv_groups, self.free)
        return replace(self, structure=replace(self.structure, order=order))

    def groups(self, w: Tensor, conv_groups: int = 1) -> Tensor:
        """The matrix ``[groups, size]`` of `w` in this rule's structure."""
        return self.structure.groups(w, conv_groups)

    def norms(self, w: Tensor, conv_groups: int = 1) -> Tensor:
        """The l2 norm of every group, shape ``[groups]``; differentiable where it is not zero."""
        return self.structure.sum(w.square(), conv_groups).sqrt()

    def chosen(self, w: Tensor, conv_groups: int = 1) -> Tensor:
        """Boolean ``[groups]``: the groups that lose least by the snap, all but the share `free`."""
        wide = w.detach().to(torch.float32) if w.dtype in (torch.float16, torch.bfloat16) else w.detach()
        sizes = self.structure.group_sizes(w.shape, conv_groups).to(w.device)
        if self.free <= 0 and not torch.isnan(wide.sum()):  # all of them
            return torch.ones_like(sizes, dtype=torch.bool)
        loss = self.snap.loss(wide, self.structure, conv_groups)
        if torch.isnan(loss.sum()):
            raise SchemeError("the weights hold NaN: training has diverged; lower the learning rate or rho")
        if self.snap.skips_dead and not bool(loss.all()):  # what is dead loses nothing
            alive = self.structure.sum(wide.abs(), conv_groups) > 0
            loss, sizes = loss.masked_fill(~alive, -1.0), sizes * alive
        return ~_highest(loss, sizes, self.free)

    def project(self, w: Tensor, conv_groups: int = 1, by: Tensor | None = None) -> Tensor:
        """``argmin ||p - w||`` over the weights p that the rule allows; shape and dtype of `w`.

        by: scores of the shape of `w` that decide in its place which groups are pruned (ties are for weights only).
        """
        if by is None or self.snap.ties:
            return self.snap.apply(w.detach(), self.structure, conv_groups, self.chosen(w, conv_groups))
        return masked(w, self.mask(by, conv_groups))

    def mask(self, w: Tensor, conv_groups: int = 1) -> Tensor:
        """Boolean, shape of `w`: the entries that stay alive in the projection."""
        return self.snap.mask(w.detach(), self.structure, conv_groups, self.chosen(w, conv_groups))


@dataclass(frozen=True)
class Tie:
    """The blocks of one rule that share a magnitude: `tied` bool ``[groups]`` in `structure`."""

    structure: Structure
    tied: Tensor


@dataclass(frozen=True)
class Frozen:
    """A scheme once its choice is made: the linear space in which the weight goes on training.

    mask: boolean, shape of the weight. signs: sign of each entry, of use where blocks are tied (else None).
    `apply` is the orthogonal projection onto that space: pruned entries are zero, tied blocks keep their
    signs and share the mean magnitude, which is what learning one magnitude per block comes to.
    """

    mask: Tensor
    conv_groups: int = 1
    ties: tuple[Tie, ...] = ()
    signs: Tensor | None = None

    def apply(self, w: Tensor) -> Tensor:
        """The nearest weight with this support and these ties; shape and dtype of `w`."""
        w = masked(w, self.mask)
        for tie in self.ties:
            assert self.signs is not None
            signs = self.signs.to(w.dtype) * self.mask
            total = tie.structure.sum(signs * w, self.conv_groups)
            mean = (total / tie.structure.sum(signs.abs(), self.conv_groups).clamp_min(1)).clamp_min(0)
            tied = tie.structure.spread(tie.tied, w.shape, self.conv_groups)
            w = torch.where(tied, signs * tie.structure.spread(mean, w.shape, self.conv_groups), w)
        return w

    def tighten(self, mask: Tensor) -> Frozen:
        """The same with only the entries that `mask` keeps too."""
        return Frozen(self.mask & mask, self.conv_groups, self.ties, self.signs)


@dataclass(frozen=True)
class Scheme:
    """One or more rules, applied in order. Made by `catalog.scheme`.

    density: the kept share of weights it aims at (unification does not change it).

    >>> from espalier.sparsity.catalog import scheme
    >>> scheme("filter", density=0.5).project(torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
    tensor([[3., 4.],
            [0., 0.]])
    """

    name: str
    density: float
    rules: tuple[Rule, ...]
    options: Mapping[str, object] = field(default_factory=dict)

    def fit(self, w: Tensor, conv_groups: int = 1) -> Scheme:
        """The same with what of its structures depends on the weights, as `permute`; to be called before training.

        Without it rows stand in blocks with their neighbours.
        """
        if not any(rule.permute for rule in self.rules):
            return self
        rules = []
        for rule in self.rules:
            rules.append(rule.fit(w, conv_groups))
            w = rules[-1].project(w, conv_groups)
        return replace(self, rules=tuple(rules))

    def ordered(self, orders: Sequence[Tensor]) -> Scheme:
        """The same with these orders of rows, rule by rule (an empty tensor, or none at all: their own)."""
        given = [order if order.numel() else None for order in orders] or [None] * len(self.rules)
        structures = [replace(rule.structure, order=order) for rule, order in zip(self.rules, given, strict=True)]
        return replace(self, rules=tuple(replace(r, structure=s) for r, s in zip(self.rules, structures)))

    def project(self, w: Tensor, conv_groups: int = 1) -> Tensor:
        """`w` after every rule in turn. With one rule: the nearest weight that the scheme allows."""
        for rule in self.rules:
            w = rule.project(w, conv_groups)
        return w

    def mask(self, w: Tensor, conv_groups: int = 1) -> Tensor:
        """Boolean, shape of `w`: the entries that every rule in turn leaves alive."""
        mask = torch.ones_like(w, dtype=torch.bool)
        for rule in self.rules:
            mask &= rule.mask(w, conv_groups)
            w = rule.project(w, conv_groups)
        return mask

    def groups(self, w: Tensor, conv_groups: int = 1) -> tuple[Tensor, ...]:
        """The matrix ``[groups, size]`` of `w` for every rule."""
        return tuple(rule.groups(w, conv_groups) for rule in self.rules)

    def freeze(self, w: Tensor, conv_groups: int = 1, by: Sequence[Tensor | None] | None = None) -> Frozen:
        """The support and ties that this scheme chooses for `w`, from now on fixed.

        by: for every rule the scores (shape of `w`) that it chooses by, or None for `w` itself.
        """
        mask, ties = torch.ones_like(w, dtype=torch.bool), []
        for rule, scores in zip(self.rules, by or [None] * len(self.rules)):
            judged = w if scores is None or rule.snap.ties else masked(scores, mask)
            chosen = rule.chosen(judged, conv_groups)
            mask &= rule.snap.mask(judged.detach(), rule.structure, conv_groups, chosen)
            if rule.snap.ties:
                ties.append(Tie(rule.structure, chosen))
                w = rule.snap.apply(w.detach(), rule.structure, conv_groups, chosen)
            else:
                w = masked(w, mask)
        return Frozen(mask, conv_groups, tuple(ties), w.sign().to(torch.int8) if ties else None)


def _highest(loss: Tensor, sizes: Tensor, share: float) -> Tensor:
    """The groups with the highest loss by weight that together hold `share` of all weights, to within one group.

    loss, sizes: ``[groups]``; a group of size 0 never counts. At least one group stays unless the share is 0.
    Edge blocks hold fewer weights than others: by their loss alone they would always go first, and with them the last
    answers of a classifier.
    """
    least, most = sizes.aminmax()
    alike = sizes.numel() if least == most else int((sizes == most).count_nonzero())
    if alike == sizes.numel() or alike == int(sizes.count_nonzero()):
        count = 0 if share <= 0 else min(alike, max(1, math.floor(share * alike + 0.5)))
    else:  # edge blocks: count weights, not groups
        loss = loss / sizes.clamp_min(1)
        held = sizes[loss.argsort(descending=True, stable=True)].cumsum(0)
        wanted = share * float(held[-1])
        count = int((held <= wanted + 0.5 * float(sizes.max())).sum()) if share < 1 else int((sizes > 0).sum())
        count = max(count, 1 if share > 0 and held[-1] > 0 else 0)
    return ~_lowest(loss, loss.numel() - count)


def _lowest(loss: Tensor, count: int) -> Tensor:
    """Boolean mask of exactly `count` entries with the lowest loss; ties go to the first."""
    if count <= 0 or count >= loss.numel():
        return torch.full_like(loss, count > 0, dtype=torch.bool)
    if loss.device.type != "cpu":
        threshold = loss.kthvalue(count).values
    else:  # numpy's vectorised quickselect is several times faster than torch's here
        threshold = torch.from_numpy(np.partition(loss.numpy(), count - 1)[count - 1 : count])[0]
    low = loss <= threshold
    if extra := int(low.count_nonzero()) - count:
        low[(loss == threshold).nonzero()[-extra:, 0]] = False
    return low
