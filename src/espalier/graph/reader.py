"""Reading: the nodes of an exported program become nodes of a Graph, by the rows of OPS."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from espalier.errors import CaptureError, FileFormatError
from espalier.graph.ir import OPAQUE, Graph, Node, Value
from espalier.graph.op import UnbatchedError
from espalier.graph.opaque import resolve, template
from espalier.graph.ops import OPS, TARGETS


class FollowsBatchError(Exception):
    """A place where a size follows the batch and no attribute can say so."""


@dataclass(frozen=True)
class Program:
    """What export found.

    nodes: in order. lifted: placeholder -> name of the tensor in the module. stored: those tensors, or copies of them.
    out_spec: the form of the outputs.
    """

    nodes: list[fx.Node]
    lifted: Mapping[str, str]
    stored: Mapping[str, Any]
    out_spec: Any


@dataclass(frozen=True)
class _Named:
    """A tensor argument: the value's name, its shape and dtype, and the tensor itself where the code states it."""

    value: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    constant: Tensor | None = None


def read(program: Program, model: nn.Module) -> Graph:
    """The graph of `program`; its tensors are those of `model`. Raises FollowsBatchError, CaptureError."""
    return _Reader(program, model).graph()


def is_op(node: fx.Node) -> bool:
    """Can the reader follow this call, by itself or through the row of its functional twin?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem or not isinstance(node.meta.get("val"), (Tensor, list, tuple))
    return not node.target._schema.is_mutable or _target(node) in TARGETS


def _target(node: fx.Node) -> str:
    """The overload's name; that of the functional twin for an in-place op (``aten.relu_.default``)."""
    target = str(node.target)
    twin = target.replace("_.", ".", 1)
    return twin if target not in TARGETS and twin in TARGETS else target


