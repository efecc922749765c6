"""Damage: what a scheme does to a layer before anything is retrained, comparable from layer to layer.

The measure is the relative projection error ``||w - project(w)||^2 / ||w||^2``, 0 for an untouched layer and 1 for an
empty one, equally in every layer (small layers are protected as if they were large ones). Where it was measured what an
error costs in loss (`sensitivity`), a layer's error counts more or less by it, but only a little: what a layer loses
alone and before retraining says little about what the network loses after it. All our reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espalier.mapping.candidates import Candidate
from espalier.mapping.layers import Layer
from espalier.methods.allocate import weighed

_WEIGHTS, _ROWS = 1_000_000, 64  # of a large layer, that are looked at
_SAMPLE = 100_000  # groups that are sorted at most; more tell the same curve


@dataclass(frozen=True)
class Harm:
    """One measurement: at this relative error the loss rose by `loss`, and `points` of accuracy were lost."""

    error: float
    loss: float
    points: float


Harms = Mapping[str, Sequence[Harm]]  # site -> measurements


def errors(candidate: Candidate, w: Tensor, conv_groups: int, densities: Sequence[float]) -> np.ndarray:
    """The relative projection error of a weight at several densities, from one sorting of the groups.

    Densities above the candidate's ceiling give the error at the ceiling. Large weights are sampled.

    >>> errors(Candidate("filter"), torch.tensor([[3.0], [4.0]]), 1, [1.0, 0.5])
    array([0.  , 0.36])
    """
    w = w.detach()[:: max(1, min(w.shape[0] // _ROWS, w.numel() // _WEIGHTS))].float().cpu()
    whole = float(w.square().sum())
    if whole == 0:
        return np.zeros(len(densities))
    schemes = [candidate.at(density) for density in densities]
    projected = w
    for rule in schemes[0].rules[:-1]:  # what has a density of its own stands first
        projected = rule.project(projected, conv_groups)
    last = schemes[len(schemes) // 2].rules[-1].fit(projected, conv_groups)
    loss = last.snap.loss(projected, last.structure, conv_groups)
    loss = loss[:: max(1, loss.numel() // _SAMPLE)].sort(descending=True).values.double()
    kept = torch.cat([torch.zeros(1, dtype=torch.double), loss.cumsum(0)]).numpy()
    share = kept / max(kept[-1], 1e-30)
    at = np.array([chosen.rules[-1].free for chosen in schemes]) * (len(share) - 1)
    held = float(projected.square().sum()) / whole
    return np.maximum(0.0, 1 - held * np.interp(at, np.arange(len(share)), share))


class Damage:
    """What options cost, by site; curves are made when they are asked for, and kept."""

    def __init__(self, weights: Mapping[str, Tensor], layers: Mapping[str, Layer], harms: Harms | None = None) -> None:
        self.weights, self.layers, self.harms = weights, layers, harms
        self.weights_of_error = weighed(harms or {})
        self._curves: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    def error(self, site: str, candidate: Candidate | None, density: float) -> float:
        """Relative projection error at a density (None: dense)."""
        if candidate is None:
            return 0.0
        key = site, candidate.label
        if key not in self._curves:
            at = np.geomspace(0.01, candidate.ceiling, 48)
            groups = self.layers[site].site.conv_groups
            self._curves[key] = at, errors(candidate, self.weights[site], groups, at.tolist())
        return float(np.interp(density, *self._curves[key]))

    def __call__(self, site: str, candidate: Candidate | None, density: float) -> float:
        """What the allocation sums: the error, weighed by how sensitive the layer is among the others."""
        return self.error(site, candidate, density) * self.weights_of_error.get(site, 1.0)

    def points(self, site: str, candidate: Candidate | None, density: float) -> float:
        """Points of accuracy lost by this layer alone, before any retraining; 0 where nothing was measured.

        Rising from nothing, straight between the measured points and beyond the last.
        """
        harms = sorted((self.harms or {}).get(site, ()), key=lambda h: h.error)
        if not harms:
            return 0.0
        error = self.error(site, candidate, density)
        at = np.array([0.0, *[h.error for h in harms]])
        value = np.maximum.accumulate([0.0, *[max(0.0, h.points) for h in harms]])
        if error > at[-1] > 0:
            return float(value[-1] * error / at[-1])
        return float(np.interp(error, at, value))
