"""Emitter: what writing the steps of one native piece needs, and the steps that many ops share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from espalier.compiler.layout import Layout, Place, Storage, four
from espalier.compiler.program import Four, Operand, Step, dense_strides
from espalier.compiler.samples import Samples
from espalier.compiler.window import Pair
from espalier.errors import CompileError
from espalier.graph.ir import Graph, Node

Activation = tuple[str, float, float]
NO_ACTIVATION: Activation = ("none", 0.0, 0.0)
INFINITY = math.inf


@dataclass
class Emitter:
    """Collects the steps of a piece. places: where each value lies so far."""

    graph: Graph
    layout: Layout
    batch: int
    steps: list[Step] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)
    copies: dict[str, Place] = field(default_factory=dict)  # values copied into planes
    # planes of phases, and the number there of the phase that begins at a pixel
    phases: dict[str, tuple[Place, dict[Pair, int]]] = field(default_factory=dict)
    sided: set[str] = field(default_factory=set)  # values whose copies to either side are stored by now
    samples: Samples = field(default_factory=Samples)  # values whose batch is not their first dimension
    # flattened values that only linear layers read: what they are made of, and where each entry lies in it
    tables: dict[str, tuple[Place, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def readers(self) -> dict[str, list[Node]]:
        """value -> the nodes that read it."""
        return self.graph.readers()

    def step(self, **fields: Any) -> None:
        """Append a `Step` of these fields."""
        self.steps.append(Step(**fields))

    def array(self, name: str | None) -> np.ndarray | None:
        """A tensor of the graph as float32, or None."""
        if name is None:
            return None
        return np.ascontiguousarray(self.graph.tensors[name].detach().cpu().float().numpy())

    def use(self, storage: Storage) -> Storage:
        """A storage of the piece by its name: the first that came, so that all steps share one."""
        return self.storages.setdefault(storage.name, storage)

    def target(self, value: str) -> Place:
        """The place that a step must write `value` to."""
        place = self.layout.place(value)
        assert place.storage is not None
        self.use(place.storage)
        self.places[value] = place
        return place

    def temporary(self, name: str, shape: tuple[int, ...]) -> Place:
        """A contiguous place of its own."""
        size = math.prod(shape)
        storage = self.use(Storage(f"{name}/{len(self.storages)}", 1, 1, size, size, size))
        return Place(shape, dense_strides(shape), 0, storage)

    def copy(self, source: Place, target: Place, name: str, nodes: tuple[str, ...] = ()) -> None:
        """target = source; target's margins are zeroed."""
        if len(source.shape) > 4:
            for k in range(source.shape[0]):
                one, other = (
                    replace(p, shape=p.shape[1:], strides=p.strides[1:], offset=p.offset + k * p.strides[0])
                    for p in (source, target)
                )
                self.copy(one, other, name, nodes)
            return
        front = target.front()
        sizes, (into, of) = (source.operand().sizes, (target.operand().strides, source.operand().strides))
        if front is None:
            sizes, (into, of) = merged(sizes, (into, of))
        out, a = target.operand_of(sizes, into), source.operand_of(sizes, of)
        self.step(name=name, op="copy", out=out, a=a, front=front, nodes=nodes)

    def contiguous(self, source: Place, name: str) -> Place:
        """`source`, or a contiguous copy of it."""
        if source.dense:
            return source
        place = self.temporary(name, source.shape)
        self.copy(source, place, f"{name}/contiguous")
        return place

    def planes(self, value: str, vertical: int = 0, side: int = 0) -> Place:
        """`value` as planes in the arena with such margins, copied there when it lies otherwise."""
        place = self.places[value]
        if place.fits(vertical, side):
            return place
        if value not in self.copies:
            copied = self.layout.copy_place(value)
            assert copied.storage is not None
            self.use(copied.storage)
            self.copy(place, copied, f"{value}/planes")
            self.copies[value] = copied
        return self.copies[value]

    def like(self, value: str, model: Place) -> Place:
        """`value` in planes with the row stride of `model`."""
        place, wanted = self.places[value], model.operand()
        if place.fits(0, 0) and place.operand().strides[2:] == wanted.strides[2:]:
            return place
        assert model.storage is not None
        name = f"{value}/{len(self.storages)}"
        channels = model.storage.channels if model.storage.by_rows else place.shape[0]
        storage = self.use(replace(model.storage, name=name, channels=channels, front=0, vertical=0, side=0))
        copied = Place(place.shape, model.strides, 0, storage)
        self.copy(place, copied, f"{value}/like")
        return copied

    def clear(self, place: Place, name: str, value: float = 0.0) -> None:
        """Fill a place with a number and its margins with zeros."""
        activation = ("none", value, 0.0)
        self.step(name=name, op="fill", out=place.operand(), front=place.front(), activation=activation)

    def clean_target(self, value: str) -> Place:
        """A target whose writer does not zero margins: they are zeroed before."""
        place = self.target(value)
        if place.front() is not None:
            self.clear(place, f"{value}/margins")
        return place


