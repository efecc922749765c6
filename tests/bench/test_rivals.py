"""Rivals compute what PyTorch computes, on as many threads as they are given."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import nn

from espalier.errors import MissingExtraError, UnknownNameError
from espalier.runtime import RIVALS, bench, rival

NEEDS = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}


def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)),
    )
    return module.eval(), torch.randn(1, 3, 56, 56)


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_computes_the_same_on_its_threads(name: str) -> None:
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    module, example = small()
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            expected = module(example).numpy()
        call = rival(name)(module, example, 1)
        for _ in range(3):
            np.testing.assert_allclose(np.asarray(call()), expected, rtol=1e-4, atol=1e-4)
        torch.set_num_threads(2)  # as another candidate might
        assert bench({name: call}, rounds=5)[name].cores < 1.3
    finally:
        torch.set_num_threads(before)


def test_a_call_gives_what_the_example_holds_now() -> None:
    """No rival keeps a result: each call computes."""
    module, example = small()
    for name in ("torch", "onnxruntime", "openvino"):
        if all(importlib.util.find_spec(package) for package in NEEDS.get(name, ())):
            x = example.clone()
            call = rival(name)(module, x, 1)
            first = np.array(call())
            x *= 2
            assert np.abs(np.array(call()) - first).max() > 1e-3, name


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module, example = small()
    with pytest.raises(UnknownNameError, match="did you mean 'openvino'"):
        rival("openvin")
    for package, name in [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("onnxscript", "openvino")]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # as if it were not installed
            if package == "onnxscript" and importlib.util.find_spec("openvino") is None:
                continue
            with pytest.raises(
                MissingExtraError, match=rf"{package} is not installed: pip install 'espalier\[rivals\]'"
            ):
                rival(name)(module, example, 1)
