"""Rows in another order: blocks of like rows, undone wherever anybody looks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sparsity.test_structures import check_structure

from espalier.errors import SchemeError
from espalier.sparsity import Plan, Scheme, Structure, scheme


def planted(rows: int, columns: int, height: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose rows come in families of `height` that are large in the same columns, and the family of each."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.rand(rows // height, columns, generator=generator) < 0.25
    family = torch.randperm(rows, generator=generator) % (rows // height)
    return torch.randn(rows, columns, generator=generator) * (0.01 + large[family]), family


def held(chosen: Scheme, w: torch.Tensor, conv_groups: int = 1) -> float:
    return float(chosen.project(w, conv_groups).square().sum() / w.square().sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_an_ordered_structure_is_a_permutation(groups: int, rows: int, inputs: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = np.concatenate([group * rows + rng.permutation(rows) for group in range(groups)])
    structure = Structure("g (O m) k -> (g O k) m", {"m": block}, torch.from_numpy(order))
    check_structure(structure, (groups * rows, inputs, 2), groups)


@pytest.mark.parametrize("height", [2, 4, 8])
def test_families_of_rows_are_found(height: int) -> None:
    w, family = planted(32, 60, height)
    plain = scheme("block_column", 0.25, m=height)
    fitted = scheme("block_column", 0.25, m=height, permute=True).fit(w)
    blocks = family[fitted.rules[0].structure.order].reshape(-1, height)
    assert (blocks == blocks[:, :1]).all()
    assert held(fitted, w) > 0.97 > held(plain, w)
    mask = fitted.mask(w)
    assert all((mask[family == f] == mask[family == f][0]).all() for f in range(32 // height))
    assert torch.equal(mask, fitted.project(w) != 0) and float(mask.float().mean()) == pytest.approx(0.25, abs=0.01)


def test_never_worse_than_neighbours_on_what_networks_hold() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 16, 3, 3) * torch.rand(64, 1, 1, 1) * torch.rand(1, 16, 3, 3)
    for options in ({"m": 2, "n": 1}, {"m": 4, "n": 1}, {"m": 8, "n": 4}):
        plain, fitted = (scheme("block_punched", 0.2, permute=p, **options) for p in (False, True))
        assert held(fitted.fit(w), w) > held(plain, w)
        assert held(fitted, w) == held(plain, w), "neighbours, as long as nobody fits it"


def test_conv_groups_and_incomplete_blocks_stay_where_they_are() -> None:
    w = torch.cat([planted(10, 24, 2, seed)[0] for seed in (0, 1)])
    order = scheme("block_column", 0.25, m=4, permute=True).fit(w, 2).rules[0].structure.order
    assert sorted(order[:10].tolist()) == list(range(10)) and order[[8, 9, 18, 19]].tolist() == [8, 9, 18, 19]
    for name, rows, density in (("block_column", 7, 0.25), ("block_column", 32, 1.0), ("block_column", 32, 0.0)):
        chosen = scheme(name, density, m=4, permute=True).fit(torch.randn(rows, 8))
        assert chosen.rules[0].structure.order is None
    assert scheme("block_column", 0.3, m=3, permute=True).fit(torch.randn(9, 8)).rules[0].structure.order is None
    with pytest.raises(SchemeError, match="NaN"):
        bad = torch.full((32, 8), torch.nan)
        scheme("block_column", 0.25, m=4, permute=True).fit(bad).project(bad)


def test_many_rows_are_ordered_in_windows() -> None:
    w, _ = planted(600, 64, 4)
    order = scheme("block_column", 0.25, m=4, permute=True).fit(w).rules[0].structure.order
    assert sorted(order.tolist()) == list(range(600)) and sorted(order[:256].tolist()) == list(range(256))


def test_an_option_that_plans_keep() -> None:
    plan = Plan.of({"a": scheme("block_punched", 0.25, m=4, n=1, permute=True)})
    assert Plan.from_toml(plan.to_toml()).to_toml() == plan.to_toml() and "permute = true" in plan.to_toml()
    with pytest.raises(SchemeError, match="permute must be true or false, got 'yes'"):
        scheme("block_punched", 0.25, permute="yes")
