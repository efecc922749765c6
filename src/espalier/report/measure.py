"""What a network costs: weights, multiply-accumulates, bytes."""

from __future__ import annotations

from dataclasses import dataclass

from espalier.graph.ir import Graph


@dataclass(frozen=True)
class Size:
    """Counts of a network, for one sample.

    weights, nonzero: entries of conv and linear weights, and those that are not zero.
    parameters: all trainable numbers.
    macs: dense multiply-accumulates; useful_macs: those whose weight is not zero.
    """

    weights: int
    nonzero: int
    parameters: int
    macs: int
    useful_macs: int

    @property
    def density(self) -> float:
        """The kept share of conv and linear weights, 0..1."""
        return self.nonzero / max(1, self.weights)


@dataclass(frozen=True)
class SiteSize:
    """The counts of one site."""

    site: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    macs: int


def sizes(graph: Graph) -> list[SiteSize]:
    """The counts of every site, in order."""
    return [
        SiteSize(s.name, s.shape, s.weights, int(graph.tensors[s.name].count_nonzero()), s.macs)
        for s in graph.sites().values()
    ]


def size(graph: Graph) -> Size:
    """The counts of a network.

    >>> size(capture(torch.nn.Linear(4, 2), torch.ones(1, 4))).weights
    8
    """
    rows, sites = sizes(graph), graph.sites()
    return Size(
        weights=sum(row.weights for row in rows),
        nonzero=sum(row.nonzero for row in rows),
        parameters=sum(graph.tensors[name].numel() for name in graph.parameters),
        macs=sum(row.macs for row in rows),
        useful_macs=sum(row.nonzero * sites[row.site].positions for row in rows),
    )
