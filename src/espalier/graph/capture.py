"""Capture: an `nn.Module` becomes a Graph. The only file that knows torch.export."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.export
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from espalier.errors import CaptureError, ShapeError
from espalier.graph.ir import OPAQUE, Graph, Node, Value
from espalier.graph.opaque import template
from espalier.graph.ops import TARGETS

ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Graph:
    """What `model` computes in eval mode on inputs like `example_inputs`.

    example_inputs: a tensor, a tuple of tensors, or a dict of keyword tensors. Dimension 0 is taken for the batch
        where the network allows it (`Value.batched`).

    The module is not changed; tensors are shared with it. Raises CaptureError for a network that torch.export cannot
    follow, ShapeError for inputs that are no tensors.

    >>> [node.op for node in capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.ones(1, 4)).nodes]
    ['linear', 'relu']
    """
    args, kwargs = _inputs(example_inputs)
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # export makes parameters, also inside the caller's inference mode
            exported = _export(model, args, kwargs)
    finally:
        for module, training in flags:
            module.training = training
    return _Reader(exported, model).graph()


def _inputs(example: ExampleInputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if isinstance(example, Tensor):
        return (example,), {}
    args: tuple[Tensor, ...] = () if isinstance(example, Mapping) else tuple(example)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            raise ShapeError(f"example inputs must be tensors, got {type(value).__name__}: bind other arguments first")
    return args, kwargs


def _export(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """With the batch size free where that can be, else as it is."""

    def widen(x: Tensor) -> Tensor:  # a size of 1 would be taken for a constant
        return torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x.clone()

    def free(x: Tensor) -> dict[int, Any] | None:
        return {0: torch.export.Dim.AUTO} if x.ndim else None

    wide_args, wide_kwargs = tuple(widen(x) for x in args), {k: widen(x) for k, x in kwargs.items()}
    shapes = (*[free(x) for x in args], *[free(x) for x in kwargs.values()])
    names = dict(zip(kwargs, shapes[len(args) :]))
    spread = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())
    free_shapes = names if kwargs else (tuple(shapes),) if spread else tuple(shapes)
    try:
        return torch.export.export(model, wide_args, wide_kwargs, dynamic_shapes=free_shapes, strict=False)
    except Exception:  # any reason: then without a free batch
        try:
            return torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            given = ", ".join(str(list(x.shape)) for x in (*args, *kwargs.values()))
            raise CaptureError(
                f"torch.export cannot follow {type(model).__name__} on inputs of shape {given}: {first.strip()} "
                "(Are these its inputs? Does its forward branch on values of tensors? Then wrap the part that can be "
                "followed in a module of its own)"
            ) from error


class _Reader:
    """Reads an exported program node by node."""

    def __init__(self, exported: torch.export.ExportedProgram, model: nn.Module) -> None:
        self.exported, self.model = exported, model
        self.values: dict[str, Value] = {}
        self.tensors: dict[str, Tensor] = {}
        self.nodes: list[Node] = []
        self.names: dict[str, str] = {}  # fx name -> value name
        self.lists: dict[str, tuple[str, ...]] = {}  # fx name of a node with several results -> value names
        self.parameters: set[str] = set()

    def graph(self) -> Graph:
        signature = self.exported.graph_signature
        lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted |= dict(signature.inputs_to_lifted_tensor_constants)
        inputs: list[str] = []
        outputs: tuple[str, ...] = ()
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                if node.name in lifted:
                    self._tensor(node, lifted[node.name])
                else:
                    inputs.append(self._value(node, node.name, node.meta["val"]))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                outputs = tuple(self.names[arg.name] for arg in node.args[0] if isinstance(arg, fx.Node))
        used = {name for node in self.nodes for name in node.inputs if name} | set(outputs)
        order = pytree.tree_unflatten(list(range(len(outputs))), self.exported.call_spec.out_spec)
        return Graph(
            inputs=tuple(inputs),
            outputs=outputs,
            nodes=tuple(self.nodes),
            values={k: v for k, v in self.values.items() if k in used or k in inputs or k not in self.tensors},
            tensors={k: v for k, v in self.tensors.items() if k in used},
            parameters=frozenset(self.parameters & used),
            output_tree=_plain(order),
            aliases=self._aliases(),
        )

    def _tensor(self, node: fx.Node, name: str) -> None:
        known = self.exported.state_dict.get(name, self.exported.constants.get(name))
        tensor = _lookup(self.model, name, known)
        assert isinstance(tensor, Tensor)
        self.tensors[name] = tensor
        if isinstance(tensor, nn.Parameter):
            self.parameters.add(name)
        self.names[node.name] = name
        self.values[name] = Value(name, tuple(tensor.shape), tensor.dtype)

    def _aliases(self) -> dict[str, str]:
        """Tied tensors: export keeps one of their names."""
        first: dict[int, str] = {id(t): n for n, t in self.tensors.items()}
        everything = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        return {n: first[id(t)] for n, t in everything if id(t) in first and first[id(t)] != n}

    def _value(self, node: fx.Node, name: str, meta: Any) -> str:
        shape = [_size(s) for s in meta.shape]
        batched = len(shape) > 0 and isinstance(meta.shape[0], torch.SymInt)
        self.values[name] = Value(name, tuple(shape), meta.dtype, batched)
        self.names[node.name] = name
        return name

    def _call(self, node: fx.Node) -> None:
        meta = node.meta.get("val")
        if node.target is operator.getitem:
            self.names[node.name] = self.lists[node.args[0].name][node.args[1]]  # type: ignore[union-attr,index]
            return
        if isinstance(meta, (list, tuple)):
            made = [self._value(node, f"{node.name}.{k}", m) for k, m in enumerate(meta) if isinstance(m, Tensor)]
            self.lists[node.name] = tuple(made)
        elif isinstance(meta, Tensor):
            made = [self._value(node, node.name, meta)]
        else:
            return  # sizes and checks of sizes
        op, inputs, attrs = self._parse(node, meta)
        self.nodes.append(Node(node.name, op, tuple(inputs), tuple(made), attrs, str(node.target), _place(node)))

    def _parse(self, node: fx.Node, meta: Any) -> tuple[str, list[str | None], dict[str, Any]]:
        target = str(node.target)
        if target in TARGETS:
            row, parse = TARGETS[target]
            bound = {k: self._argument(v) for k, v in _bound(node).items()}
            try:
                inputs, attrs = parse(bound)
                names = [None if x is None else x.value for x in inputs]
                return row.name, names, self._settle(row.name, dict(attrs), meta, names)
            except (NotImplementedError, KeyError, AttributeError, TypeError):
                pass  # an argument that the row does not speak of: the op is not the one it describes
        found: list[str] = []
        attrs = template(node.args, node.kwargs, lambda n: self.names.get(n.name), found, _size)
        return OPAQUE, list(found), attrs

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            meta = value.meta.get("val")
            return _Named(self.names[value.name], tuple(meta.shape)) if isinstance(meta, Tensor) else meta
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        return value

    def _settle(self, op: str, attrs: dict[str, Any], meta: Any, inputs: list[str | None]) -> dict[str, Any]:
        """Attributes that depend on sizes, said by sizes: what follows the batch becomes -1."""
        if op in ("reshape", "expand"):
            shape = [-1 if isinstance(s, torch.SymInt) else s for s in meta.shape]
            if shape.count(-1) > 1:
                raise NotImplementedError("a shape in which two sizes follow the batch")
            attrs["shape"] = shape
        if op == "split":
            dim = attrs["dim"]
            attrs["sizes"] = [int(m.shape[dim]) for m in meta]
        if op == "slice":
            attrs = {"dim": attrs["dim"], "start": attrs["start"] or 0, "end": attrs["end"], "step": attrs["step"]}
            attrs["end"] = None if attrs["end"] is None or attrs["end"] > 2**62 else attrs["end"]
        return {k: _checked(v) for k, v in attrs.items()}


class _Named:
    """A tensor argument: the value's name, and the shape for those rows that need it."""

    def __init__(self, value: str, shape: tuple[Any, ...]) -> None:
        self.value, self.shape = value, shape


