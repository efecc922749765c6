"""Weights from safetensors files, plain or packed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from espalier.errors import DataError

SHOWN = 5  # problems named in an error message
COUNTER = "num_batches_tracked"  # of a batch norm: not a weight, and many files leave it out
PACKED = {".q": ".scale", ".codes": ".codebook"}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, packed ones unpacked to float32.

    Packed is ``NAME.q`` (int8, times ``NAME.scale`` for each filter) or ``NAME.codes`` (uint8, into
    ``NAME.codebook``). Raises DataError for a file that is none, is damaged, or lacks a scale or codebook.

    >>> read_weights("mobilenetv2_int8.safetensors")["classifier.1.weight"].dtype  # doctest: +SKIP
    torch.float32
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from error
    companions = {name[: -len(end)] + PACKED[end] for name in stored if (end := _packing(name))}
    if missing := sorted(companions - set(stored)):
        raise DataError(f"{path}: {missing[0]} is missing, without which its packed tensor cannot be read")
    made = {}
    for name, tensor in stored.items():
        end = _packing(name)
        if end:
            plain = name[: -len(end)]
            made[plain] = _unpack(path, plain, tensor, stored[plain + PACKED[end]], end)
        elif name not in companions:
            made[name] = tensor
    return made


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill `model` in place from a safetensors file, also from one with packed weights (see `read_weights`).

    Raises DataError naming the tensors that are missing, left over or of another shape; the model is then as it was.

    >>> model = cifar_resnet(20)  # doctest: +SKIP
    >>> load_weights(model, "cifar10_resnet20.safetensors")  # doctest: +SKIP
    """
    given, wanted = read_weights(path), model.state_dict()
    problems = [f"missing: {name}" for name in wanted if name not in given and not name.endswith(COUNTER)]
    problems += [f"left over: {name}" for name in given if name not in wanted]
    problems += [
        f"{name}: {list(given[name].shape)} in the file, {list(tensor.shape)} in the network"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        raise DataError(f"{path} does not fit this network: {_listed(problems)}")
    model.load_state_dict(given, strict=False)


def inner_widths(path: str | Path) -> tuple[int, ...]:
    """The inner width of every residual block in a file: what `build("resnet20", widths=...)` wants.

    Raises DataError for a file without ``layerK.J.conv1.weight``.

    >>> inner_widths("cifar10_resnet20_distiller_thin.safetensors")  # doctest: +SKIP
    (11, 8, 9, 22, 20, 32, 52, 56, 64)
    """
    found: dict[tuple[int, int], int] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if match := re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight(\.q|\.codes)?", name):
                    found[int(match[1]), int(match[2])] = file.get_slice(name).get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from error
    if not found:
        raise DataError(f"{path}: no layerK.J.conv1.weight in it, so no widths of residual blocks")
    return tuple(found[block] for block in sorted(found))


def _packing(name: str) -> str:
    return next((end for end in PACKED if name.endswith(end)), "")


def _unpack(path: str | Path, name: str, packed: Tensor, companion: Tensor, end: str) -> Tensor:
    if end == ".codes":
        if packed.numel() and int(packed.max()) >= len(companion):
            raise DataError(f"{path}: {name} has code {int(packed.max())} but only {len(companion)} in its codebook")
        return companion[packed.long()].float()
    if companion.numel() not in (1, len(packed)):
        raise DataError(f"{path}: {name} has {companion.numel()} scales for {len(packed)} filters")
    return packed.float() * companion.float().reshape(-1, *[1] * (packed.ndim - 1))


def _listed(problems: Iterable[str]) -> str:
    every = list(problems)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return "; ".join(every[:SHOWN]) + more
