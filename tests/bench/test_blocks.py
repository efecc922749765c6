"""benchmarks/blocks.py: measures, goes on where it was stopped, draws."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "blocks.py"


@pytest.fixture(scope="module")
def blocks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("blocks_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_rows_are_measured_once(blocks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LAYERS", {"small": blocks.conv(8, 16, 3, 6), "line": blocks.conv(8, 16, 1, 6)})
    monkeypatch.setattr(blocks, "DENSITIES", (0.5, 0.25))
    given = ["--variants", "filter;pattern+kernel", "--rounds", "1", "--out", str(tmp_path)]
    blocks.main(given)
    rows = json.loads((tmp_path / "blocks.json").read_text())["rows"]
    assert set(rows) == {f"{a} / {b}" for a in ("small", "line") for b in ("filter", "pattern+kernel")}
    assert [point["density"] for point in rows["small / filter"]["points"]] == [1.0, 0.5, 0.25]
    assert rows["line / pattern+kernel"] is None  # a window of 1 x 1 has no patterns
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(blocks, "measure", lambda *_: pytest.fail("measured again"))
    blocks.main(given)


def test_every_variant_is_one_of_the_catalog(blocks: ModuleType) -> None:
    layer = blocks.conv(32, 32, 3, 4)
    blocks.DENSITIES = (0.2,)
    for variant in blocks.VARIANTS:
        row = blocks.measure(layer, variant, 1)
        assert row is not None and 0.1 < row["points"][-1]["density"] < 0.3, variant