class _Reader:
    """Reads a program node by node."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program, self.model = program, model
        self.known = set(model.state_dict(keep_vars=True))
        self.values: dict[str, Value] = {}
        self.tensors: dict[str, Tensor] = {}
        self.nodes: list[Node] = []
        self.names: dict[str, str] = {}  # fx name -> value name
        self.lists: dict[str, tuple[str | None, ...]] = {}  # fx name of a node with several results -> value names
        self.first: dict[int, str] = {}  # id of a tensor of the model -> the first name it was met under
        self.aliases: dict[str, str] = {}
        self.stated: set[str] = set()  # tensors that the code states: the same in every call
        self.free: list[str] = []  # inputs whose dimension 0 is free

    def graph(self) -> Graph:
        inputs: list[str] = []
        outputs: tuple[str, ...] = ()
        tree: Any = None
        for node in self.program.nodes:
            if node.op == "placeholder" and node.name in self.program.lifted:
                self._tensor(node, self.program.lifted[node.name])
            elif node.op == "placeholder":
                inputs.append(self._value(node.name, node.name, node.meta["val"]))
                self.free += [node.name] if self.values[node.name].batched else []
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                outputs, tree = self._outputs(node)
        used = {name for node in self.nodes for name in node.inputs if name} | set(outputs)
        made = {name for node in self.nodes for name in node.outputs} | set(inputs)
        tensors = {k: v for k, v in self.tensors.items() if k in used}
        return Graph(
            inputs=tuple(inputs),
            outputs=outputs,
            nodes=tuple(self.nodes),
            values={k: v for k, v in self.values.items() if k in made or k in tensors},
            tensors=tensors,
            parameters=frozenset(k for k, v in tensors.items() if isinstance(v, nn.Parameter)),
            output_tree=tree,
            aliases=self._all_aliases(tensors),
            constants=frozenset(k for k in tensors if k not in self.known),
        )

    def _outputs(self, node: fx.Node) -> tuple[tuple[str, ...], Any]:
        names: list[str] = []
        leaves: list[int | None] = []
        for arg in node.args[0]:  # type: ignore[union-attr]
            if isinstance(arg, fx.Node) and arg.name in self.names:
                leaves.append(len(names))
                names.append(self.names[arg.name])
            elif arg is None:
                leaves.append(None)
            else:
                raise CaptureError(f"the network returns {arg!r}, which is not a tensor: leave it out of its outputs")
        return tuple(names), _plain(pytree.tree_unflatten(leaves, self.program.out_spec))

    def _tensor(self, node: fx.Node, name: str) -> None:
        tensor = _lookup(self.model, name, self.program.stored.get(name))
        if not isinstance(tensor, Tensor):
            raise CaptureError(f"{name} is a {type(tensor).__name__}, not a tensor")
        name = self.first.setdefault(id(tensor), name)
        self.names[node.name] = name
        self._keep(name, tensor)
        if name not in self.known and not isinstance(tensor, nn.Parameter):
            self.stated.add(name)

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor
        self.values[name] = Value(name, tuple(tensor.shape), tensor.dtype)

    def _all_aliases(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Tied tensors: the graph keeps the name under which it met them first."""
        names = {id(tensor): name for name, tensor in tensors.items()}
        everything = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        return {n: names[id(t)] for n, t in everything if id(t) in names and names[id(t)] != n}

    def _value(self, fx_name: str, name: str, meta: Any) -> str:
        shape = tuple(_size(s) for s in meta.shape)
        batched = len(shape) > 0 and is_open(meta.shape[0])
        self.values[name] = Value(name, shape, meta.dtype, batched)
        self.names[fx_name] = name
        return name

    def _call(self, node: fx.Node) -> None:
        meta = node.meta.get("val")
        if node.target is operator.getitem:
            source, k = node.args
            if isinstance(source, fx.Node) and source.name in self.lists:
                found = self.lists[source.name][k]  # type: ignore[index]
                if found is not None:
                    self.names[node.name] = found
                return
        if not isinstance(meta, (Tensor, list, tuple)):
            return  # sizes, and checks of sizes
        if not isinstance(node.target, torch._ops.OpOverload):
            raise CaptureError(f"{node.target} ({place_of(node)}) is no op of PyTorch that Espalier can follow")
        if self._state(node, meta):
            return
        op, inputs, attrs = self._parse(node, meta)
        if (before := attrs.pop("before", None)) is not None:
            inputs[0] = self._pad_before(node, str(inputs[0]), before)
        metas = [meta] if isinstance(meta, Tensor) else list(meta)
        if op == "batch_norm":
            metas = metas[:1]  # its other results are those of training
        made = self._results(node, metas, single=isinstance(meta, Tensor))
        self.nodes.append(Node(node.name, op, tuple(inputs), made, attrs, str(node.target), place_of(node)))

    def _results(self, node: fx.Node, metas: list[Any], single: bool) -> tuple[str, ...]:
        if single:
            return (self._value(node.name, node.name, metas[0]),)
        names = [
            self._value(f"{node.name}.{k}", f"{node.name}.{k}", m) if isinstance(m, Tensor) else None
            for k, m in enumerate(metas)
        ]
        self.lists[node.name] = tuple(names)
        return tuple(name for name in names if name is not None)

    def _state(self, node: fx.Node, meta: Any) -> bool:
        """Compute at once what depends on nothing but the code: ``torch.arange(4) * 2``."""
        sources = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), (Tensor, list))]
        if any(self.names.get(source.name) not in self.stated for source in sources):
            return False
        sized = [s for m in (meta if isinstance(meta, (list, tuple)) else [meta]) for s in getattr(m, "shape", ())]
        if any(is_open(s) for s in sized):
            raise FollowsBatchError(f"{node.target} ({place_of(node)}) makes a tensor whose size follows the batch")
        if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
            raise CaptureError(f"{node.target} ({place_of(node)}) draws random numbers: give them to it as an input")

        def real(value: Any) -> Any:
            return self.tensors[self.names[value.name]].detach().clone() if isinstance(value, fx.Node) else value

        args, kwargs = pytree.tree_map_only(fx.Node, real, (node.args, dict(node.kwargs)))
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        results = [result] if isinstance(result, Tensor) else list(result)
        names = [
            f"constants.{node.name}" if len(results) == 1 else f"constants.{node.name}_{k}" for k in range(len(results))
        ]
        for name, tensor in zip(names, results):
            self._keep(name, tensor)
            self.stated.add(name)
        if isinstance(result, Tensor):
            self.names[node.name] = names[0]
        else:
            self.lists[node.name] = tuple(names)
        return True

    def _pad_before(self, node: fx.Node, x: str, amounts: list[int]) -> str:
        """What one side of a convolution has more than the other."""
        value, name = self.values[x], f"{node.name}_pad"
        shape = list(value.shape)
        for k in range(len(amounts) // 2):
            shape[-1 - k] += amounts[2 * k] + amounts[2 * k + 1]
        self.values[name] = Value(name, tuple(shape), value.dtype, value.batched)
        attrs = {"amounts": amounts, "value": 0.0}
        self.nodes.append(Node(name, "pad", (x,), (name,), attrs, "aten.constant_pad_nd.default", place_of(node)))
        return name

    def _parse(self, node: fx.Node, meta: Any) -> tuple[str, list[str | None], dict[str, Any]]:
        target = _target(node)
        if target in TARGETS:
            row, parse = TARGETS[target]
            try:
                inputs, attrs = parse({k: self._argument(v) for k, v in _bound(node).items()})
                names = [None if x is None else x.value for x in inputs]
                return self._settle(row.name, names, dict(attrs), meta)
            except UnbatchedError as error:
                if self.free:
                    raise FollowsBatchError(f"{target} ({place_of(node)}): {error}") from error
            except (NotImplementedError, KeyError, AttributeError, TypeError, ValueError):
                pass  # an argument that the row does not speak of: the op is not the one it describes
        found: list[str] = []
        try:
            resolve(str(node.target))
            attrs = template(node.args, node.kwargs, lambda n: self.names.get(n.name), found)
        except FileFormatError as error:
            raise CaptureError(f"{place_of(node)}: {error}") from error
        except NotImplementedError as error:
            raise FollowsBatchError(f"{node.target} ({place_of(node)}): {error}") from error
        return OPAQUE, list(found), attrs

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            meta = value.meta.get("val")
            if not isinstance(meta, Tensor):
                return meta
            name = self.names[value.name]
            return _Named(name, tuple(meta.shape), meta.dtype, self.tensors[name] if name in self.stated else None)
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        return value

    def _settle(
        self, op: str, inputs: list[str | None], attrs: dict[str, Any], meta: Any
    ) -> tuple[str, list[str | None], dict[str, Any]]:
        """Attributes that depend on sizes, said by sizes: what follows the batch becomes -1."""
        if op in ("reshape", "expand"):
            shape = [-1 if is_open(s) else int(s) for s in meta.shape]
            if shape.count(-1) > 1:
                raise NotImplementedError("a shape in which two sizes follow the batch")
            attrs["shape"] = shape
            source = self.values[str(inputs[0])]
            if op == "expand" and -1 in shape and not (source.batched and len(source.shape) == len(shape)):
                if shape[0] != -1 or not self.free:
                    raise NotImplementedError("an expansion to the batch size in another dimension than the first")
                op, inputs = "expand_batch", [inputs[0], self._as_long_as(meta.shape[0])]
        elif op == "split":
            attrs["sizes"] = [int(m.shape[attrs["dim"]]) for m in meta]
        elif op == "slice":
            end = attrs["end"]
            attrs |= {"start": attrs["start"] or 0, "end": None if end is None or _is_past(end) else end}
            if (attrs["start"], attrs["end"], attrs["step"]) == (0, None, 1):
                op, attrs = "identity", {}
        attrs = {k: _checked(v) for k, v in attrs.items()}
        OPS[op].check({k: v for k, v in attrs.items() if k != "before"})
        return op, inputs, attrs

    def _as_long_as(self, size: torch.SymInt) -> str:
        """An input whose dimension 0 has this size."""
        for node in self.program.nodes:
            if node.name in self.free and str(node.meta["val"].shape[0]) == str(size):
                return node.name
        raise NotImplementedError(f"no input has {size} samples")


def _bound(node: fx.Node) -> dict[str, Any]:
    """Every argument by its schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound |= dict(zip([a.name for a in schema.arguments], node.args))
    return {a.name: None for a in schema.arguments} | bound | dict(node.kwargs)


def _is_past(end: Any) -> bool:
    return type(end) is int and end > 2**40


def _checked(value: Any) -> Any:
    """Attributes are plain values; a size that follows the batch in any other place is not understood."""
    if isinstance(value, (list, tuple)):
        return [_checked(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise NotImplementedError(f"attribute {value}")


def is_open(size: Any) -> bool:
    """Whether a size is free: a symbol that nothing on the way bound to a number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _size(size: Any) -> int:
    """A size as a number: what follows the batch has its size at the example inputs."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _lookup(model: nn.Module, name: str, otherwise: Any) -> Any:
    """The module's own tensor, so that the graph shares it; export may hand out copies."""
    try:
        return operator.attrgetter(name)(model)
    except AttributeError:
        return otherwise


def _plain(tree: Any) -> Any:
    if dataclasses.is_dataclass(tree):
        tree = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    if isinstance(tree, Mapping):
        return {str(k): _plain(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(v) for v in tree]
    return tree


def place_of(node: fx.Node) -> str:
    """Module path, and the last line of the user's own code: ``layer1.0, net.py:31: return self.act(x)``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(v[0]) for v in reversed(list(stack.values())) if isinstance(v, tuple) and v[0]), "")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    own = [k for k, line in enumerate(lines) if line.startswith("File") and "/torch/" not in line]
    if not own or own[-1] + 1 >= len(lines):
        return path
    _, file, rest = lines[own[-1]].split('"', 2)
    number = rest.split("line ", 1)[-1].split(",")[0]
    return f"{path}{', ' if path else ''}{Path(file).name}:{number}: {lines[own[-1] + 1]}"