def merged(sizes: Four, strides: tuple[Four, ...], keep: int = 0) -> tuple[Four, tuple[Four, ...]]:
    """The same elements in fewer, longer dimensions, for all operands alike, the densest of the first one last.

    keep: dimensions at the front that stay as they are.

    >>> merged((1, 2, 3, 4), ((0, 12, 4, 1),))
    ((1, 1, 1, 24), ((0, 0, 0, 1),))
    """
    order = sorted(range(4), key=lambda d: (sizes[d] > 1, -strides[0][d])) if not keep else range(4)
    size = [sizes[d] for d in order]
    rows = [[s[d] for d in order] for s in strides]
    for d in (2, 1, 0):
        if d < keep:
            break
        if size[d] == 1:
            continue
        if size[3] == 1 or all(s[d] == size[3] * s[3] for s in rows):
            for s in rows:
                s[3] = s[d] if size[3] == 1 else s[3]
                s[d] = 0
            size[3] *= size[d]
            size[d] = 1
        else:
            break
    return tuple(size), tuple(tuple(s) for s in rows)  # type: ignore[return-value,misc]


def activation_of(spec: Mapping[str, Any] | None) -> Activation:
    """The engine's activation for ``{"name": ..., parameters}``. Raises CompileError for one that it lacks."""
    if spec is None:
        return NO_ACTIVATION
    options = {**spec, **spec.get("params", {})}
    name = options["name"]
    if name == "relu":
        return ("clamp", 0.0, INFINITY)
    if name == "clamp":
        low, high = options.get("min"), options.get("max")
        return ("clamp", -INFINITY if low is None else low, INFINITY if high is None else high)
    if name == "leaky_relu":
        return (name, options.get("negative_slope", options.get("slope", 0.01)), 0.0)
    if name == "elu":
        return (name, options.get("alpha", 1.0), 0.0)
    if name == "gelu":
        return ("gelu_tanh" if options.get("approximate") == "tanh" else "gelu", 0.0, 0.0)
    if name in ("sigmoid", "tanh", "silu", "hardswish", "hardsigmoid"):
        return (name, 0.0, 0.0)
    raise CompileError(f"the engine has no activation {name!r}")


def fused_activation(node: Node) -> Activation:
    """The activation that fusion gave a node, none where it gave none. Raises CompileError as `activation_of`."""
    return activation_of(node.attrs.get("activation"))


def broadcast(shape: tuple[int, ...], place: Place) -> Operand:
    """`place` as an operand of the sizes that `shape` has."""
    lead = len(shape) - len(place.shape)
    strides = [0] * lead + [0 if size == 1 else stride for size, stride in zip(place.shape, place.strides)]
    return place.operand_of(*four(shape, tuple(strides)))
