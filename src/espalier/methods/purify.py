"""Purification: what became useless in training is removed (P-RM, arXiv 1905.00136), and the paths nobody uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from espalier.graph import Couplings, couplings, liveness
from espalier.methods.base import Run
from espalier.methods.targets import cuttable


class Scored(Protocol):
    """What `train.evaluate` gives: accuracy 0..1, mean loss, and the number of samples it was measured on."""

    @property
    def accuracy(self) -> float:
        """0..1."""

    @property
    def loss(self) -> float:
        """The mean over samples."""

    @property
    def n(self) -> int:
        """How many samples."""


@dataclass(frozen=True)
class PurifyReport:
    """What purification did.

    before, after: accuracy in points. removed: site -> weights removed. evaluations: how many it took. rounds: that
    were kept. budget: points that could be spent once the standard errors were set aside.
    """

    before: float
    after: float
    removed: dict[str, int]
    evaluations: int
    rounds: int = 1
    budget: float = 0.0


@dataclass(frozen=True)
class _Candidate:
    """Groups of one site that may go, the least important first. `groups` numbers each entry's group."""

    site: str
    groups: Tensor
    order: Tensor


@dataclass(frozen=True)
class _Measure:
    points: float
    loss: float | None = None
    n: int = 0

    @property
    def error(self) -> float:
        """Standard error of the accuracy, in points; with no mistake seen at all it is that of one mistake."""
        if not self.n:
            return 0.0
        wrong = min(max(1 - self.points / 100, 1 / self.n), 1 - 1 / self.n)
        return 100 * (wrong * (1 - wrong) / self.n) ** 0.5


class _Meter:
    """Measures, and counts how often."""

    def __init__(self, evaluate: Callable[[], float | Scored]) -> None:
        self.evaluate, self.count = evaluate, 0

    def __call__(self) -> _Measure:
        self.count += 1
        made = self.evaluate()
        return _Measure(made) if isinstance(made, (int, float)) else _Measure(100 * made.accuracy, made.loss, made.n)


def purify(
    run: Run,
    evaluate: Callable[[], float | Scored],
    max_drop: float,
    *,
    errors: float = 1.0,
    max_loss: float | None = 0.5,
    emptiness: float = 0.0,
    rounds: int = 1,
    retrain: Callable[[], object] | None = None,
    gradients: Callable[[], object] | None = None,
    max_evaluations: int = 200,
) -> PurifyReport:
    """Remove the groups of every layer that are worth least, as many as `max_drop` points of accuracy allow.

    Candidates are, for each layer: channels (emptier than `emptiness`, the share of their columns that is zero),
    filters, and the groups of its scheme's own rules (columns, blocks, kernels). They are ranked by importance, and the
    threshold is the largest whose cost stays within the budget, found by bisection: automatic, as in the paper, whose
    thresholds come from a sensitivity scan. The budget opens evenly over the candidates, large layers first, so that no
    layer spends it alone. Then everything goes that only dead channels read or feed (unused paths).

    run: a finished run; its support is tightened.
    evaluate: the network as it is, on held-out data: accuracy in points, or a `train.Score` (better: it knows the loss
        and how many samples there are). Recalibrate batch norms in it where there are any.
    errors: with a `Score`, so many standard errors of the held-out accuracy are set aside from `max_drop`, so that a
        small hold-out is not trusted too much.
    max_loss: with a `Score`, by how much the held-out loss may grow, as a share of itself (a continuous measure, which
        small steps show in before the accuracy does); None for no limit.
    rounds, retrain: with `retrain` (train a while; `run` holds the support), so many rounds of purification and
        retraining. A round after whose retraining more than `max_drop` is lost is taken back and ends them.
    gradients: fills `.grad` of the weights on some batches; importance is then ``sum (w * gradient)^2``, what the loss
        would change by (first order). Without it, importance of groups is their squared norm; that of filters and
        channels is times the squared norm of what reads or feeds them, since a loud filter nobody hears is worth little
        (both our reading; the paper ranks by norm).
    """
    meter = _Meter(evaluate)
    first = meter()
    budget = max(0.0, max_drop - errors * first.error)
    removed = dict.fromkeys((t.site for t in run.targets), 0)
    last, kept = first, 0
    for _ in range(rounds):
        saved, limit = _snapshot(run), meter.count + max_evaluations
        alive = {site: int(mask.sum()) for site, mask in run.masks.items()}
        last = _one_round(run, meter, last, budget, max_loss, emptiness, gradients, limit)
        gone = {site: n - int(run.masks[site].sum()) for site, n in alive.items()}
        if not any(gone.values()):
            break
        if retrain is not None:
            retrain()
            after = meter()
            if after.points < first.points - budget - 1e-9:
                _put_back(run, saved)
                last = meter()
                break
            last = after
        kept += 1
        removed = {site: n + gone[site] for site, n in removed.items()}
    return PurifyReport(first.points, last.points, {s: n for s, n in removed.items() if n}, meter.count, kept, budget)


def remove_unused(run: Run) -> int:
    """Unused path removal: weights of filters that nobody reads and of channels that are always zero; how many went."""
    live, masks = liveness(run.graph), {}
    before = sum(int(mask.sum()) for mask in run.masks.values())
    for target in run.targets:
        rows = live.alive[live.root[live.found.labels[f"{target.site}@0"]]]
        mask = run.masks[target.site] & _along(rows.to(target.weight.device), 0, target.weight)
        if target.conv_groups == 1:
            columns = live.alive[live.root[live.found.labels[f"{target.site}@1"]]]
            mask = mask & _along(columns.to(target.weight.device), 1, target.weight)
        if bool(mask.any()):
            masks[target.site] = mask
    run.tighten(masks)
    return before - sum(int(mask.sum()) for mask in run.masks.values())


