"""torch.compile(model, backend="espalier")."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.networks.pictures import MobileNetV3
from tests.networks.tokens import Bert, ViT
from torch import Tensor, nn

from espalier.runtime import backend
from espalier.runtime.torch_backend import Piece

ROOT = Path(__file__).parents[2]


class Spy:
    """The backend, remembering the pieces that it made."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def __call__(self, graph, inputs, **options):
        piece = backend(graph, inputs, **options)
        self.pieces.append(piece)
        return piece


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("kind", [MobileNetV3, ViT])
def test_any_batch(kind) -> None:
    torch.manual_seed(0)
    model, spy = kind().eval(), Spy()
    fast = torch.compile(model, backend=spy)
    with torch.no_grad():
        for batch in (2, 3, 5, 1, 7):
            x = torch.randn(batch, *kind.shape)
            close(fast(x), model(x))
    assert all(piece.reason == "" for piece in spy.pieces)  # none of it through PyTorch
    assert len(spy.pieces) <= 3  # the first batch, a batch of one, and any
    assert all(len(piece.programs) == 1 for piece in spy.pieces)


def test_several_inputs_and_outputs() -> None:
    model, spy = Bert().eval(), Spy()
    fast = torch.compile(model, backend=spy)
    words = torch.randint(0, Bert.words, (3, *Bert.shape))
    with torch.inference_mode():
        got, want = fast(words), model(words)
    assert isinstance(got, tuple)
    for a, b in zip(got, want, strict=True):
        close(a, b)
    assert "embedding" in spy.pieces[0].reason


def test_weights_that_change_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    fast, x = torch.compile(model, backend=backend), torch.randn(3, 4)
    with torch.no_grad():
        before = fast(x)
        close(before, model(x))
        model[0].weight.mul_(2)
        assert not torch.equal(fast(x), before)
        close(fast(x), model(x))
        model[2].weight = nn.Parameter(torch.randn(2, 8))
        close(fast(x), model(x))


def test_training_goes_on_through_pytorch() -> None:
    model, spy = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), Spy()
    fast, x = torch.compile(model, backend=spy), torch.randn(6, 4)
    fast(x).sum().backward()
    assert model[0].weight.grad is not None and "trains" in spy.pieces[0].reason
    with torch.no_grad():  # in training mode: it changes its statistics
        before = model[1].running_mean.clone()
        fast(x)
        assert not torch.equal(before, model[1].running_mean)
        model.eval()
        close(fast(x), model(x))


def test_breaks_in_the_graph() -> None:
    """PyTorch cuts a network where it cannot follow; each piece is one of ours, or falls back by itself."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, flag: list[str]) -> tuple[Tensor, int]:
            y = self.a(x).relu()
            torch._dynamo.graph_break()
            values, places = torch.sort(self.b(y).cumsum(1), 1)
            return values * places.shape[0], len(flag)

    model, spy = Broken().eval(), Spy()
    fast, x = torch.compile(model, backend=spy), torch.randn(3, 4)
    with torch.no_grad():
        got, want = fast(x, ["a", "b"]), model(x, ["a", "b"])
    close(got[0], want[0])
    assert got[1] == 2 and len(spy.pieces) == 2
    assert spy.pieces[0].reason == "" and "sort" in spy.pieces[1].reason


def test_options() -> None:
    model, spy = nn.Linear(4, 2).eval(), Spy()
    with torch.no_grad():
        torch.compile(model, backend=spy, options={"threads": 2})(torch.randn(1, 4))
    (program,) = spy.pieces[0].programs.values()
    assert program is not None and program.threads == 2
    with pytest.raises(Exception, match="unknown options speed"), torch.no_grad():
        torch.compile(nn.Linear(3, 2), backend=backend, options={"speed": 9})(torch.randn(1, 3))


def test_pytorch_finds_it_by_name(tmp_path: Path) -> None:
    """The entry point that an installed package has, in a process that knows nothing else of espalier."""
    (place,) = re.findall(
        r'entry-points.torch_dynamo_backends\]\nespalier = "(.+)"', (ROOT / "pyproject.toml").read_text()
    )
    installed = tmp_path / "espalier_named-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: espalier-named\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[torch_dynamo_backends]\nespalier = {place}\n")
    code = (
        "import torch\nm = torch.nn.Linear(4, 2).eval()\nx = torch.randn(3, 4)\n"
        "with torch.no_grad():\n    print(torch.allclose(torch.compile(m, backend='espalier')(x), m(x), atol=1e-5))\n"
        "import sys\nprint('espalier.runtime.torch_backend' in sys.modules)"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.split() == ["True", "True"], done.stderr[-1000:]
