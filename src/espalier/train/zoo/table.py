"""ZOO: one row per network; `build` makes one, `load_weights` fills it from a safetensors file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from espalier.errors import DataError, UnknownNameError
from espalier.train.zoo.compact import DenseNet40, MobileNetV2
from espalier.train.zoo.residual import cifar_resnet, cifar_resnet56_bottleneck, resnet18, resnet50
from espalier.train.zoo.small import VGG16, AlexNet, LeNet5, LeNetDigits, SqueezeNet10


@dataclass(frozen=True)
class Network:
    """A row of the zoo: how to make it, its input (channels, height, width), its classes and parameters."""

    make: Callable[..., nn.Module]
    shape: tuple[int, int, int]
    classes: int
    parameters: int
    about: str


CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
ZOO: dict[str, Network] = {
    "lenet5": Network(LeNet5, (1, 28, 28), 10, 431_080, "LeNet-5, 20-50-500-10, for MNIST"),
    "lenet_digits": Network(LeNetDigits, (1, 8, 8), 10, 208_394, "LeNet's shape for scikit-learn's digits"),
    "resnet20": Network(partial(cifar_resnet, 20), CIFAR, 10, 269_722, "ResNet-20 for CIFAR, shortcut A"),
    "resnet32": Network(partial(cifar_resnet, 32), CIFAR, 10, 464_154, "ResNet-32 for CIFAR, shortcut A"),
    "resnet44": Network(partial(cifar_resnet, 44), CIFAR, 10, 658_586, "ResNet-44 for CIFAR, shortcut A"),
    "resnet56": Network(partial(cifar_resnet, 56), CIFAR, 10, 853_018, "ResNet-56 for CIFAR, shortcut A"),
    "resnet20b": Network(
        partial(cifar_resnet, 20, shortcut="B", classifier="fc"), CIFAR, 10, 272_474, "ResNet-20 for CIFAR, shortcut B"
    ),
    "resnet56_bottleneck": Network(cifar_resnet56_bottleneck, CIFAR, 100, 614_452, "bottleneck ResNet-56 for CIFAR"),
    "resnet18_cifar": Network(partial(resnet18, stem="cifar"), CIFAR, 10, 11_173_962, "ResNet-18 for CIFAR"),
    "densenet40": Network(DenseNet40, CIFAR, 10, 1_019_722, "DenseNet-40 (k = 12) for CIFAR"),
    "vgg16_cifar": Network(partial(VGG16, cifar=True), CIFAR, 10, 14_728_266, "VGG-16 with batch norm for CIFAR"),
    "alexnet": Network(AlexNet, IMAGENET, 1000, 61_100_840, "AlexNet"),
    "vgg16": Network(VGG16, IMAGENET, 1000, 138_357_544, "VGG-16"),
    "vgg16_bn": Network(partial(VGG16, batch_norm=True), IMAGENET, 1000, 138_365_992, "VGG-16 with batch norm"),
    "resnet18": Network(resnet18, IMAGENET, 1000, 11_689_512, "ResNet-18"),
    "resnet50": Network(resnet50, IMAGENET, 1000, 25_557_032, "ResNet-50"),
    "mobilenetv2": Network(MobileNetV2, IMAGENET, 1000, 3_504_872, "MobileNetV2 1.0"),
    "squeezenet10": Network(SqueezeNet10, (3, 227, 227), 1000, 1_248_424, "SqueezeNet 1.0"),
}


def build(name: str, *, classes: int | None = None, **options: Any) -> nn.Module:
    """A network with random weights: a name of ZOO, or ``package.module:factory`` of your own.

    classes: outputs of the classifier; passed on to your factory only if given as an option there.
    Raises UnknownNameError for a name that the zoo does not have, DataError for a factory that cannot be called.

    >>> sum(p.numel() for p in build("resnet20").parameters())
    269722
    """
    if ":" in name:
        return _factory(name)(**options)
    if name not in ZOO:
        raise UnknownNameError("model", name, ZOO, "Your own: package.module:factory")
    row = ZOO[name]
    return row.make(classes=classes or row.classes, **options)


def example_shape(name: str) -> tuple[int, int, int]:
    """The input (channels, height, width) that a network of the zoo is made for."""
    if name not in ZOO:
        raise UnknownNameError("model", name, ZOO)
    return ZOO[name].shape


def _factory(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # models in the current directory, as with python -m
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise DataError(f"model {name!r}: {error}. Write package.module:factory, importable from here") from error
    if not callable(found):
        raise DataError(f"model {name!r}: {attribute} is a {type(found).__name__}, not a function that makes a module")
    return found


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill `model` from a safetensors file, also one with packed weights.

    Packed: ``NAME.q`` int8 with ``NAME.scale`` per filter, or ``NAME.codes`` uint8 with ``NAME.codebook``.
    Raises DataError naming the tensors that are missing, left over or of another shape.
    """
    try:
        tensors = _unpacked(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from error
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    problems = [f"missing: {k}" for k in wanted if k not in given]
    problems += [f"left over: {k}" for k in given if k not in wanted]
    problems += [
        f"{k}: {list(given[k].shape)} in the file, {list(wanted[k].shape)} in the network"
        for k in wanted
        if k in given and given[k].shape != wanted[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{path} does not fit this network: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(given, strict=False)


def _unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".q"):
            scale = tensors[name[:-2] + ".scale"]
            made[name[:-2]] = tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
        elif name.endswith(".codes"):
            made[name[:-6]] = tensors[name[:-6] + ".codebook"][tensor.long()]
        elif not name.endswith((".scale", ".codebook")):
            made[name] = tensor
    return made


def count(model: nn.Module) -> int:
    """Trainable numbers of a module."""
    return sum(p.numel() for p in model.parameters())


def meta(name: str) -> nn.Module:
    """The network without memory for its weights, to look at its shapes."""
    with torch.device("meta"):
        return build(name)
