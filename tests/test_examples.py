"""What the README and the examples say, run."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_five_lines_bring_espalier_into_a_loop_of_ones_own() -> None:
    small, accuracy = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))["main"](epochs=8)
    assert accuracy > 0.9
    assert sum(int(p.count_nonzero()) for p in small.parameters()) < 4500


def test_the_same_lines_work_in_a_loop_of_accelerate() -> None:
    small, accuracy = runpy.run_path(str(ROOT / "examples" / "with_accelerate.py"))["main"](epochs=6)
    assert accuracy > 0.9
    assert sum(int(p.count_nonzero()) for p in small.parameters()) < 4500


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    before = """
import torch
from torch import nn
from torch.nn import functional as F
class MyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3, 2), nn.Conv2d(32, 64, 3, 2), nn.Linear(64, 4)
    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))
torch.manual_seed(0)
epochs, criterion = 2, F.cross_entropy
loader = [(torch.randn(8, 3, 32, 32), torch.randint(0, 4, (8,))) for _ in range(5)]
"""
    split = code.index("plan =")
    made = code[:split] + "optimizer = torch.optim.SGD(model.parameters(), lr=0.01)\n" + code[split:]
    names: dict = {}
    exec(before + made, names)
    example, small = names["example"], names["small"]
    out = names["es"].load("model.esp")(example)
    assert (out - small(example)).abs().max() < 1e-4
    assert len([line for line in code.splitlines() if re.search(r"# [1-5]", line)]) == 5


def test_the_readme_names_every_scheme_and_command() -> None:
    from espalier.cli import COMMANDS
    from espalier.sparsity import CATALOG

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in CATALOG)
    assert all(f"espalier {name}" in text for name in COMMANDS)


def test_tables_in_the_docs_are_what_the_benchmarks_wrote() -> None:
    """``python benchmarks/page.py`` has been run since the last benchmark."""
    names = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == names["page"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == names["readme"]()
