"""Shrink: physically remove the channels that nobody needs, through adds, concats, norms and flattenings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import CaptureError
from espalier.graph.capture import ExampleInputs, arguments, capture
from espalier.graph.channels import compact
from espalier.graph.fold import fold_constants
from espalier.graph.interpret import apply, run
from espalier.graph.ir import Graph, Node, Value
from espalier.graph.liveness import Liveness, liveness
from espalier.graph.module import to_module

SAME = 1e-4  # relative to the largest output: rounding of another order of summation


@dataclass(frozen=True)
class Cuts:
    """What was removed: tensor -> (shape before, shape after); and what may not be cut: reason -> channels."""

    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    frozen: Mapping[str, int]

    @property
    def removed(self) -> int:
        """Numbers that are gone."""
        return sum(torch.Size(a).numel() - torch.Size(b).numel() for a, b in self.shapes.values())


@torch.inference_mode(False)  # what it makes trains, also when it is called inside one
def shrink(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """A smaller module with the same outputs (in eval mode, up to rounding), which goes on training.

    It is a copy of the user's own module with narrower layers; where its code has channel counts wired in, so that
    the narrow copy does not compute the same, it is a plain module made from the graph, with the same parameter names.
    `model` is left alone. Raises CaptureError for a network that cannot be captured.

    >>> shrink(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.ones(1, 3, 9, 9))
    """
    graph = capture(model, example_inputs)
    small, cuts = shrink_graph(graph)
    if not cuts.shapes:
        return copy.deepcopy(model)
    narrow = _narrowed(model, small)
    if _computes(narrow, small, example_inputs):
        return narrow
    return to_module(small).train(model.training)


def shrink_graph(graph: Graph) -> tuple[Graph, Cuts]:
    """The graph without the channels that nobody needs, and what was cut. `graph` is left alone."""
    folded = fold_constants(graph)
    live = liveness(folded)
    tensors = {name: _cut_tensor(folded, live, name) for name in folded.tensors}
    values = {name: _cut_value(folded, live, value, tensors) for name, value in folded.values.items()}
    nodes: list[Node] = []
    for node in folded.nodes:
        nodes += _cut_node(folded, live, node, values, tensors)
    small = replace(folded, nodes=tuple(nodes), values=values, tensors=tensors)
    shapes = {
        name: (tuple(folded.tensors[name].shape), tuple(tensor.shape))
        for name, tensor in tensors.items()
        if tensor.shape != folded.tensors[name].shape
    }
    frozen: dict[str, int] = {}
    for why in live.found.frozen.values():
        frozen[why] = frozen.get(why, 0) + 1
    return small, Cuts(shapes, frozen)


# -- cutting ---------------------------------------------------------------------------------------


def _cut_tensor(graph: Graph, live: Liveness, name: str) -> Tensor:
    """A tensor without the entries of dead channels."""
    tensor = graph.tensors[name]
    labels = live.found.labels
    if f"{name}@1" in labels:
        cut = _cut_weight(graph, live, name)
    elif f"{name}@0" in labels:
        cut = tensor.detach()[_keeps(live, f"{name}@0").to(tensor.device)]
    elif name in labels and tensor.ndim:
        cut = tensor.detach()
        for dim in range(tensor.ndim):
            cut = cut.index_select(dim, _index(live, name, dim).to(tensor.device))
    else:
        return tensor
    return cut.requires_grad_(tensor.requires_grad) if cut.shape != tensor.shape else tensor  # a copy, where it is cut


def _keeps(live: Liveness, key: str) -> Tensor:
    return live.alive[live.root[live.found.labels[key]]]


def _index(live: Liveness, name: str, dim: int) -> Tensor:
    """The indices of dimension `dim` of a value that stay."""
    entries = live.alive[live.root[compact(live.found.labels[name].movedim(dim, 0), keep_first=True)]]
    return (entries.flatten(1).any(1) if entries.ndim > 1 else entries).nonzero()[:, 0]


def _cut_weight(graph: Graph, live: Liveness, name: str) -> Tensor:
    """A conv or linear weight: rows by its outputs, columns by its inputs, conv group by conv group."""
    weight = graph.tensors[name].detach()
    node = next(n for n in graph.nodes if n.op in ("conv", "linear") and n.inputs[1] == name)
    groups = int(node.attrs.get("conv_groups", 1))
    rows, columns = _keeps(live, f"{name}@0").reshape(groups, -1), _keeps(live, f"{name}@1").reshape(groups, -1)
    if bool((rows.sum(1) <= 1).all()) and columns.shape[1] == 1:
        columns = torch.ones_like(columns)  # depthwise: the rows say it all
    parts = weight.unflatten(0, (groups, -1))
    if len(parts) == 1 and bool(rows.all()) and bool(columns.all()):
        return weight
    kept = [
        _taken(_taken(part, row, 0), column, 1) for part, row, column in zip(parts, rows, columns) if bool(row.any())
    ]
    if len(parts) == len(kept) == 1:
        return kept[0]  # something was taken out of it: a copy
    return torch.cat(kept or [weight])  # nothing was there to keep


def _taken(weight: Tensor, keep: Tensor, dim: int) -> Tensor:
    """What `keep` says of dimension `dim`; the weight itself where that is all of it."""
    return weight if bool(keep.all()) else weight.index_select(dim, keep.nonzero()[:, 0].to(weight.device))


def _cut_value(graph: Graph, live: Liveness, value: Value, tensors: Mapping[str, Tensor]) -> Value:
    if value.name in tensors:
        return replace(value, shape=tuple(tensors[value.name].shape))
    return replace(value, shape=tuple(len(_index(live, value.name, dim)) for dim in range(len(value.shape))))


def _cut_node(
    graph: Graph, live: Liveness, node: Node, values: Mapping[str, Value], tensors: Mapping[str, Tensor]
) -> list[Node]:
    """The node with attributes that fit the narrower values; what no attribute can say becomes a gather."""
    if node.op == "conv" and node.attrs["conv_groups"] > 1:
        groups = int(node.attrs["conv_groups"])
        stay = int(_keeps(live, f"{node.inputs[1]}@0").reshape(groups, -1).any(1).sum())
        return [replace(node, attrs={**node.attrs, "conv_groups": stay})]
    touched = [n for n in [*node.inputs, *node.outputs] if n and values[n].shape != graph.values[n].shape]
    if node.op not in ("concat", "flatten", "permute", "squeeze", "unsqueeze", *_REWRITES) or not touched:
        return [node]
    if node.op in _REWRITES:
        made = replace(node, attrs=_REWRITES[node.op](node, graph, live, values))
    else:
        made = node
    if _moves_alike(graph, live, node, made):
        return [made]
    if len(node.outputs) == 1 and (gathered := _gather(graph, live, node, values)):
        return [gathered]
    raise CaptureError(f"{node.op} ({node.place}) cannot be cut: please report this network")


def _reshaped(node: Node, graph: Graph, live: Liveness, values: Mapping[str, Value]) -> dict[str, Any]:
    new = values[node.outputs[0]].shape
    return {"shape": [-1 if asked == -1 else size for asked, size in zip(node.attrs["shape"], new)]}


def _split(node: Node, graph: Graph, live: Liveness, values: Mapping[str, Value]) -> dict[str, Any]:
    dim = int(node.attrs["dim"])
    return {**node.attrs, "sizes": [values[name].shape[dim] for name in node.outputs]}


def _sliced(node: Node, graph: Graph, live: Liveness, values: Mapping[str, Value]) -> dict[str, Any]:
    """A slice along channels: the span that the entries which stay have now."""
    dim = int(node.attrs["dim"]) % len(graph.values[node.inputs[0]].shape)  # type: ignore[index]
    size = graph.values[node.inputs[0]].shape[dim]  # type: ignore[index]
    kept = torch.zeros(size, dtype=torch.long)
    kept[_index(live, node.inputs[0], dim)] = 1  # type: ignore[arg-type]
    start, end, _ = slice(node.attrs["start"], node.attrs["end"]).indices(size)
    if values[node.inputs[0]].shape[dim] == size:  # type: ignore[index]
        return dict(node.attrs)
    return {**node.attrs, "start": int(kept[:start].sum()), "end": int(kept[:end].sum())}


def _padded(node: Node, graph: Graph, live: Liveness, values: Mapping[str, Value]) -> dict[str, Any]:
    """Padding along channels: as many as stay in front and behind."""
    amounts = list(node.attrs["amounts"])
    shape = graph.values[node.outputs[0]].shape
    for k in range(len(amounts) // 2):
        dim = len(shape) - 1 - k
        index = _index(live, node.outputs[0], dim)
        if len(index) != shape[dim] and (amounts[2 * k] or amounts[2 * k + 1]):
            amounts[2 * k], amounts[2 * k + 1] = (
                int((index < amounts[2 * k]).sum()),
                int((index >= shape[dim] - amounts[2 * k + 1]).sum()),
            )
    return {**node.attrs, "amounts": amounts}


_REWRITES = {"reshape": _reshaped, "expand": _reshaped, "split": _split, "slice": _sliced, "pad": _padded}


def _numbered(graph: Graph, live: Liveness, node: Node) -> tuple[list[Tensor], list[Tensor]]:
    """Every input with its entries numbered from 1: before cutting, and after."""
    before, after, first = [], [], 1
    for name in node.inputs:
        if name is None:
            continue
        shape = graph.values[name].shape
        size = torch.Size(shape).numel()
        array = torch.arange(first, first + size).reshape(shape)
        before.append(array)
        after.append(_cut_array(array, live, name))
        first += size
    return before, after


def _cut_array(array: Tensor, live: Liveness, name: str) -> Tensor:
    for dim in range(array.ndim):
        array = array.index_select(dim, _index(live, name, dim))
    return array


def _moves_alike(graph: Graph, live: Liveness, node: Node, made: Node) -> bool:
    """Does `made` move the entries that stay where `node` moved them?"""
    before, after = _numbered(graph, live, node)
    want = apply(node, before)
    wanted = [want] if isinstance(want, Tensor) else list(want)
    try:
        got = apply(made, after)
    except (RuntimeError, IndexError):
        return False
    made_arrays = [got] if isinstance(got, Tensor) else list(got)
    cut = [_cut_array(w, live, name) for w, name in zip(wanted, node.outputs)]
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(made_arrays, cut))


def _gather(graph: Graph, live: Liveness, node: Node, values: Mapping[str, Value]) -> Node | None:
    """The op as a gather along one dimension, where it is one."""
    (before,), (after,) = _numbered(graph, live, node)
    want = _cut_array(apply(node, [before]), live, node.outputs[0])
    for dim in range(1, want.ndim):
        if want.ndim != after.ndim:
            return None
        moved, source = want.movedim(dim, 0).flatten(1), after.movedim(dim, 0).flatten(1)
        if moved.shape[1] != source.shape[1]:
            continue
        place = {int(row[0]): k for k, row in enumerate(source)}
        index = [place.get(int(row[0]), -1) for row in moved]
        made = replace(node, op="gather_channels", attrs={"dim": dim, "index": index}, target="")
        if _moves_alike(graph, live, node, made):
            return made
    return None


# -- the user's own module, narrower ---------------------------------------------------------------

_SIZES: dict[type[nn.Module], dict[str, Any]] = {
    kind: {"out_channels": lambda m: m.weight.shape[0], "in_channels": lambda m: m.weight.shape[1] * m.groups}
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
}
_SIZES[nn.Linear] = {"out_features": lambda m: m.weight.shape[0], "in_features": lambda m: m.weight.shape[1]}
_SIZES[nn.PReLU] = {"num_parameters": lambda m: len(m.weight)}
for _norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    _SIZES[_norm] = {"num_features": lambda m: len(m.running_mean)}


def _narrowed(model: nn.Module, small: Graph) -> nn.Module:
    """A copy of `model` that holds the tensors of `small`."""
    narrow = copy.deepcopy(model)
    for name, tensor in small.tensors.items():
        path, _, leaf = name.rpartition(".")
        home = narrow.get_submodule(path)
        if name in small.parameters:
            home.register_parameter(leaf, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        elif leaf in home._buffers:
            home._buffers[leaf] = tensor.detach().clone()
    for name, source in small.aliases.items():
        path, _, leaf = name.rpartition(".")
        if source in small.parameters:
            narrow.get_submodule(path).register_parameter(leaf, narrow.get_parameter(source))
    for node in small.nodes:
        if node.op == "conv" and node.inputs[1]:
            home = narrow.get_submodule(node.inputs[1].rpartition(".")[0])
            if isinstance(home, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                home.groups = int(node.attrs["conv_groups"])
    for module in narrow.modules():
        for attribute, size in _SIZES.get(type(module), {}).items():
            setattr(module, attribute, size(module))
    return narrow


def _computes(module: nn.Module, graph: Graph, example_inputs: ExampleInputs) -> bool:
    """Does `module`, in eval mode, compute what `graph` does, on inputs like the example?"""
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor) -> Tensor:  # only the example knows which whole numbers make sense, as for an embedding
        return torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x

    args, kwargs = arguments(example_inputs)
    args, kwargs = tuple(drawn(x) for x in args), {name: drawn(x) for name, x in kwargs.items()}
    flags = [(m, m.training) for m in module.modules()]
    try:
        named = {**dict(zip(graph.inputs, args)), **kwargs}
        with torch.no_grad():
            got = _leaves(module.eval()(*args, **kwargs))
            want = _leaves(run(graph, [named[name] for name in graph.inputs]))
    except Exception:  # whatever the user's code says to narrower layers: then it is not the same
        return False
    finally:
        for m, training in flags:
            m.training = training
    return len(got) == len(want) and all(_alike(a, b) for a, b in zip(got, want))


def _alike(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or not got.numel():
        return got.shape == want.shape
    got, want = got.double(), want.double()
    return float((got - want).abs().max()) <= SAME * max(1e-30, float(want.abs().max()))


def _leaves(tree: Any) -> list[Tensor]:
    if tree is None:
        return []
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for item in items for leaf in _leaves(item)]