def _bound(node: fx.Node) -> dict[str, Any]:
    """Every argument by its schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound |= dict(zip([a.name for a in schema.arguments], node.args))
    return {a.name: None for a in schema.arguments} | bound | dict(node.kwargs)


def _checked(value: Any) -> Any:
    """Attributes are plain values; a size that follows the batch in any other place is not understood."""
    if isinstance(value, (list, tuple)):
        return [_checked(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise NotImplementedError(f"attribute {value}")


def _size(size: Any) -> int:
    """A size as a number: what follows the batch has its size at the example inputs."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _lookup(model: nn.Module, name: str, otherwise: Tensor | None) -> Tensor | None:
    """The module's own tensor, so that the graph shares it; export may hand out copies."""
    try:
        return operator.attrgetter(name)(model)
    except AttributeError:
        return otherwise


def _plain(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(k): _plain(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(v) for v in tree]
    return tree


def _place(node: fx.Node) -> str:
    """Module path and the last line of the user's own code."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(v[0]) for v in reversed(list(stack.values())) if isinstance(v, tuple) and v[0]), "")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    own = [k for k, line in enumerate(lines) if line.startswith("File") and "/torch/" not in line]
    code = lines[own[-1] + 1] if own and own[-1] + 1 < len(lines) else ""
    return f"{path}: {code}" if code else path


Callback = Callable[[fx.Node], str | None]
