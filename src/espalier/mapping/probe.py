"""Probe: the network itself as the bench on which its layers are timed.

A layer timed alone has its weights in the first cache and its input just written; in a network neither holds. So
whole networks are run in which *every* layer has the scheme and density in question, and the engine's own profile
says what each layer took: one run measures all layers, where they stand, with what is fused into them. The sum of
all steps then is the network's latency, up to the overhead of the call, which is measured too.

The weights are random, masked, and scaled so that activations neither vanish nor explode (numbers too small for
their exponent are slow on some processors): a table depends on shapes only. A finished plan is measured with the masks
that the network's own weights ask for (of large layers: some of their rows, see `stripes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from espalier.graph import needed, shrink_graph
from espalier.graph.ir import Graph, Site
from espalier.mapping.clock import Profile
from espalier.mapping.layers import Layer
from espalier.mapping.stripes import repeated, stripes
from espalier.methods.targets import filters
from espalier.sparsity import Scheme
from espalier.sparsity.masked import masked


class Probe:
    """Variants of one network with random weights in given schemes."""

    def __init__(self, graph: Graph, layers: Mapping[str, Layer]) -> None:
        self.graph, self.layers = graph, layers
        self._owner = {node: site for site, layer in layers.items() for node in layer.nodes}
        self._neutral = _neutral_norms(graph)
        self._random: dict[torch.Size, Tensor] = {}
        self._made: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()

    def variant(self, schemes: Mapping[str, Scheme], own: bool = False) -> Graph:
        """The network with random weights, those of `schemes` masked; the given graph is not changed.

        own: masked as the network's own weights ask for, and shrunk: as it will be when it is trained, since trained
        weights die in rows and columns more than random ones do. Else as random weights ask for, for a table that
        depends on shapes only, and shrunk only where depthwise convs lose channels: that is what they lose them for.
        """
        tensors = {**self.graph.tensors, **self._neutral}
        heard = self._heard(schemes) if own else {}
        for name in self.layers:
            chosen = schemes.get(name)
            tensors[name] = self._own(name, chosen, heard.get(name)) if own else self._weight(name, chosen)
        made = replace(self.graph, tensors=tensors)
        return shrink_graph(made)[0] if own or any(self.layers[s].site.depthwise for s in schemes) else made

    def narrowing(self) -> list[str]:
        """The depthwise convs whose channels can be taken out of the network. It is tried: each loses its first."""
        sites = [name for name, layer in self.layers.items() if layer.site.depthwise]
        if not sites:
            return []
        tensors = {**self.graph.tensors, **self._neutral}
        for name in sites:
            tensors[name] = self._weight(name, None).clone()
            tensors[name][0] = 0
        cut = shrink_graph(replace(self.graph, tensors=tensors))[1].shapes
        return [name for name in sites if name in cut]

    def attribute(self, profile: Profile) -> tuple[dict[str, float], float]:
        """Milliseconds of every site, and of the steps that belong to none.

        A step is named after its node (``conv2d_3``, with what prepares it as ``conv2d_3/phases``), or after several
        joined by "+", whose time is then shared by their multiply-accumulates.
        """
        spent = dict.fromkeys(self.layers, 0.0)
        rest = 0.0
        for step, ms in profile.steps.items():
            owners = [self._owner[n] for n in step.partition("/")[0].split("+") if n in self._owner]
            macs = sum(self.layers[site].site.macs for site in owners)
            for site in owners:
                spent[site] += ms * self.layers[site].site.macs / macs
            if not owners:
                rest += ms
        return spent, rest

    def _heard(self, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
        """site -> which kernels count without the filters that go (as when methods choose); none where none go."""
        pruned = {name: scheme for name, scheme in schemes.items() if any(map(filters, scheme.rules))}
        own = {name: self.graph.tensors[name].detach() for name in pruned}
        cut = {name: scheme.project(own[name], self.layers[name].site.conv_groups) for name, scheme in pruned.items()}
        return needed(self.graph, cut) if cut else {}

    def _own(self, name: str, scheme: Scheme | None, heard: Tensor | None) -> Tensor:
        """A site's random weight with the mask that the scheme makes of its own, and of its `heard` kernels first."""
        if scheme is None:
            return self._weight(name, None)
        site = self.layers[name].site
        count = stripes(site)
        own = self.graph.tensors[name].detach()[::count].float().cpu()  # as many rows as a stripe has
        if heard is not None and not any(map(filters, scheme.rules)):
            own = masked(own, heard[::count].reshape(*own.shape[:2], *[1] * (own.ndim - 2)))
        keep = scheme.project(own, site.conv_groups) != 0
        fan_in = max(1.0, math.prod(site.shape[1:]) * float(keep.float().mean()))
        return repeated(masked(self._stripe(site), keep).mul_(math.sqrt(2.0 / fan_in)), count)

    def _weight(self, name: str, scheme: Scheme | None) -> Tensor:
        """A site's random weight, masked. Equal sites share one, for as long as somebody holds it."""
        site = self.layers[name].site
        key = (site.shape, site.conv_groups, *((scheme.name, repr(scheme.options), scheme.density) if scheme else ()))
        if (known := self._made.get(key)) is not None:
            return known
        stripe = self._stripe(site)
        fan_in = max(1.0, math.prod(site.shape[1:]) * (scheme.density if scheme else 1.0))
        stripe = scheme.project(stripe, site.conv_groups) if scheme else stripe
        self._made[key] = made = repeated(stripe * math.sqrt(2.0 / fan_in), stripes(site))
        return made

    def _stripe(self, site: Site) -> Tensor:
        """Random numbers: the weight of a site, or one of the stripes that it is made of."""
        shape = torch.Size((site.shape[0] // stripes(site), *site.shape[1:]))
        if shape not in self._random:
            self._random[shape] = torch.randn(shape, generator=torch.Generator().manual_seed(len(self._random)))
        return self._random[shape]


def _neutral_norms(graph: Graph) -> dict[str, Tensor]:
    """Batch norms that change nothing: mean 0, variance 1, scale 1, shift 0."""
    neutral: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "batch_norm":
            for name, fill in zip(node.inputs[1:], (0.0, 1.0, 1.0, 0.0)):
                if name in graph.tensors:
                    neutral[str(name)] = torch.full_like(graph.tensors[str(name)], fill)
    return neutral
