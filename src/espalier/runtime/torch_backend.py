"""``torch.compile(model, backend="espalier")``: the engine as a backend of PyTorch's compiler.

What PyTorch hands over is compiled when it is first called, for the weights as they are then; weights that change are
noticed and compiled again. What the engine cannot run (training, other devices, graphs that cannot be captured) runs as
it would without a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from espalier.errors import CaptureError, CompileError, ShapeError
from espalier.runtime.executable import Executable, compile

_MOST = 8  # programs that are kept for other shapes of the inputs


def backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What PyTorch's compiler calls with a piece of a network; gives the call that runs it.

    options: {"threads": N}, as in ``torch.compile(model, backend="espalier", options={"threads": 4})``; default:
    PyTorch's own number of threads. Raises ValueError for other options.

    >>> fast = torch.compile(model.eval(), backend="espalier")
    >>> with torch.no_grad():
    ...     fast(torch.randn(1, 3, 224, 224))
    """
    given = dict(options or {})
    threads = given.pop("threads", None)
    if given:
        raise ValueError(f"unknown options {', '.join(given)}; the espalier backend has: threads")
    return Piece(graph, threads)


class Piece:
    """A piece of a network that is compiled on its first call.

    programs: shapes of the inputs -> what runs them, None where PyTorch does. reason: why PyTorch does, or "".
    """

    def __init__(self, graph: fx.GraphModule, threads: int | None) -> None:
        self.graph, self.threads = graph, threads
        self.placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.static = [_is_static(node) for node in self.placeholders]
        self.programs: dict[tuple[Any, ...], Executable | None] = {}
        self.weights: tuple[tuple[int, int], ...] = ()
        self.reason = ""

    def __call__(self, *args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            self.reason = "it trains: call it under torch.no_grad()"
            return self.graph(*args)
        if any(x.device.type != "cpu" or x.layout != torch.strided for x in tensors):
            self.reason = "its tensors are not dense ones on the CPU"
            return self.graph(*args)
        weights = tuple((id(x), x._version) for x, static in zip(args, self.static) if static)
        if weights != self.weights:
            self.programs, self.weights = {}, weights
        program = self._program(args)
        if program is None:
            return self.graph(*args)
        with torch.no_grad():
            return program(*[x for x, fixed in zip(args, self.static) if isinstance(x, Tensor) and not fixed])

    def _program(self, args: Sequence[Any]) -> Executable | None:
        """The program for inputs like these, made where there is none; any batch size that it takes is one shape."""
        inputs = [x for x, static in zip(args, self.static) if isinstance(x, Tensor) and not static]
        key = tuple((tuple(x.shape[1:]), x.dtype, None if self._open else tuple(x.shape)) for x in inputs)
        if key not in self.programs:
            if len(self.programs) >= _MOST:
                self.programs.clear()
            self.programs[key] = self._compiled(args, inputs)
        return self.programs[key]

    @property
    def _open(self) -> bool:
        """Does PyTorch leave a size open? Then the batch may change."""
        return any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in self.placeholders)

    def _compiled(self, args: Sequence[Any], inputs: Sequence[Tensor]) -> Executable | None:
        if not inputs:
            self.reason = "it has no inputs"
            return None
        try:
            with torch.no_grad():
                program = compile(_bound(self.graph, args, self.static), tuple(inputs), threads=self._threads())
                if self._open and not all(program.graph.values[n].batched for n in program.graph.inputs):
                    raise ShapeError("its inputs have open sizes that are not those of a batch")
        except (CaptureError, CompileError, ShapeError) as error:
            self.reason = str(error)
            return None
        self.reason = "; ".join(program.fallbacks)
        return program

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()


def _is_static(node: fx.Node) -> bool:
    """Whether a placeholder stands for a parameter or buffer of the module."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return False
    marked = "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    return (
        marked or isinstance(value, nn.Parameter) or any(w in str(node.target) for w in ("_buffers_", "_parameters_"))
    )


def _bound(graph: fx.GraphModule, args: Sequence[Any], static: Sequence[bool]) -> fx.GraphModule:
    """A copy whose parameters and buffers are its own and whose sizes are read off its inputs."""
    bound = fx.GraphModule(graph, fx.Graph())
    copied: dict[fx.Node, fx.Node] = {}
    new = bound.graph
    old = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value, fixed in zip(old, args, static):
        if isinstance(value, Tensor) and not fixed:
            copied[node] = new.placeholder(node.name)
    for k, (node, value, fixed) in enumerate(zip(old, args, static)):
        if fixed:
            name = f"tensor_{k}"
            bound.register_parameter(name, value) if isinstance(value, nn.Parameter) else bound.register_buffer(
                name, value
            )
            copied[node] = new.get_attr(name)
        elif not isinstance(value, Tensor):
            copied[node] = _size(new, node, value, copied)
    result = new.graph_copy(graph.graph, copied)
    new.output(result)
    bound.recompile()
    return bound


def _size(graph: fx.Graph, node: fx.Node, value: Any, inputs: Mapping[fx.Node, fx.Node]) -> Any:
    """A size that is an argument: the dimension of an input that has it, or the number that it is now."""
    symbol = node.meta.get("example_value")
    for source, copied in inputs.items():
        example = source.meta.get("example_value")
        if not isinstance(example, Tensor) or copied.op != "placeholder":
            continue
        for dim, size in enumerate(example.shape):
            if isinstance(symbol, torch.SymInt) and isinstance(size, torch.SymInt) and str(size) == str(symbol):
                return graph.call_function(torch.ops.aten.sym_size.int, (copied, dim))
    return value
