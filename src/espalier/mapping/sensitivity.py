"""Sensitivity: what every layer loses in every scheme, alone and before any retraining."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import DataError
from espalier.graph.ir import Graph
from espalier.mapping.candidates import Candidate, ladder
from espalier.mapping.damage import Harm, Harms, errors
from espalier.mapping.layers import layers
from espalier.sparsity import Scheme

Evaluate = Callable[[nn.Module], tuple[float, float]]
"""Accuracy in points (0..100) and mean loss of a classifier as it is, on held-out data."""

QUICK = (0.4, 0.15)
DENSITIES = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)


def scored(batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluate:
    """An `Evaluate` of batches (inputs, labels), which are kept.

    >>> scored([(torch.eye(2), torch.tensor([0, 1]))])(nn.Identity())[0]
    100.0
    """
    kept = list(batches)
    if not kept:
        raise DataError("there is no batch to evaluate on")

    def evaluate(model: nn.Module) -> tuple[float, float]:
        flags = [(module, module.training) for module in model.modules()]
        right, loss, count = 0, 0.0, 0
        model.eval()
        with torch.no_grad():
            for x, y in kept:
                out = model(x).float()
                right += int((out.argmax(1) == y).sum())
                loss += float(F.cross_entropy(out, y, reduction="sum"))
                count += len(y)
        for module, training in flags:
            module.training = training
        return 100.0 * right / count, loss / count

    return evaluate


@dataclass(frozen=True)
class Point:
    """One measurement: a site alone in a scheme. drop: points of accuracy lost; rise: of the loss."""

    site: str
    scheme: str
    density: float
    error: float
    accuracy: float
    loss: float
    drop: float
    rise: float


@dataclass(frozen=True)
class Sensitivity:
    """All points of a network, and what it scores unpruned."""

    accuracy: float
    loss: float
    points: tuple[Point, ...]

    def harms(self) -> dict[str, list[Harm]]:
        """For the allocation: by site, every scheme's points over their error."""
        found: dict[str, list[Harm]] = {}
        for p in self.points:
            found.setdefault(p.site, []).append(Harm(p.error, p.rise, p.drop))
        return found

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `measure_sensitivity` wrote. Raises DataError that names the file."""
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(held["accuracy"], held["loss"], tuple(Point(**row) for row in held["points"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: is no sensitivity file: {error}. Make one by `espalier sensitivity`") from None


def measure_sensitivity(
    graph: Graph,
    model: nn.Module,
    evaluate: Evaluate,
    file: str | Path,
    *,
    densities: Sequence[float] = DENSITIES,
    schemes: Sequence[str] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Score the network with one layer pruned at a time, in every candidate of its ladder, at several densities.

    graph: captured from `model`, with which it shares its weights; they are put back. schemes: labels of candidates,
    such as "column"; all by default. file: JSON, written whole after every layer and scheme; a call that finds it goes
    on from there. Raises DataError when it holds another network's or other data's points.
    """
    path, found = Path(file), layers(graph)
    accuracy, loss = evaluate(model)
    weights = hashlib.sha256()
    for name in found:
        weights.update(graph.tensors[name].detach().cpu().contiguous().numpy().tobytes())
    who = {"weights": weights.hexdigest()[:16], "accuracy": accuracy, "loss": loss}
    points = _resumed(path, who)
    done = {(p.site, p.scheme, round(p.density, 6)) for p in points}
    jobs = [
        (site, candidate)
        for site, layer in found.items()
        for candidate in ladder(layer)
        if not schemes or candidate.label in schemes or candidate.name in schemes
    ]
    for number, (site, candidate) in enumerate(jobs):
        tell(f"{site}, {candidate.label}: {number + 1} of {len(jobs)}")
        at = sorted({min(d, candidate.ceiling) for d in densities}, reverse=True)
        wanted = [d for d in at if (site, candidate.label, round(d, 6)) not in done]
        if wanted:
            points += _points(graph, model, evaluate, site, candidate, wanted, (accuracy, loss))
            _write(path, who, points)
    _write(path, who, points)
    return Sensitivity(accuracy, loss, tuple(points))


def quick_harms(
    graph: Graph, model: nn.Module, evaluate: Evaluate, sites: Iterable[str], candidate: Candidate | None = None
) -> Harms:
    """A few points for each site: one scheme (single weights, unless told), two densities.

    Other schemes are read off by their projection errors: equal error, equal harm (our reading).
    """
    dense = evaluate(model)
    chosen = candidate or Candidate("weight")
    made = {}
    for site in sites:
        points = _points(graph, model, evaluate, site, chosen, QUICK, dense)
        made[site] = [Harm(p.error, p.rise, p.drop) for p in points]
    return made


def _points(
    graph: Graph,
    model: nn.Module,
    evaluate: Evaluate,
    site: str,
    candidate: Candidate,
    densities: Sequence[float],
    dense: tuple[float, float],
) -> list[Point]:
    groups, weight = graph.sites()[site].conv_groups, graph.tensors[site]
    lost = errors(candidate, weight, groups, densities)
    made = []
    for density, error in zip(densities, lost.tolist()):
        with pruned(weight, candidate.at(density), groups):
            accuracy, loss = evaluate(model)
        drop, rise = dense[0] - accuracy, loss - dense[1]
        made.append(Point(site, candidate.label, density, error, accuracy, loss, drop, rise))
    return made


@contextmanager
def pruned(weight: Tensor, scheme: Scheme, conv_groups: int) -> Iterator[None]:
    """The weight projected, for a while; afterwards it is as before, bit for bit."""
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(scheme.fit(before, conv_groups).project(before, conv_groups))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _resumed(path: Path, who: dict[str, object]) -> list[Point]:
    if not path.exists():
        return []
    held = Sensitivity.load(path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    if {key: stored.get(key) for key in who} != who:
        raise DataError(f"{path} holds the points of other weights or other data: choose another file, or remove it")
    return list(held.points)


def _write(path: Path, who: dict[str, object], points: list[Point]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**who, "points": [asdict(p) for p in points]}, indent=1), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}. Run it again: it goes on where it was") from None
