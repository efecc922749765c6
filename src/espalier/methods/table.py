"""METHODS: one row per method; `start` puts one to work on a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_type_hints

from torch import nn

from espalier.errors import MethodError, UnknownNameError
from espalier.graph import ExampleInputs, capture
from espalier.methods.admm import ADMM
from espalier.methods.base import Method, Run
from espalier.methods.magnitude import Magnitude
from espalier.methods.primal_proximal import PrimalProximal
from espalier.methods.reweighted import Reweighted
from espalier.methods.selective_decay import SelectiveDecay
from espalier.methods.structure_parameters import StructureParameters
from espalier.sparsity import Plan, Scheme

METHODS: dict[str, type[Method]] = {
    "admm": ADMM,
    "magnitude": Magnitude,
    "primal_proximal": PrimalProximal,
    "reweighted": Reweighted,
    "selective_decay": SelectiveDecay,
    "structure_parameters": StructureParameters,
}


def get(name: str, **options: Any) -> Method:
    """A method by name. Raises UnknownNameError for a name or an option that there is not, MethodError for a bad value.

    >>> get("admm", updates=20).updates
    20
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    known = get_type_hints(METHODS[name])
    for option, value in options.items():
        if option not in known:
            raise UnknownNameError(f"option of method {name}", option, known)
        _check(f"option {option} of method {name}", value, known[option])
    return METHODS[name](**options)


def _check(what: str, value: Any, kind: Any) -> None:
    """Raise MethodError for a value of another type, and for numbers that no option can be."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(float(value) if whole and kind is not int else value, kind) or (kind is int and not whole):
        raise MethodError(f"{what} is {value!r}, expected {getattr(kind, '__name__', kind)}")
    if whole and kind is int and value < 1:
        raise MethodError(f"{what} is {value}, expected 1 or more")
    if isinstance(value, float) and not 0 <= value < math.inf:
        raise MethodError(f"{what} is {value}, expected a number from 0 on")


def start(
    model: nn.Module,
    plan: Plan | Mapping[str, Scheme],
    method: Method | str,
    example_inputs: ExampleInputs,
    *,
    steps: int | None = None,
    **options: Any,
) -> Run:
    """Start to train `model` into `plan`.

    plan: a Plan, or site -> scheme. method: a method, or its name and `options`. steps: how many optimizer steps there
    will be before `finish`; methods with a ramp need it. Raises PlanError, MethodError, UnknownNameError, CaptureError.

    >>> run = start(model, Plan.uniform("filter", 0.5), "admm", x, steps=1000, updates=20)
    """
    if options and not isinstance(method, str):
        raise MethodError(f"the method has its options already: leave {', '.join(options)} out, or give its name")
    made = get(method, **options) if isinstance(method, str) else method
    graph = capture(model, example_inputs)
    schemes = plan.resolve(graph.sites()) if isinstance(plan, Plan) else dict(plan)
    return Run(graph, schemes, made, steps)
