"""Purification: channels and filters that became useless in training are removed (P-RM, arXiv 1905.00136)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.graph import Graph, couplings
from espalier.methods.base import Run


@dataclass(frozen=True)
class PurifyReport:
    """What purification did.

    before, after: what `evaluate` gave, in points. removed: site -> weights removed. evaluations: how many it took.
    """

    before: float
    after: float
    removed: dict[str, int]
    evaluations: int


@dataclass(frozen=True)
class _Candidate:
    """Channels or filters of one site, the least important first; `dim` is 1 for channels, 0 for filters."""

    site: str
    dim: int
    order: Tensor


def purify(
    run: Run, evaluate: Callable[[], float], max_drop: float, *, emptiness: float = 0.5, max_evaluations: int = 200
) -> PurifyReport:
    """Remove the channels and filters of every layer that are worth least, as many as `max_drop` points allow.

    run: a finished run; its support is tightened. evaluate: accuracy in points on held-out data, with the network as it
    is. For each layer the channels that are emptier than `emptiness` (eta, the share of zero columns) are ranked by the
    squared norm of what is left of them (sigma), and filters by theirs; the threshold is the largest whose cost stays
    under the budget, found by bisection. The budget opens evenly over the layers, small layers last, so that no layer
    spends it alone (our reading; the paper sets thresholds by layer through a sensitivity scan).
    """
    before = evaluate()
    score, count, removed = before, 1, dict.fromkeys((t.site for t in run.targets), 0)
    candidates = list(_candidates(run, emptiness))
    for k, candidate in enumerate(candidates):
        floor = before - max_drop * (k + 1) / len(candidates)
        low, high, best = 0, len(candidate.order), score
        while low < high and count < max_evaluations:
            middle = (low + high + 1) // 2
            saved = _snapshot(run)
            run.tighten({candidate.site: _keep(run, candidate, middle)})
            tried = evaluate()
            count += 1
            if tried >= floor:
                low, best = middle, tried
            else:
                high = middle - 1
            _put_back(run, saved)
        if low:
            nonzero = int(run.masks[candidate.site].sum())
            run.tighten({candidate.site: _keep(run, candidate, low)})
            removed[candidate.site] += nonzero - int(run.masks[candidate.site].sum())
            score = best
    return PurifyReport(before, score, {site: n for site, n in removed.items() if n}, count)


def _candidates(run: Run, emptiness: float) -> Iterator[_Candidate]:
    cuttable = _cuttable(run.graph)
    for target in sorted(run.targets, key=lambda t: -t.weight.numel()):
        weight = target.weight.detach()
        if weight.shape[1] > 1:
            columns = weight.movedim(1, 0).reshape(weight.shape[1], weight.shape[0], -1)
            eta = (
                (columns == 0).all(1).float().mean(1) if weight.ndim > 2 else (columns == 0).flatten(1).float().mean(1)
            )
            yield from _ranked(target.site, 1, columns.flatten(1).square().sum(1), eta >= emptiness)
        if target.site in cuttable:
            sigma = weight.flatten(1).square().sum(1)
            yield from _ranked(target.site, 0, sigma, torch.ones_like(sigma, dtype=torch.bool))


def _ranked(site: str, dim: int, sigma: Tensor, eligible: Tensor) -> Iterator[_Candidate]:
    """The living and eligible, all but the most important one."""
    order = sigma.argsort()
    order = order[(eligible & (sigma > 0))[order]]
    if len(order) > 1:
        yield _Candidate(site, dim, order[:-1])


def _cuttable(graph: Graph) -> set[str]:
    """The sites whose filters may go: not those that make the network's outputs or feed what nobody understands."""
    found = couplings(graph)
    return {
        site
        for site in graph.sites()
        if not any(found.find(label) in found.frozen for label in found.labels[f"{site}@0"].tolist())
    }


def _keep(run: Run, candidate: _Candidate, count: int) -> Tensor:
    mask = run.masks[candidate.site].clone()
    mask.movedim(candidate.dim, 0)[candidate.order[:count]] = False
    return mask


def _snapshot(run: Run) -> tuple[dict[str, object], dict[str, Tensor]]:
    names = {t.site for t in run.targets} | {n for n, t in run.graph.tensors.items() if t.ndim == 1}
    return run.state_dict(), {n: run.graph.tensors[n].detach().clone() for n in names}


def _put_back(run: Run, saved: tuple[dict[str, object], dict[str, Tensor]]) -> None:
    run.load_state_dict(saved[0])
    with torch.no_grad():
        for name, tensor in saved[1].items():
            run.graph.tensors[name].copy_(tensor)
