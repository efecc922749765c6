"""Opaque ops: ATen ops without a row, kept as they were called and run by PyTorch.

Graphs also come from files, so a target is only looked up among ATen ops that map tensors to tensors and touch nothing
else: no in-place or out variants, no strings (``aten::from_file`` takes a path), no generators or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from espalier.errors import FileFormatError

_FORBIDDEN = ("str", "Device", "Generator", "Storage", "Stream")
_DTYPES = {
    str(d): d
    for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


def template(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name_of: Callable[[fx.Node], str | None],
    found: list[str],
    size: Callable[[Any], int],
) -> dict[str, Any]:
    """The call as JSON: ``{"input": k}`` stands for the k-th tensor, whose names are appended to `found`."""

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            name = name_of(value)
            if name is None:
                return size(value.meta["val"])
            found.append(name)
            return {"input": len(found) - 1}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.SymInt):
            return size(value)
        return None  # devices and layouts: those of the inputs

    return {"args": plain(args), "kwargs": {key: plain(value) for key, value in kwargs.items()}}


def resolve(target: str) -> Any:
    """The ATen overload named `target`. Raises FileFormatError for one that a graph may not call."""
    parts = target.split(".")
    if len(parts) != 3 or parts[0] != "aten" or not all(p.isidentifier() for p in parts):
        raise FileFormatError(target, "is not an ATen overload, so it will not be run")
    overload = getattr(getattr(torch.ops.aten, parts[1], None), parts[2], None)
    schema = getattr(overload, "_schema", None)
    if overload is None or schema is None:
        raise FileFormatError(target, f"is unknown to PyTorch {torch.__version__}")
    types = [str(a.type) for a in schema.arguments]
    unsafe = (
        schema.is_mutable
        or any(word in kind for kind in types for word in _FORBIDDEN if word != "Device")
        or not any("Tensor" in kind for kind in types)
        or not all("Tensor" in str(r.type) for r in schema.returns)
    )
    if unsafe:
        raise FileFormatError(target, "does more than map tensors to tensors, so it will not be run")
    return overload


def call(target: str, attrs: Mapping[str, Any], inputs: Sequence[Tensor]) -> Any:
    """Run an opaque op on `inputs`."""

    def real(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _DTYPES[value["dtype"]] if "dtype" in value else inputs[value["input"]]
        return [real(v) for v in value] if isinstance(value, list) else value

    return resolve(target)(*real(attrs["args"]), **{k: real(v) for k, v in attrs["kwargs"].items()})