def _one_round(
    run: Run,
    meter: _Meter,
    start: _Measure,
    budget: float,
    max_loss: float | None,
    emptiness: float,
    gradients: Callable[[], object] | None,
    limit: int,
) -> _Measure:
    """One scan over all candidates. What the network measures afterwards."""
    best, spare = start, budget
    candidates = list(_candidates(run, emptiness, gradients))
    for k, candidate in enumerate(candidates):
        share = (k + 1) / len(candidates)
        floor = start.points - spare * share
        roof = None if max_loss is None or start.loss is None else start.loss * (1 + max_loss * share)
        low, high = 0, len(candidate.order)
        step = high  # all of it first, then by bisection
        while low < high and meter.count < limit:
            middle = step if step else (low + high + 1) // 2
            step = 0
            saved = _snapshot(run)
            run.tighten({candidate.site: _without(run, candidate, middle)})
            tried = meter()
            fine = tried.points >= floor - 1e-9 and (roof is None or tried.loss is None or tried.loss <= roof)
            if fine:
                low, best = middle, tried
            else:
                high = middle - 1
            _put_back(run, saved)
        if low:
            run.tighten({candidate.site: _without(run, candidate, low)})
    if candidates:
        remove_unused(run)
    return best


def _candidates(run: Run, emptiness: float, gradients: Callable[[], object] | None) -> Iterator[_Candidate]:
    """Channels, filters and the scheme's own groups of every site, large layers first."""
    worth = _worth(run, gradients)
    found, may = couplings(run.graph), cuttable(run.graph)
    fed, read = _traffic(run, found, worth)
    for target in sorted(run.targets, key=lambda t: -int(run.masks[t.site].sum())):
        weight, importance = target.weight.detach(), worth[target.site]
        rows, columns = (_roots(found, target.site, dim) for dim in (0, 1))
        if target.conv_groups == 1 and weight.shape[1] > 1:
            score = importance.movedim(1, 0).flatten(1).sum(1) * fed[columns].to(weight.device)
            yield from _ranked(target.site, _along(_numbers(weight, 1), 1, weight), score, _empty(weight) >= emptiness)
        if target.site in may:
            score = importance.flatten(1).sum(1) * read[rows].to(weight.device)
            yield from _ranked(target.site, _along(_numbers(weight, 0), 0, weight), score)
        for lane in target.lanes():
            size = len(lane.sizes)
            if lane.prunes and size not in (weight.shape[0], weight.shape[1]) and size <= weight.numel():
                numbers = lane.spread(torch.arange(size, device=weight.device))
                yield from _ranked(target.site, numbers, lane.mean(importance))


def _ranked(site: str, groups: Tensor, score: Tensor, eligible: Tensor | None = None) -> Iterator[_Candidate]:
    """The living and eligible, all but the most important one."""
    order = score.argsort()
    order = order[((score > 0) if eligible is None else (score > 0) & eligible)[order]]
    if len(order) > 1:
        yield _Candidate(site, groups, order[:-1])


def _worth(run: Run, gradients: Callable[[], object] | None) -> dict[str, Tensor]:
    """The importance of every weight."""
    if gradients is None:
        return {t.site: t.weight.detach().float().square() for t in run.targets}
    gradients()
    made = {}
    for t in run.targets:
        slope = torch.zeros_like(t.weight) if t.weight.grad is None else t.weight.grad
        made[t.site] = (t.weight.detach() * slope).float().square() + 1e-12 * t.weight.detach().float().square()
        t.weight.grad = None
    return made


def _traffic(run: Run, found: Couplings, worth: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """For each coupling: how much feeds it and how much reads it, 1 where that is no weight of a target."""
    sums, known = torch.zeros(2, len(found.parent)), torch.zeros(2, len(found.parent), dtype=torch.bool)
    for t in run.targets:
        for dim in (0, 1) if t.conv_groups == 1 else (0,):
            roots = _roots(found, t.site, dim)
            sums[dim].index_add_(0, roots, worth[t.site].cpu().movedim(dim, 0).flatten(1).sum(1))
            known[dim, roots] = True
    fed, read = torch.where(known, sums, 1.0)
    return fed, read


def _roots(found: Couplings, site: str, dim: int) -> Tensor:
    """The coupling of each filter (0) or channel (1) of a site."""
    return torch.tensor([found.find(label) for label in found.labels[f"{site}@{dim}"].tolist()])


def _empty(weight: Tensor) -> Tensor:
    """The share of each channel's columns that is zero."""
    columns = (weight == 0).movedim(1, 0).reshape(weight.shape[1], weight.shape[0], -1)
    return columns.all(1).float().mean(1) if weight.ndim > 2 else columns.flatten(1).float().mean(1)


def _numbers(weight: Tensor, dim: int) -> Tensor:
    return torch.arange(weight.shape[dim], device=weight.device)


def _along(vector: Tensor, dim: int, weight: Tensor) -> Tensor:
    return vector.reshape([-1 if d == dim else 1 for d in range(weight.ndim)]).expand(weight.shape)


def _without(run: Run, candidate: _Candidate, count: int) -> Tensor:
    goes = torch.zeros(int(candidate.groups.max()) + 1, dtype=torch.bool, device=candidate.groups.device)
    goes[candidate.order[:count]] = True
    return run.masks[candidate.site] & ~goes[candidate.groups]


def _snapshot(run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return run.state_dict(), {n: t.detach().clone() for n, t in run.graph.tensors.items()}


def _put_back(run: Run, saved: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    run.load_state_dict(saved[0])
    with torch.no_grad():
        for name, tensor in saved[1].items():
            run.graph.tensors[name].copy_(tensor)
