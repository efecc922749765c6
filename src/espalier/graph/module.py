"""A graph as an ordinary nn.Module again: same names in state_dict, goes on training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from espalier.graph.interpret import run
from espalier.graph.ir import Graph


class GraphModule(nn.Module):
    """Runs a graph whose tensors are its parameters and buffers, under their own dotted names."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        for name, tensor in graph.tensors.items():
            home, leaf = self._home(name)
            if name in graph.parameters:
                home.register_parameter(leaf, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
            else:
                home.register_buffer(leaf, tensor.detach().clone())
        for name, source in graph.aliases.items():
            home, leaf = self._home(name)
            found = self._find(source)
            if isinstance(found, nn.Parameter):
                home.register_parameter(leaf, found)
            else:
                home.register_buffer(leaf, found)

    def _home(self, name: str) -> tuple[nn.Module, str]:
        """The submodule where `name` belongs, made where it is missing, and the last part of the name."""
        *path, leaf = name.split(".")
        home: nn.Module = self
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home._modules[part]  # type: ignore[assignment]
        return home, leaf

    def _find(self, name: str) -> Tensor:
        home, leaf = self._home(name)
        found = home._parameters.get(leaf)
        return found if found is not None else home._buffers[leaf]  # type: ignore[return-value]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """What the captured module computes; keyword inputs by the names of the graph's inputs."""
        ordered = [*inputs, *[named[name] for name in self.graph.inputs[len(inputs) :]]]
        tensors = {name: self._find(name) for name in self.graph.tensors}
        return run(self.graph, ordered, tensors=tensors, training=self.training)


def to_module(graph: Graph) -> nn.Module:
    """An ordinary module that computes `graph`; it holds copies of the tensors and goes on training.

    Batch norms and dropout follow its train() and eval().
    """
    return GraphModule(graph).eval()
