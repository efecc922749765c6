"""ZOO: one row per network; `build` makes one."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from espalier.errors import DataError, UnknownNameError
from espalier.train.zoo.compact import DenseNet40, MobileNetV2
from espalier.train.zoo.residual import cifar_resnet, cifar_resnet56_bottleneck, resnet18, resnet50
from espalier.train.zoo.small import VGG16, AlexNet, LeNet5, LeNetDigits, SqueezeNet10

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Network:
    """A row of the zoo.

    make: takes `classes` and the network's own options. shape: of an input (channels, height, width). data: the name
    of the data set that it is usually trained on, "" where that is none of ours (ImageNet).

    >>> ZOO["lenet5"].data
    'mnist'
    """

    make: Callable[..., nn.Module]
    shape: Shape
    classes: int
    parameters: int
    data: str
    about: str


def _cifar(depth: int, parameters: int) -> Network:
    about = f"ResNet-{depth} for CIFAR; shortcut A or B, widths of the blocks"
    return Network(partial(cifar_resnet, depth), CIFAR, 10, parameters, "cifar10", about)


CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
_B20 = partial(cifar_resnet, 20, shortcut="B")
_R18 = partial(resnet18, stem="cifar")
_VGG = partial(VGG16, cifar=True)

ZOO: dict[str, Network] = {
    "lenet5": Network(LeNet5, (1, 28, 28), 10, 431_080, "mnist", "LeNet-5, 20-50-500-10"),
    "lenet_digits": Network(LeNetDigits, (1, 8, 8), 10, 208_394, "digits", "LeNet's shape for scikit-learn's digits"),
    "resnet20": _cifar(20, 269_722),
    "resnet32": _cifar(32, 464_154),
    "resnet44": _cifar(44, 658_586),
    "resnet56": _cifar(56, 853_018),
    "resnet20b": Network(_B20, CIFAR, 10, 272_474, "cifar10", "ResNet-20 for CIFAR, shortcut B"),
    "resnet56_bottleneck_cifar": Network(
        cifar_resnet56_bottleneck, CIFAR, 100, 614_452, "cifar100", "bottleneck ResNet-56 for CIFAR"
    ),
    "resnet18_cifar": Network(_R18, CIFAR, 10, 11_173_962, "cifar10", "ResNet-18 for CIFAR"),
    "densenet40": Network(DenseNet40, CIFAR, 10, 1_019_722, "cifar10", "DenseNet-40 (k = 12) for CIFAR"),
    "vgg16_cifar": Network(_VGG, CIFAR, 10, 14_728_266, "cifar10", "VGG-16 with batch norm for CIFAR"),
    "alexnet": Network(AlexNet, IMAGENET, 1000, 61_100_840, "", "AlexNet, as in torchvision"),
    "vgg16": Network(VGG16, IMAGENET, 1000, 138_357_544, "", "VGG-16, as in torchvision"),
    "vgg16_bn": Network(partial(VGG16, batch_norm=True), IMAGENET, 1000, 138_365_992, "", "VGG-16 with batch norm"),
    "resnet18": Network(resnet18, IMAGENET, 1000, 11_689_512, "", "ResNet-18, as in torchvision"),
    "resnet50": Network(resnet50, IMAGENET, 1000, 25_557_032, "", "ResNet-50, as in torchvision"),
    "mobilenetv2": Network(
        MobileNetV2, IMAGENET, 1000, 3_504_872, "", "MobileNetV2 1.0; TensorFlow's padding, folded norms"
    ),
    "squeezenet10": Network(SqueezeNet10, (3, 227, 227), 1000, 1_248_424, "", "SqueezeNet 1.0, as its authors' file"),
}


def build(name: str, *, classes: int | None = None, **options: Any) -> nn.Module:
    """A network with random weights: a name of ZOO, or ``package.module:factory`` of your own.

    classes: outputs of the classifier; your factory is given it if it has a parameter of that name.
    options: the network's own, such as ``shortcut`` ("A", "B") and ``widths`` (of each block inside, or a file to read
    them from) of CIFAR's ResNets, ``tensorflow`` and ``folded`` of mobilenetv2.
    Raises UnknownNameError for a name that the zoo does not have, DataError for an option that the network does not
    have or a factory that cannot be found or makes no module.

    >>> sum(p.numel() for p in build("resnet20").parameters())
    269722
    """
    make: Callable[..., nn.Module]
    if ":" in name:
        make = _factory(name)
    elif name in ZOO:
        make, classes = ZOO[name].make, classes or ZOO[name].classes
    else:
        raise UnknownNameError("model", name, ZOO, "Your own: package.module:factory")
    if classes is not None and (name in ZOO or "classes" in _parameters(make)):
        options = {"classes": classes, **options}
    try:
        inspect.signature(make).bind(**options)
    except (TypeError, ValueError) as error:  # ValueError: a builtin that does not say what it takes
        known = ", ".join(_parameters(make)) or "no options"
        raise DataError(f"model {name!r}: {error}. It takes {known}") from None
    made = make(**options)
    if not isinstance(made, nn.Module):
        raise DataError(f"model {name!r}: the factory made a {type(made).__name__}, expected an nn.Module")
    return made


def example_shape(name: str) -> Shape:
    """The input (channels, height, width) that a network is made for.

    A factory of your own says it by an attribute: ``make_net.shape = (3, 32, 32)``.
    Raises UnknownNameError for a name that the zoo does not have, DataError for a factory that does not say it.

    >>> example_shape("lenet5")
    (1, 28, 28)
    """
    if ":" in name:
        shape = getattr(_factory(name), "shape", None)
        if not isinstance(shape, tuple) or len(shape) != 3:
            attribute = name.partition(":")[2]
            raise DataError(f"model {name!r}: its input is not known: set {attribute}.shape = (3, 32, 32) beside it")
        return shape
    if name not in ZOO:
        raise UnknownNameError("model", name, ZOO, "Your own: package.module:factory")
    return ZOO[name].shape


def _factory(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # models in the current directory, as with python -m
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty module name
        raise DataError(f"model {name!r}: {error}. Write package.module:factory, importable from here") from error
    if not callable(found):
        raise DataError(f"model {name!r}: {attribute} is a {type(found).__name__}, not a function that makes a module")
    return found


def _parameters(make: Callable[..., nn.Module]) -> list[str]:
    gathered = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        return [p.name for p in inspect.signature(make).parameters.values() if p.kind not in gathered]
    except ValueError:  # a builtin
        return []
