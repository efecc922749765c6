"""Plans: matching, order, files and errors."""

from pathlib import Path

import pytest

from espalier.errors import PlanError
from espalier.graph.ir import Site
from espalier.sparsity import CATALOG, Plan, scheme

SITES = {
    "conv1.weight": Site("conv1.weight", "conv", (16, 3, 3, 3)),
    "layer1.0.conv1.weight": Site("layer1.0.conv1.weight", "conv", (16, 16, 3, 3)),
    "layer1.0.conv2.weight": Site("layer1.0.conv2.weight", "conv", (16, 16, 1, 1)),
    "fc.weight": Site("fc.weight", "linear", (10, 16)),
}


def test_later_entries_override_earlier_ones() -> None:
    plan = Plan.of({"*": scheme("filter", 0.5), "layer1.*": scheme("column", 0.25), "fc": None})
    resolved = plan.resolve(SITES)
    assert {k: v.name for k, v in resolved.items()} == {
        "conv1.weight": "filter",
        "layer1.0.conv1.weight": "column",
        "layer1.0.conv2.weight": "column",
    }


def test_a_uniform_plan_leaves_out_what_does_not_fit() -> None:
    assert list(Plan.uniform("block_punched", 0.5, dense=["fc"]).resolve(SITES)) == [
        "layer1.0.conv1.weight",
        "layer1.0.conv2.weight",
    ]


@pytest.mark.parametrize("name", CATALOG)
def test_every_scheme_survives_the_file(name: str, tmp_path: Path) -> None:
    row = CATALOG[name]
    plan = Plan.of({"layer1.*": scheme(name, None if row.own else 0.3, **row.options), "fc": None})
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan


def test_joined_schemes_survive_the_file() -> None:
    plan = Plan.of({"*": scheme("micro_block+unify", 0.5, **{"micro_block.c": 2, "free": 0.1})})
    assert Plan.from_toml(plan.to_toml()) == plan


@pytest.mark.parametrize(
    "text,message",
    [
        ("[[site", "not valid TOML"),
        ("x = 1", r"list of \[\[site\]\] tables"),
        ('[[site]]\nmatch = "a"', "needs match"),
        ('[[site]]\nmatch = "a"\nscheme = "filtr"', "did you mean 'filter'"),
        ('[[site]]\nmatch = "a"\nscheme = "filter"\ndensity = "much"', "site"),
        ('[[site]]\nmatch = "a"\nscheme = "dense"\ndensity = 0.5', "dense site takes no density"),
        ('[[site]]\nmatch = "a"\nscheme = "filter"\nunfit = "maybe"', "unfit must be"),
    ],
)
def test_bad_files_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_toml(text, "p.toml")


def test_unmatched_globs_and_impossible_blocks() -> None:
    with pytest.raises(PlanError, match=r"did you mean layer1.0.conv"):
        Plan.of({"layer1.0.convv1": scheme("filter", 0.5)}).resolve(SITES)
    with pytest.raises(PlanError, match=r"conv1.weight: block_punched with m=8, n=4 .* write m=8, n=3"):
        Plan.of({"*": scheme("block_punched", 0.5)}).resolve(SITES)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load("no/such/plan.toml")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere" / "plan.toml", tmp_path / "folder"):
        with pytest.raises(PlanError, match="cannot be written"):
            Plan.uniform("filter", 0.5).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
