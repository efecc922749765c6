"""Targets: the weights on their way into schemes, and the choice of groups where filters are coupled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from espalier.errors import MethodError
from espalier.graph import Graph, couplings, needed
from espalier.sparsity import CATALOG, Frozen, Rule, Scheme, Zero

FILTER = CATALOG["filter"].pattern


@dataclass(frozen=True)
class Target:
    """A weight on its way into a scheme.

    positions: output positions per sample, so that a weight costs as many multiply-accumulates.
    scale: the weight of the batch norm that reads the filters, where there is one.
    rows: for each filter the number of its coupling, where other targets prune filters of it too; else None.
    graph: that the weight belongs to.
    """

    site: str
    weight: nn.Parameter
    scheme: Scheme
    conv_groups: int
    positions: int = 1
    scale: Tensor | None = None
    rows: Tensor | None = None
    graph: Graph | None = field(default=None, repr=False, compare=False)

    def lanes(self) -> list[Lane]:
        """The rules of the scheme, each at work on this weight."""
        return [Lane(self, r) for r in range(len(self.scheme.rules))]


@dataclass(frozen=True)
class Lane:
    """One rule at work on one weight: what methods with a copy, a penalty or a parameter for every rule go through."""

    target: Target
    r: int

    @property
    def rule(self) -> Rule:
        """The rule itself."""
        return self.target.scheme.rules[self.r]

    @property
    def open(self) -> bool:
        """No density is asked for: a method that finds densities may prune here what it likes."""
        return self.prunes and self.rule.free >= 1

    @property
    def prunes(self) -> bool:
        """Whole groups become zero (not patterns, N:M or ties)."""
        return isinstance(self.rule.snap, Zero)

    @property
    def sizes(self) -> Tensor:
        """How many weights each group holds, ``[groups]`` on the CPU."""
        return self.rule.structure.group_sizes(self.target.weight.shape, self.target.conv_groups)

    def key(self, name: str) -> str:
        """The name of a tensor of this lane in a run's state."""
        return f"{self.target.site}/{name}{self.r}"

    def outside(self, w: Tensor) -> Tensor:
        """What the rule would take away if it snapped every group: ``w - nearest(w)``, shape of `w`."""
        return w if self.prunes else w - self.nearest(w)

    def nearest(self, w: Tensor) -> Tensor:
        """`w` with every group snapped."""
        if self.prunes:
            return torch.zeros_like(w)
        every = torch.ones(len(self.sizes), dtype=torch.bool, device=w.device)
        return self.rule.snap.apply(w, self.rule.structure, self.target.conv_groups, every)

    def sum(self, w: Tensor) -> Tensor:
        """The sum of every group, ``[groups]``."""
        return self.rule.structure.sum(w, self.target.conv_groups)

    def mean(self, w: Tensor) -> Tensor:
        """The mean of every group, ``[groups]``: edge blocks hold fewer weights than others."""
        return self.sum(w) / self.sizes.to(w.device)

    def spread(self, vector: Tensor) -> Tensor:
        """``[groups]`` -> shape of the weight: every entry holds its group's number."""
        return self.rule.structure.spread(vector, self.target.weight.shape, self.target.conv_groups)


def targets(graph: Graph, schemes: Mapping[str, Scheme]) -> list[Target]:
    """The targets of a plan on `graph`. Raises MethodError for a site that is not trained."""
    sites, made = graph.sites(), []
    scales = _scales(graph)
    for site, scheme in schemes.items():
        weight = graph.tensors[site]
        if not isinstance(weight, nn.Parameter):
            raise MethodError(f"{site} is a buffer, not a parameter: leave it out of the plan")
        facts = sites[site]
        fitted = scheme.fit(weight, facts.conv_groups)
        made.append(Target(site, weight, fitted, facts.conv_groups, facts.positions, scales.get(site), graph=graph))
    return _coupled(graph, made)


def cuttable(graph: Graph) -> set[str]:
    """The sites whose filters may go: not those that make the network's outputs or feed what nobody understands."""
    found = couplings(graph)
    return {
        site
        for site in graph.sites()
        if not any(found.find(label) in found.frozen for label in found.labels[f"{site}@0"].tolist())
    }


