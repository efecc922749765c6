"""Every instruction set of this machine in turn, and how results are compared."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.runtime.engine import isas
from espalier.runtime.executable import Executable, compile

TOLERANCE = 1e-4  # relative to the largest output: float32 sums in another order


@pytest.fixture(params=[i.name for i in isas() if i.supported])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Programs loaded in the test run on this instruction set."""
    monkeypatch.setenv("ESPALIER_ISA", request.param)
    return str(request.param)


def _close(got: object, expected: object) -> None:
    a, b = (np.asarray(x.detach() if isinstance(x, Tensor) else x, np.float64) for x in (got, expected))
    assert a.shape == b.shape
    assert np.isfinite(a).all() == np.isfinite(b).all()
    worst = np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)
    assert worst <= TOLERANCE or np.abs(a - b).max(initial=0) < 1e-12, f"relative error {worst:.2e}"


@pytest.fixture
def assert_close() -> Callable[[object, object], None]:
    return _close


@pytest.fixture
def check_network() -> Callable[..., Executable]:
    """Compile a module, compare with float64 at batch 1 and 3, require that all of it runs natively."""

    def check(
        module: nn.Module,
        *shapes: Sequence[int],
        native: bool = True,
        threads: int = 2,
        batches: Sequence[int] = (1, 3),
    ) -> Executable:
        module.eval()
        executable = compile(module, tuple(torch.randn(2, *s) for s in shapes), threads=threads)
        assert not native or executable.fallbacks == ()
        double = copy.deepcopy(module).double()
        for batch in batches:
            x = [torch.randn(batch, *s) for s in shapes]
            with torch.no_grad():
                expected = double(*[t.double() for t in x])
            got = executable(*x)
            for a, b in zip(_leaves(got), _leaves(expected), strict=True):
                _close(a, b)
        return executable

    return check


def _leaves(tree: object) -> list[object]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree]
