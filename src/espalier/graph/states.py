"""States: what is known of every channel's value before any input is seen: zero, constant, or varying."""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.graph.channels import compact, like
from espalier.graph.interpret import apply
from espalier.graph.ir import OPAQUE, Graph, Node
from espalier.graph.ops import OPS

ZERO, CONSTANT, VARIES = 0, 1, 2


def states(graph: Graph) -> dict[str, Tensor]:
    """value name -> state of every entry (int8, shape of the value): exact for every possible input."""
    found = known(graph)
    for node in graph.nodes:
        found.update(zip(node.outputs, after(graph, node, found, {})))
    return found


def known(graph: Graph) -> dict[str, Tensor]:
    """The states before any node: inputs vary, tensors are what they are (see `reads` for weights of convs)."""
    others = {name for n in graph.nodes for k, name in enumerate(n.inputs) if n.op not in ("conv", "linear") or k != 1}
    found = {name: torch.tensor(VARIES, dtype=torch.int8).expand(graph.values[name].shape) for name in graph.inputs}
    for name, tensor in graph.tensors.items():
        if name not in others:  # nobody asks: to look at all of them takes long
            found[name] = torch.tensor(VARIES, dtype=torch.int8).expand(tensor.shape)
            continue
        nonzero = (tensor.detach().cpu() != 0).view(torch.int8)
        found[name] = nonzero.mul_(CONSTANT if tensor.numel() == 1 else VARIES)
    return found


def along(state: Tensor, dim: int) -> Tensor:
    """The state of every index of dimension `dim`: that of all its positions, or VARIES where they differ."""
    array = compact(state.movedim(dim, 0), keep_first=True).flatten(1)
    low, high = array.amin(1), array.amax(1)
    return torch.where(low == high, high, VARIES).to(torch.int8)


def affine(graph: Graph, name: str | None, size: int, otherwise: float, dropped: dict[str, Tensor]) -> Tensor:
    """A 1-d tensor of the graph as float64, with its dropped entries zero; `otherwise` where there is none."""
    if name is None:
        return torch.full((size,), otherwise, dtype=torch.float64)
    value = graph.tensors[name].detach().cpu().double()
    return value.masked_fill(dropped[name], 0.0) if name in dropped else value


def reads(graph: Graph, node: Node, state: Tensor) -> tuple[Tensor, Tensor]:
    """For a conv or linear node: which outputs read a varying input, and which a constant one (bool ``[outputs]``)."""
    weight = graph.tensors[node.inputs[1]].detach().cpu()  # type: ignore[index]
    groups = int(node.attrs.get("conv_groups", 1))
    used = (weight != 0).flatten(2).any(2) if weight.ndim > 2 else weight != 0
    used = used.unflatten(0, (groups, -1))
    varying, constant = ((state == kind).reshape(groups, 1, -1) for kind in (VARIES, CONSTANT))
    return _meets(used, varying), _meets(used, constant)


def _meets(used: Tensor, some: Tensor) -> Tensor:
    """``(used & some).any(2)``, flat; mostly `some` are all or none, and weights are large."""
    if not bool(some.any()):
        return torch.zeros(used.shape[0] * used.shape[1], dtype=torch.bool)
    return (used if bool(some.all()) else used & some).any(2).flatten()


def after(graph: Graph, node: Node, found: dict[str, Tensor], dropped: dict[str, Tensor]) -> list[Tensor]:
    """The states of the outputs of `node`. dropped: 1-d affine tensor -> entries to be taken for zero (bool)."""
    shapes = [graph.values[name].shape for name in node.outputs]
    inputs = [None if name is None else found[name] for name in node.inputs]
    kind = "mix" if node.op == OPAQUE else OPS[node.op].channels
    if kind == "contract" and node.inputs[1] in graph.tensors:
        return [_contract(graph, node, inputs[0], shapes[0], dropped)]
    if node.op == "prelu":  # zero stays zero, whatever the slopes
        return [x for x in inputs[:1] if x is not None]
    if kind == "norm":
        return [_norm(graph, node, inputs[0], dropped)]
    if kind == "elementwise":
        return [_elementwise(node, [x for x in inputs if x is not None], shapes[0])]
    if kind == "pool":
        return [_pool(node, inputs[0], shapes[0])]
    if kind == "move":
        moved = apply(node, inputs)
        return [moved] if isinstance(moved, Tensor) else list(moved)
    return [torch.tensor(VARIES, dtype=torch.int8).expand(shape) for shape in shapes]


def _contract(graph: Graph, node: Node, x: Tensor | None, shape: tuple[int, ...], dropped: dict[str, Tensor]) -> Tensor:
    assert x is not None
    dim = 1 if node.op == "conv" else x.ndim - 1
    varying, constant = reads(graph, node, along(x, dim))
    if any(node.attrs.get("padding", [])):  # a constant meets the zeros of the border
        varying, constant = varying | constant, torch.zeros_like(constant)
    bias = affine(graph, node.inputs[2], len(varying), 0.0, dropped) != 0
    vector = torch.where(varying, VARIES, torch.where(constant | bias, CONSTANT, ZERO)).to(torch.int8)
    at = 1 if node.op == "conv" else len(shape) - 1
    return vector.reshape([-1 if d == at else 1 for d in range(len(shape))]).expand(shape)


def _norm(graph: Graph, node: Node, x: Tensor | None, dropped: dict[str, Tensor]) -> Tensor:
    assert x is not None
    state = along(x, 1)
    size = len(state)
    mean, var = (affine(graph, name, size, 0.0, dropped) for name in node.inputs[1:3])
    scale = affine(graph, node.inputs[3], size, 1.0, dropped)
    shift = affine(graph, node.inputs[4], size, 0.0, dropped)
    at_zero = shift - mean * scale / (var + float(node.attrs["eps"])).sqrt()
    after = torch.where(state == ZERO, torch.where(at_zero == 0, ZERO, CONSTANT), state.long())
    after = torch.where(scale == 0, torch.where(shift == 0, ZERO, CONSTANT), after).to(torch.int8)
    return after.reshape([-1 if d == 1 else 1 for d in range(x.ndim)]).expand(x.shape)


def _elementwise(node: Node, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    if len(inputs) == 1:
        state = inputs[0]
        if node.op == "dropout":
            return state
        at_zero = apply(node, [torch.zeros(1)])
        narrow = compact(state)
        after = narrow if float(at_zero) == 0 else narrow.clamp_min(CONSTANT)
        return after.expand(state.shape)
    a, b = inputs
    if node.op == "mul":
        narrow = torch.where((compact(a) == ZERO) | (compact(b) == ZERO), ZERO, torch.maximum(compact(a), compact(b)))
    elif node.op in ("add", "sub"):
        narrow = torch.maximum(compact(a), compact(b))
    else:
        narrow = torch.full_like(torch.maximum(compact(a), compact(b)), VARIES)
    return narrow.to(torch.int8).expand(shape)


def _pool(node: Node, x: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    assert x is not None
    if node.op == "mean":
        dims, keep = [d % x.ndim for d in node.attrs["dims"]], bool(node.attrs["keepdim"])
    else:
        dims, keep = list(range(2, x.ndim)), True
    narrow = compact(x)
    after = narrow.amax(dims, keepdim=keep) if dims else narrow
    uneven = narrow.amin(dims, keepdim=keep) != after if dims else torch.zeros_like(after, dtype=torch.bool)
    uneven = uneven | (any(node.attrs.get("padding", [])) and after == CONSTANT)
    return like(torch.where(uneven, VARIES, after).to(torch.int8), after).expand(shape)
