"""Channels: which entries of which values and tensors belong to the same channel.

Every value gets an array of labels of its own shape. Compute ops give new labels or pass those of their inputs on, by
what their row in OPS says; data movement runs *the op itself* on the labels. Labels that meet in an element-wise op
are coupled (union-find). An op that nobody understands freezes the labels that touch it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from espalier.graph.interpret import apply
from espalier.graph.ir import OPAQUE, Graph, Node
from espalier.graph.ops import OPS


@dataclass
class Couplings:
    """The labels of a graph.

    labels: value or tensor name -> label of every entry (int64, the shape of the value, often expanded).
    parent: union-find over labels; `root` gives the coupling that a label belongs to.
    frozen: coupling -> why it may not be cut.
    """

    labels: dict[str, Tensor] = field(default_factory=dict)
    parent: list[int] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)

    def fresh(self, count: int) -> Tensor:
        """`count` new labels."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def find(self, label: int) -> int:
        """The coupling that `label` belongs to."""
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def roots(self) -> Tensor:
        """label -> coupling, for all labels."""
        return torch.tensor([self.find(k) for k in range(len(self.parent))], dtype=torch.int64)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Couple the labels `a` and `b` entry by entry (same shape)."""
        a, b = torch.broadcast_tensors(a, b)
        for dim in range(a.ndim):  # what repeats in both is looked at once: a stack would write it out
            if a.stride(dim) == 0 == b.stride(dim) and a.shape[dim] > 1:
                a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        pairs = torch.stack((a, b), -1).reshape(-1, 2)
        for x, y in np.unique(pairs.numpy(), axis=0).tolist():
            x, y = self.find(x), self.find(y)
            if x != y:
                self.parent[y] = x
                if y in self.frozen:
                    self.frozen.setdefault(x, self.frozen.pop(y))

    def freeze(self, labels: Tensor, why: str) -> None:
        """Never cut these labels."""
        for label in torch.unique(compact(labels)).tolist():
            self.frozen.setdefault(self.find(label), why)

    def along(self, name: str, dim: int) -> Tensor:
        """The label of every index of dimension `dim`; where several meet at one index they are coupled."""
        array = compact(self.labels[name].movedim(dim, 0), keep_first=True).flatten(1)
        if array.shape[1] > 1 and bool((array != array[:, :1]).any()):
            self.unite(array, array[:, :1].expand_as(array))
        return array[:, 0]


def compact(array: Tensor, keep: int = 0, keep_first: bool = False) -> Tensor:
    """`array` without its repetitions: expanded dimensions (stride 0) reduced to size 1.

    keep: as many trailing dimensions are left whole; keep_first: so is the first.
    """
    for dim in range(1 if keep_first else 0, array.ndim - keep):
        if array.stride(dim) == 0 and array.shape[dim] > 1:
            array = array.narrow(dim, 0, 1)
    return array


def couplings(graph: Graph) -> Couplings:
    """The labels of every value and tensor of `graph`, coupled where channels must be cut together."""
    found = Couplings()
    for name in graph.inputs:
        shape = graph.values[name].shape
        found.labels[name] = _spread(found.fresh(shape[1] if len(shape) > 1 else 1), shape, min(1, len(shape) - 1))
        found.freeze(found.labels[name], "an input of the network")
    for node in graph.nodes:
        _Labeller(graph, found, node).label()
    for name in graph.outputs:
        found.freeze(found.labels[name], "an output of the network")
    return found


class _Labeller:
    """Labels the outputs of one node."""

    def __init__(self, graph: Graph, found: Couplings, node: Node) -> None:
        self.graph, self.found, self.node = graph, found, node

    def label(self) -> None:
        channels = "mix" if self.node.op == OPAQUE else OPS[self.node.op].channels
        if any(name in self.graph.tensors and name not in self.found.labels for name in self.node.inputs if name):
            self._label_tensors(channels)
        {
            "contract": self._contract,
            "norm": self._norm,
            "elementwise": self._elementwise,
            "pool": self._pool,
            "move": self._move,
            "mix": self._mix,
        }[channels]()

    def _label_tensors(self, channels: str) -> None:
        """Tensors that stand where activations may stand get labels of their own; weights are read by dimension."""
        if channels in ("contract", "norm"):
            names: Iterable[str | None] = self.node.inputs[:1]
        else:
            names = self.node.inputs
        for name in names:
            if name is not None and name in self.graph.tensors and name not in self.found.labels:
                shape = self.graph.values[name].shape
                size = self.graph.tensors[name].numel()
                self.found.labels[name] = self.found.fresh(size).reshape(shape) if size else torch.zeros(shape).long()

    def _shape(self, k: int = 0) -> tuple[int, ...]:
        return self.graph.values[self.node.outputs[k]].shape

    def _tensor_labels(self, name: str, dims: tuple[Tensor, ...]) -> None:
        """Labels of a weight by dimension; used twice (a shared weight), both uses are coupled."""
        for dim, labels in enumerate(dims):
            key = f"{name}@{dim}"
            if key in self.found.labels and self.found.labels[key].shape == labels.shape:
                self.found.unite(self.found.labels[key], labels)
            else:
                self.found.labels[key] = labels

    def _contract(self) -> None:
        node, found = self.node, self.found
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None and weight is not None
        dim = 1 if node.op == "conv" else len(self.graph.values[x].shape) - 1
        if weight not in self.graph.tensors:  # a computed weight
            self._mix()
            return
        inputs = found.along(x, dim)
        rows, width = self.graph.tensors[weight].shape[:2]
        groups = int(node.attrs.get("conv_groups", 1))
        depthwise = groups > 1 and width == 1 and rows == len(inputs)
        out = inputs if depthwise else found.fresh(rows)
        self._tensor_labels(weight, (out, inputs))
        if (bias := node.inputs[2]) is not None:
            self._tensor_labels(bias, (out,))
        shape = self._shape()
        found.labels[node.outputs[0]] = _spread(out, shape, 1 if node.op == "conv" else len(shape) - 1)

    def _norm(self) -> None:
        x = self.node.inputs[0]
        assert x is not None
        labels = self.found.along(x, 1)
        for name in self.node.inputs[1:]:
            if name is not None:
                self._tensor_labels(name, (labels,))
        self.found.labels[self.node.outputs[0]] = self.found.labels[x]

    def _elementwise(self) -> None:
        shape, found = self._shape(), self.found
        names = [name for name in self.node.inputs if name is not None]
        tensors = self.graph.tensors
        operands = [n for n in names if n not in tensors or tensors[n].numel() > 1] or names[:1]
        arrays = {n: found.labels[n].expand(shape) for n in operands}
        varying = {dim for a in arrays.values() for dim in range(len(shape)) if a.stride(dim) != 0 and shape[dim] > 1}
        base: Tensor | None = None
        for name, array in arrays.items():
            own = self.graph.values[name].shape
            missing = len(shape) - len(own)
            spread = [d for d in varying if d < missing or (own[d - missing] == 1 and shape[d] > 1)]
            if spread and _channel_dim(arrays, shape) in spread:
                found.freeze(array, f"spread over all channels by {self.node.op} ({self.node.place})")
            elif base is None:
                base = array
            else:
                found.unite(base, array)
        found.labels[self.node.outputs[0]] = base if base is not None else next(iter(arrays.values()))

    def _pool(self) -> None:
        name = self.node.inputs[0]
        assert name is not None
        labels, shape = self.found.labels[name], self._shape()
        if self.node.op == "mean":
            dims = sorted(d % labels.ndim for d in self.node.attrs["dims"])
            keep = self.node.attrs["keepdim"]
        else:
            dims, keep = list(range(2, labels.ndim)), True
        for dim in dims:
            if labels.stride(dim) != 0 and labels.shape[dim] > 1 and bool((labels != labels.narrow(dim, 0, 1)).any()):
                self._mix()
                return
        for dim in reversed(dims):
            labels = labels.narrow(dim, 0, 1) if keep else labels.select(dim, 0)
        self.found.labels[self.node.outputs[0]] = labels.expand(shape)

    def _move(self) -> None:
        labels = [self.found.labels[name] for name in self.node.inputs if name is not None]
        result = apply(self.node, [like(array + 1, array) for array in labels])  # 0: made by the op
        for name, moved in zip(self.node.outputs, [result] if isinstance(result, Tensor) else result):
            self.found.labels[name] = self._fill(like(moved - 1, moved))

    def _fill(self, labels: Tensor) -> Tensor:
        """Padding: a whole padded channel is a channel of its own, a padded border belongs to its channel."""
        if labels.ndim < 2 or not bool((compact(labels) < 0).any()):
            return labels
        labels = labels.clone()
        view = labels.movedim(1, 0).flatten(1)
        highest = view.amax(1)
        highest = torch.where(highest < 0, self.found.fresh(len(highest)), highest)
        filled = torch.where(view < 0, highest[:, None], view)
        return filled.reshape(labels.movedim(1, 0).shape).movedim(0, 1)

    def _mix(self) -> None:
        """Nothing that touches this op may be cut."""
        known = self.node.op if self.node.op != OPAQUE else f"{self.node.target}, which has no row in OPS"
        why = f"read by {known} ({self.node.place})"
        for name in self.node.inputs:
            if name is None:
                continue
            if name in self.found.labels:
                self.found.freeze(self.found.labels[name], why)
            for dim in range(2):
                if f"{name}@{dim}" in self.found.labels:
                    self.found.freeze(self.found.labels[f"{name}@{dim}"], why)
        for k, name in enumerate(self.node.outputs):
            label = self.found.fresh(1)
            self.found.freeze(label, f"made by {known} ({self.node.place})")
            self.found.labels[name] = label.reshape([1] * len(self._shape(k))).expand(self._shape(k))


def _channel_dim(arrays: dict[str, Tensor], shape: tuple[int, ...]) -> int | None:
    """The dimension along which the fullest operand's labels vary."""
    for array in arrays.values():
        for dim in range(1, len(shape)):
            if shape[dim] > 1 and array.stride(dim) != 0 and bool((array != array.narrow(dim, 0, 1)).any()):
                return dim
    return None


def _spread(vector: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """`vector` along dimension `dim` of an array of `shape`, repeated along the others without memory."""
    return vector.reshape([len(vector) if d == dim else 1 for d in range(len(shape))]).expand(shape)


def like(array: Tensor, expanded: Tensor) -> Tensor:
    """`array` with the repetitions of `expanded` (arithmetic makes them real)."""
    for dim in range(array.ndim):
        if expanded.stride(dim) == 0 and array.shape[dim] > 1:
            array = array.narrow(dim, 0, 1)
    return array.expand(expanded.shape)
