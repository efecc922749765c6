"""Opaque ops: ATen ops without a row, kept as they were called and run by PyTorch.

Graphs also come from files, so a target is only looked up among ATen ops that map tensors to tensors and touch nothing
else: no in-place or out variants, nothing internal, no file names (``aten::from_file``), generators or streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from espalier.errors import FileFormatError

_FORBIDDEN = ("Generator", "Storage", "Stream", "__torch__")
_WORDS = {  # string arguments that only choose among formulas: argument names
    *(
        "mode",
        "approximate",
        "rounding_mode",
        "equation",
        "reduce",
        "norm",
        "ord",
        "padding",
        "indexing",
        "nonlinearity",
    ),
    *("padding_mode", "pad_mode", "interpolation", "side", "UPLO", "driver"),
}
_INTERNAL = {  # ops with a leading underscore that check what they are given
    *("_to_copy", "_softmax", "_log_softmax", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_fft_r2c", "_fft_c2r"),
    *("_fft_c2c", "_native_batch_norm_legit_no_training", "_safe_softmax", "_conj", "_cdist_forward", "_trilinear"),
}
_UNSAFE = ("from_file", "unsafe_", "data", "set_data", "resolve_", "sparse_", "nested_", "quantize", "q_", "mkldnn_")
_DTYPES = {
    str(d): d
    for d in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def template(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name_of: Callable[[fx.Node], str | None],
    found: list[str],
) -> dict[str, Any]:
    """The call as JSON: ``{"input": k}`` stands for the k-th tensor, whose names are appended to `found`.

    Devices, layouts and memory formats are those of the inputs. Raises NotImplementedError for anything else, such as
    a size that follows the batch.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            name = name_of(value)
            if name is None:
                raise NotImplementedError(f"{value} follows the sizes of the inputs")
            found.append(name)
            return {"input": len(found) - 1}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
            return None
        raise NotImplementedError(f"an argument {value!r:.60}")

    return {"args": plain(args), "kwargs": {key: plain(value) for key, value in kwargs.items()}}


@cache
def resolve(target: str) -> Callable[..., Any]:
    """The ATen overload named `target`. Raises FileFormatError for one that a graph may not call.

    >>> resolve("aten.cumsum.default")
    <OpOverload(op='aten.cumsum', overload='default')>
    """
    parts = target.split(".")
    if len(parts) != 3 or parts[0] != "aten" or not all(p.isidentifier() for p in parts):
        raise FileFormatError(target, "is not an ATen overload, so it will not be run")
    name = parts[1]
    packet = None if name.startswith("__") else getattr(torch.ops.aten, name, None)
    overload = getattr(packet, parts[2], None)
    if not isinstance(overload, torch._ops.OpOverload):
        raise FileFormatError(target, f"is unknown to PyTorch {torch.__version__}")
    schema = overload._schema
    kinds = {a.name: str(a.real_type) for a in schema.arguments}
    safe = (
        not schema.is_mutable
        and not name.startswith(_UNSAFE)
        and (not name.startswith("_") or name in _INTERNAL)
        and not any(word in kind for kind in kinds.values() for word in _FORBIDDEN)
        and all("str" not in kind or argument in _WORDS for argument, kind in kinds.items())
        and any("Tensor" in kind for kind in kinds.values())
        and all("Tensor" in str(r.type) for r in schema.returns)
        and len(schema.returns) > 0
    )
    if not safe:
        raise FileFormatError(target, "does more than map tensors to tensors, so it will not be run")
    return overload


def check_template(target: str, attrs: Mapping[str, Any], count: int) -> None:
    """Raises ValueError for attributes that are no call of `target` on `count` tensors."""
    arguments = resolve(target)._schema.arguments  # type: ignore[attr-defined]
    if set(attrs) != {"args", "kwargs"} or not isinstance(attrs["args"], list) or not isinstance(attrs["kwargs"], dict):
        raise ValueError("an opaque op has attributes args and kwargs")
    given = {**dict(zip([a.name for a in arguments], attrs["args"])), **attrs["kwargs"]}
    words = {a.name for a in arguments if "str" in str(a.real_type)}
    for name, value in given.items():
        if isinstance(value, str) and name not in words:
            raise ValueError(f"{target}: argument {name} takes no word, got {value!r:.60}")
    waiting = list(given.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            index = value.get("input")
            sound = (set(value) == {"input"} and type(index) is int and 0 <= index < count) or (
                set(value) == {"dtype"} and isinstance(value["dtype"], str) and value["dtype"] in _DTYPES
            )
            if not sound:
                raise ValueError(f"{target}: an argument {value!r:.60}")


def call(target: str, attrs: Mapping[str, Any], inputs: Sequence[Tensor]) -> Any:
    """Run an opaque op on `inputs`."""

    def real(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _DTYPES[value["dtype"]] if "dtype" in value else inputs[value["input"]]
        return [real(v) for v in value] if isinstance(value, list) else value

    return resolve(target)(*real(attrs["args"]), **{k: real(v) for k, v in attrs["kwargs"].items()})
