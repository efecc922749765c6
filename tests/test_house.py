"""The laws of the house: imports run downwards only; public names are exactly `__all__`."""

import ast
import importlib
from pathlib import Path

import pytest

import espalier

ROOT = Path(espalier.__file__).parent
# From the ground up: a file imports from its own room and from those above it in this list.
ROOMS = [
    "errors",
    "graph",
    "sparsity",
    "methods",
    "compiler",
    "runtime",
    "mapping",
    "train",
    "integrations",
    "store",
    "report",
    "workspace",
    "planning",
    "densities",
    "phases",
    "compress",
    "cli_mapping",
    "cli_options",
    "cli",
]
NEVER = [("methods", "compiler"), ("compiler", "sparsity")]
ONLY = {  # a module that just one file may know
    "torch.export": "graph/capture.py",
    "ctypes": "runtime/engine.py",
    "lightning_fabric": "train/team.py",
    "ray": "mapping/cluster.py",
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(path: Path, names: set[str]) -> list[str]:
    here = room(path)
    found = []
    for name in sorted(names):
        parts = name.split(".")
        ours = parts[0] == "espalier" and len(parts) > 1 and parts[1] in ROOMS
        if ours and (ROOMS.index(parts[1]) > ROOMS.index(here) or (here, parts[1]) in NEVER):
            found.append(f"{path.relative_to(ROOT)} imports {name}")
        for module, owner in ONLY.items():
            if (name == module or name.startswith(module + ".")) and str(path.relative_to(ROOT)) != owner:
                found.append(f"{path.relative_to(ROOT)} imports {name}, which is for {owner} only")
    return found


FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.parent != ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    assert room(path) in ROOMS, f"{path} is in no room: add it to the list, in its place"
    assert not wrong_imports(path, imports(path))


def test_a_wrong_import_is_found() -> None:
    assert wrong_imports(ROOT / "sparsity" / "plan.py", {"espalier.methods.base"})
    assert wrong_imports(ROOT / "compiler" / "lower.py", {"espalier.sparsity"})
    assert wrong_imports(ROOT / "graph" / "ops.py", {"torch.export"})


@pytest.mark.parametrize("name", ["espalier", *[f"espalier.{r}" for r in ROOMS if (ROOT / r).is_dir()]])
def test_public_names_are_exactly_all(name: str) -> None:
    module = importlib.import_module(name)
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, type(ast)) and key != "annotations"
    }
    assert public == set(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))
