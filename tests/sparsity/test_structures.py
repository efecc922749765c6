"""Laws of structures: a permutation there and back; sums and spreads agree with the matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import SchemeError
from espalier.sparsity import CATALOG, Structure

SHAPES = [((7, 5), 1), ((8, 4, 3), 1), ((9, 6, 3, 3), 1), ((12, 1, 3, 3), 12), ((12, 2, 5, 1), 3), ((4, 3, 2, 2, 2), 1)]


def structure_of(name: str) -> Structure:
    row = CATALOG[name]
    return Structure(row.pattern, {letter: int(row.options[letter]) for letter in row.blocks})


def check_structure(structure: Structure, shape: tuple[int, ...], conv_groups: int) -> None:
    """The laws, on a weight whose entries are all different."""
    w = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    matrix = structure.groups(w, conv_groups)
    assert torch.equal(structure.ungroup(matrix, w.shape, conv_groups), w)
    entries = matrix[matrix != 0].sort().values
    assert torch.equal(entries, w.flatten()), "an entry is lost or doubled"
    assert torch.equal(structure.sum(w, conv_groups), matrix.sum(1))
    assert torch.equal(structure.group_sizes(w.shape, conv_groups), (matrix != 0).sum(1).float())
    ids = torch.arange(matrix.shape[0], dtype=torch.float32)
    spread = structure.groups(structure.spread(ids, w.shape, conv_groups) + 1, conv_groups)
    assert torch.equal(spread[matrix != 0], (ids[:, None] + 1).expand_as(matrix)[matrix != 0])


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("shape,conv_groups", SHAPES)
def test_every_structure_is_a_permutation(name: str, shape: tuple[int, ...], conv_groups: int) -> None:
    check_structure(structure_of(name), shape, conv_groups)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CATALOG)),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_permutation_at_any_size(name: str, groups: int, filters: int, inputs: int, window: int, block: int) -> None:
    row = CATALOG[name]
    structure = Structure(row.pattern, {letter: block for letter in row.blocks})
    check_structure(structure, (groups * filters, inputs, window, window), groups)


def test_groups_are_what_they_say() -> None:
    w = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    assert torch.equal(structure_of("filter").groups(w)[1], w[1].flatten())
    assert torch.equal(structure_of("column").groups(w)[5], w[:, 1, 0, 1])
    assert torch.equal(structure_of("channel").groups(w)[2], w[:, 2].flatten())
    assert torch.equal(structure_of("shape").groups(w)[3], w[:, :, 1, 1].flatten())
    assert torch.equal(structure_of("kernel").groups(w)[4], w[1, 1].flatten())
    punched = Structure(CATALOG["block_punched"].pattern, {"m": 2, "n": 3})
    assert torch.equal(punched.groups(w)[2], w[:, :, 1, 0].flatten())


def test_a_structure_that_loses_entries_fails() -> None:
    class Broken(Structure):
        def groups(self, w: torch.Tensor, conv_groups: int = 1) -> torch.Tensor:
            return super().groups(w, conv_groups).flip(1)[:, :-1]

    with pytest.raises(Exception):  # noqa: B017 (einops or the comparison: either will do)
        check_structure(Broken(CATALOG["filter"].pattern), (4, 3, 2, 2), 1)


def test_conv_groups_must_divide_the_filters() -> None:
    with pytest.raises(SchemeError, match="7 filters"):
        structure_of("filter").groups(torch.ones(7, 2), 3)
