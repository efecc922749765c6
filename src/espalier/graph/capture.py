"""Capture: an `nn.Module` becomes a Graph. The only file that knows torch.export."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.export
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from espalier.errors import CaptureError, ShapeError
from espalier.graph.ir import Graph
from espalier.graph.reader import FollowsBatchError, Program, is_op, is_open, read

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
    args, kwargs = arguments(example_inputs)
    # export makes parameters, also inside the caller's inference mode
    with _in_eval_mode(model), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own, about itself
        exported = _export_with_free_batch(model, args, kwargs)
        if exported is not None:
            try:
                return read(_program(exported), model)
            except FollowsBatchError:
                pass  # then with the batch size as it is
        exported = _export(model, args, kwargs)
        try:
            return read(_program(exported), model)
        except FollowsBatchError as error:
            raise CaptureError(f"{type(model).__name__} cannot be captured: {error}") from error


def arguments(example: ExampleInputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Example inputs as the arguments and keyword arguments of a call. Raises ShapeError for what is no tensor.

    >>> arguments({"x": torch.ones(1, 4)})
    ((), {'x': tensor([[1., 1., 1., 1.]])})
    """
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = {}
    if isinstance(example, Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, Sequence) and not isinstance(example, str):
        args = tuple(example)
    else:
        raise ShapeError(f"example inputs must be a tensor, a tuple or a dict of tensors, got {type(example).__name__}")
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            raise ShapeError(
                f"example inputs must be tensors, got {type(value).__name__}: bind other arguments first, in a module "
                "whose forward takes the tensors alone"
            )
    return args, kwargs


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _export_with_free_batch(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> torch.export.ExportedProgram | None:
    """The network with the sizes of dimension 0 left open, or None where it insists on the size that it got.

    A size of 1 would be taken for a constant, so that samples stand twice where every input has only one.
    """
    everything = [x for x in (*args, *kwargs.values()) if x.ndim]
    alone = all(x.shape[0] == 1 for x in everything)

    def widened(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if x.ndim and alone else x.clone()

    def free(x: Tensor) -> dict[int, Any] | None:
        return {0: torch.export.Dim.AUTO} if x.ndim and (alone or x.shape[0] > 1) else None

    wide_args, wide_kwargs = tuple(widened(x) for x in args), {k: widened(x) for k, x in kwargs.items()}
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments  # also of *args and **kwargs
        shapes = pytree.tree_map_only(Tensor, free, bound)
        exported = torch.export.export(model, wide_args, wide_kwargs, dynamic_shapes=shapes, strict=False)
    except Exception:  # whatever the reason, without a free batch it may work
        return None
    names = set(exported.graph_signature.user_inputs)
    inputs = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    if alone and not all(is_open(x.shape[0]) for x in inputs if isinstance(x, Tensor) and x.ndim):
        return None  # it took two samples for granted
    return exported


def _export(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    try:
        cloned = tuple(x.clone() for x in args), {name: x.clone() for name, x in kwargs.items()}
        return torch.export.export(model, *cloned, strict=False)
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        shapes = ", ".join(str(list(x.shape)) for x in (*args, *kwargs.values()))
        raise CaptureError(
            f"torch.export cannot follow {type(model).__name__} on inputs of {shapes}{_culprit(error)}: "
            f"{first.rstrip('.')}. If its forward branches on the values of tensors, wrap the part that does not in a "
            "module of its own and capture that; if it is called with other inputs, give such inputs as the example"
        ) from error


def _culprit(error: BaseException) -> str:
    """The last line of code in the traceback that is neither torch's nor ours."""
    ours, torchs = Path(__file__).parent, Path(torch.__file__).parent
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not {ours, torchs} & set(Path(f.filename).parents) and not f.filename.startswith("<")
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


# -- programs without side effects -----------------------------------------------------------------


def _program(exported: torch.export.ExportedProgram) -> Program:
    """The exported program as plain tables; in-place ops are rewritten where they could be seen from elsewhere."""
    if _needs_rewriting(exported.graph):
        exported = exported.run_decompositions({})
    signature = exported.graph_signature
    changed = [spec.target for spec in signature.output_specs if spec.kind != OutputKind.USER_OUTPUT]
    if changed:
        raise CaptureError(f"the network changes {changed[0]} in eval mode: make it an output, or leave it as it is")
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted |= dict(signature.inputs_to_lifted_tensor_constants)
    return Program(
        nodes=list(exported.graph.nodes),
        lifted=lifted,
        stored={**exported.constants, **exported.state_dict},
        out_spec=exported.call_spec.out_spec,
    )


def _needs_rewriting(graph: fx.Graph) -> bool:
    """Is there an in-place op without a functional twin, or on a tensor that others see under another name?"""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            if node.op == "call_function" and not is_op(node):
                return True
            continue
        if not node.target._schema.is_mutable:
            continue
        if not is_op(node) or _seen_elsewhere(node):
            return True
    return False


def _seen_elsewhere(node: fx.Node) -> bool:
    """Is the tensor that `node` writes to known by other names too, or is it an input?"""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or any(u is not node and (_is_view(u) or u > node) for u in source.users):
        return True
    while _is_view(source):
        source = source.args[0]
        if not isinstance(source, fx.Node) or len(source.users) > 1:
            return True
    return source.op == "placeholder"


def _is_view(node: fx.Node) -> bool:
    """May its result share memory with its first argument?"""
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return shares or any(word in str(node.target) for word in ("reshape", "contiguous", "flatten", ".to.", "dropout"))