def judged(targets: Sequence[Target], tensors: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
    """site -> what rule `r` of its scheme chooses by: the tensor itself, or a joint score of coupled filters.

    Filters that a residual add (or anything else) couples are one decision: a channel only goes when all of them do.
    Their joint score is the sum of their squared norms, each in relation to the mean in its layer (our reading), and
    the same for all, so that each layer keeps the first of one ranking.
    """
    made = {t.site: tensors[t.site] for t in targets if r < len(t.scheme.rules)}
    joint = [t for t in targets if t.rows is not None and r < len(t.scheme.rules) and filters(t.scheme.rules[r])]
    if not joint:
        return made
    count = 1 + max(int(t.rows.max()) for t in joint if t.rows is not None)
    scores = torch.zeros(count, device=joint[0].weight.device)
    for t in joint:
        squares = tensors[t.site].detach().float().flatten(1).square().sum(1)
        scores.index_add_(0, t.rows.to(scores.device), squares / squares.mean().clamp_min(1e-30))  # type: ignore[union-attr]
    for t in joint:
        rows = scores[t.rows.to(scores.device)].sqrt()  # type: ignore[union-attr]
        shape = t.weight.shape
        made[t.site] = (rows / shape[1:].numel() ** 0.5).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    return made


def freeze(
    targets: Sequence[Target],
    by: Mapping[str, Sequence[Tensor]] | None = None,
    found: Mapping[str, Sequence[Tensor | None]] | None = None,
    schemes: Mapping[str, Scheme] | None = None,
) -> dict[str, Frozen]:
    """The support of every target, from now on fixed.

    by: site -> for every rule the scores (shape of the weight) that it chooses by; the weights themselves by default.
    found: site -> for every rule that had no density to keep the groups that live (bool ``[groups]``), else None.
    schemes: site -> another scheme than the target's, with the same rules at other densities (on the way there).
    """
    asked = {t.site: schemes[t.site] if schemes else t.scheme for t in targets}
    alive = {t.site: _alive(t, (found or {}).get(t.site, [])) for t in targets}
    scores = _scores(targets, by)
    made = {t.site: _frozen(t, asked[t.site], alive[t.site], scores[t.site]) for t in targets}
    heard = _heard(targets, made)
    again = [t for t in targets if t.site in heard]
    return made | {t.site: _frozen(t, asked[t.site], alive[t.site], scores[t.site], heard[t.site]) for t in again}


def _scores(targets: Sequence[Target], by: Mapping[str, Sequence[Tensor]] | None) -> dict[str, list[Tensor | None]]:
    """site -> for every rule what it chooses by; None for the weight itself."""
    weights = {t.site: t.weight.detach() for t in targets}
    chosen: dict[str, list[Tensor | None]] = {t.site: [] for t in targets}
    for r in range(max((len(t.scheme.rules) for t in targets), default=0)):
        here = {t.site: by[t.site][r] if by else weights[t.site] for t in targets if r < len(t.scheme.rules)}
        for site, scores in judged([t for t in targets if t.site in here], here, r).items():
            chosen[site].append(None if scores is weights[site] else scores)
    return chosen


def _frozen(
    target: Target, scheme: Scheme, alive: Tensor, scores: Sequence[Tensor | None], heard: Tensor | None = None
) -> Frozen:
    """The support of one target inside of what is `alive`. heard: what to keep first, but for whole filters."""
    weight, by = target.weight.detach().masked_fill(~alive, 0), list[Tensor | None]()
    for rule, given in zip(scheme.rules, scores):
        judging = given if given is None else given.masked_fill(~alive, 0)
        if heard is not None and not filters(rule):
            judging = (weight if judging is None else judging).masked_fill(~heard, 0)
        by.append(judging)
    frozen = scheme.freeze(weight, target.conv_groups, by)
    return replace(frozen, mask=frozen.mask & alive)


def _alive(target: Target, found: Sequence[Tensor | None]) -> Tensor:
    """What a method that finds densities left alive, shape of the weight."""
    alive = torch.ones_like(target.weight, dtype=torch.bool)
    for lane, living in zip(target.lanes(), found):
        if living is not None:
            alive &= lane.spread(living)
    return alive


def _heard(targets: Sequence[Target], made: Mapping[str, Frozen]) -> dict[str, Tensor]:
    """site -> which entries of its weight count without the filters that are pruned; only of those that lose some.

    A layer loses with its neighbours' filters what reads them, and with a depthwise conv's what makes them. Chosen on
    its own it would keep much of that, and a network with few channels left would die.
    """
    cut, weights = {}, {t.site: t.weight.detach() for t in targets}
    for t in targets:
        if any(map(filters, t.scheme.rules)):
            dead = ~made[t.site].mask.flatten(1).any(1)
            cut[t.site] = weights[t.site].masked_fill(dead.reshape(-1, *[1] * (t.weight.ndim - 1)), 0)
    graph = next((t.graph for t in targets if t.graph is not None), None)
    if not cut or graph is None:
        return {}
    kernels = {site: mask for site, mask in needed(graph, cut).items() if site in weights and not bool(mask.all())}
    return {site: _entries(mask, weights[site]) for site, mask in kernels.items()}


def _entries(kernels: Tensor, weight: Tensor) -> Tensor:
    """``[outputs, inputs]`` -> shape of the weight."""
    return kernels.to(weight.device).reshape(*kernels.shape, *[1] * (weight.ndim - 2)).expand_as(weight)


def filters(rule: Rule) -> bool:
    """Whether its groups are whole filters: when one goes, what reads it and its affine part go with it."""
    return rule.structure.pattern == FILTER


def _scales(graph: Graph) -> dict[str, Tensor]:
    """site -> the weight of the batch norm that reads its output, and nothing else does."""
    readers, made = graph.readers(), {}
    for node in graph.nodes:
        if node.op in ("conv", "linear") and node.inputs[1] in graph.tensors:
            following = readers[node.outputs[0]]
            if len(following) == 1 and following[0].op == "batch_norm" and following[0].inputs[3] is not None:
                made[str(node.inputs[1])] = graph.tensors[following[0].inputs[3]]
    return made


def _coupled(graph: Graph, made: list[Target]) -> list[Target]:
    """The targets with `rows` where filters of several are coupled."""
    prune = [t for t in made if any(filters(rule) and rule.free < 1 for rule in t.scheme.rules)]
    if len(prune) < 2:
        return made
    found = couplings(graph)
    rows = {t.site: torch.tensor([found.find(k) for k in found.labels[f"{t.site}@0"].tolist()]) for t in prune}
    labels, counts = torch.cat(list(rows.values())).unique(return_counts=True)
    shared = labels[counts > 1]
    return [
        replace(t, rows=torch.searchsorted(labels, rows[t.site]))
        if t.site in rows and bool(torch.isin(rows[t.site], shared).any())
        else t
        for t in made
    ]
