"""Candidates: the regularities that a layer may get, by its type, from the smallest block to coarse structures.

A ladder is ordered by how many weights live and die together: the further down, the cheaper the engine's bookkeeping
and the dearer the accuracy. Both ends are there: single weights (block = 1), and whole columns and filters.

Source: arXiv 2111.11581 (mapping), which gives block-punched or pattern to 3 x 3 convs and block rows and columns to
1 x 1 convs and linear layers. The sizes are our reading: the engine's row blocks have heights up to 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from espalier.mapping.layers import Layer
from espalier.sparsity import Scheme, ceiling, scheme, unfit

GRID = (0.7, 0.45, 0.2, 0.05, 0.025)  # densities that are measured; in between, the table interpolates


@dataclass(frozen=True)
class Candidate:
    """A scheme without its density. coarse: structured pruning of whole rows or columns of the GEMM matrix."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    coarse: bool = False

    @cached_property
    def label(self) -> str:
        """The name with its sizes, as it stands in tables: ``block_punched m=8 n=4``; rows in any order are as fast."""
        return " ".join([self.name, *[f"{key}={value}" for key, value in self.options.items() if key != "permute"]])

    @cached_property
    def ceiling(self) -> float:
        """The highest density that it can have."""
        return ceiling(scheme(self.name, **self.options))

    def at(self, density: float) -> Scheme:
        """The scheme at a density, no higher than the ceiling.

        >>> Candidate("pattern+kernel").at(0.9).density
        0.4444444444444444
        """
        return scheme(self.name, min(density, self.ceiling), **self.options)

    def fits(self, layer: Layer) -> bool:
        """Can the layer take it? Never a filter scheme on the network's answers."""
        return unfit(scheme(self.name, **self.options), layer.site) is None and not (
            layer.answers and self.name == "filter"
        )


_COARSE = (Candidate("column", coarse=True), Candidate("filter", coarse=True))
CHANNELS = _COARSE[1]  # what a depthwise conv may get: whole channels, which go from what feeds and reads it too
WINDOWED = (
    Candidate("weight"),
    Candidate("pattern+kernel"),
    Candidate("block_punched", {"m": 2, "n": 1, "permute": True}),
    Candidate("block_punched", {"m": 4, "n": 1, "permute": True}),
    Candidate("block_punched", {"m": 8, "n": 1, "permute": True}),
    Candidate("block_punched", {"m": 8, "n": 4, "permute": True}),
    Candidate("block_punched", {"m": 16, "n": 4, "permute": True}),
    *_COARSE,
)
POINTWISE = (
    Candidate("weight"),
    Candidate("block_column", {"m": 4, "permute": True}),
    Candidate("block_column", {"m": 8, "permute": True}),
    Candidate("block_column", {"m": 16, "permute": True}),
    Candidate("block_punched", {"m": 8, "n": 4, "permute": True}),
    Candidate("block_punched", {"m": 16, "n": 4, "permute": True}),
    *_COARSE,
)


def ladder(layer: Layer) -> tuple[Candidate, ...]:
    """The candidates that a layer is measured in, smallest blocks first; none for a depthwise conv (see CHANNELS)."""
    if layer.site.depthwise:
        return ()
    return tuple(c for c in (POINTWISE if layer.pointwise else WINDOWED) if c.fits(layer))


def find(label: str) -> Candidate:
    """The candidate of a label. Raises KeyError for one that no ladder has."""
    return _BY_LABEL[label]


_BY_LABEL = {c.label: c for c in (*WINDOWED, *POINTWISE)}
