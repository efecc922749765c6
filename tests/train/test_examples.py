"""The examples in the docstrings of this room are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import espalier.train
from espalier.train import __all__ as public

ROOT = Path(espalier.train.__file__).parent
GIVEN = {"torch": torch, "nn": nn, **{name: getattr(espalier.train, name) for name in public}}
MODULES = sorted(
    "espalier.train." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs=GIVEN, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_everything_public_has_an_example() -> None:
    told = [name for name in public if ">>>" not in str(getattr(espalier.train, name).__doc__) and name.upper() != name]
    assert not told
