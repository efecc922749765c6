"""A graph as an ordinary nn.Module again: same names in state_dict, goes on training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import ShapeError
from espalier.graph.interpret import run
from espalier.graph.ir import Graph


class GraphModule(nn.Module):
    """Runs a graph whose tensors are its parameters and buffers, under their own dotted names.

    structure: the graph without its tensors.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.structure = replace(graph, tensors={})
        self.names = tuple(graph.tensors)
        for name, tensor in graph.tensors.items():
            home, leaf = _home(self, name)
            copy = tensor.detach().clone()
            if name in graph.parameters:
                home.register_parameter(leaf, nn.Parameter(copy, tensor.requires_grad))
            else:
                home.register_buffer(leaf, copy, persistent=name not in graph.constants)
        for name, source in graph.aliases.items():
            home, leaf = _home(self, name)
            (home._parameters if source in graph.parameters else home._buffers)[leaf] = _find(self, source)  # type: ignore
        for means in {str(node.inputs[1]) for node in graph.nodes if node.op == "batch_norm"}:
            home, leaf = _home(self, means)
            if leaf == "running_mean":  # a BatchNorm counts its batches too
                home.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """What the captured module computes; keyword inputs by the names of the graph's inputs."""
        missing = [name for name in self.structure.inputs[len(inputs) :] if name not in named]
        if missing or len(inputs) + len(named) != len(self.structure.inputs):
            raise ShapeError(f"the network takes {', '.join(self.structure.inputs)}; missing: {', '.join(missing)}")
        ordered = [*inputs, *[named[name] for name in self.structure.inputs[len(inputs) :]]]
        tensors = {name: _find(self, name) for name in self.names}
        return run(self.structure, ordered, tensors=tensors, training=self.training)


def to_module(graph: Graph) -> nn.Module:
    """An ordinary module that computes `graph`; it holds copies of the tensors and goes on training.

    Batch norms and dropout follow its train() and eval(). It can be pickled, copied, moved, compiled by torch.compile
    and captured again.

    >>> to_module(capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.ones(1, 4))).state_dict().keys()
    odict_keys(['0.weight', '0.bias'])
    """
    return GraphModule(graph).eval()


def _home(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule where `name` belongs, made where it is missing, and the last part of the name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module, leaf


def _find(module: nn.Module, name: str) -> Tensor:
    *path, leaf = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    found = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    assert found is not None
    return found
