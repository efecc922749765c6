"""The schemes by name. To add one, add a row: CLI, plan files, conformance tests and the report follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from espalier.errors import SchemeError, UnknownNameError
from espalier.graph.ir import Site
from espalier.sparsity.scheme import Rule, Scheme
from espalier.sparsity.snaps import FOUR_OF_NINE, BestPattern, EqualMagnitude, KeepLargest, Snap, Zero
from espalier.sparsity.structures import Structure

Options = Mapping[str, Any]
KERNEL = "g o i y x -> (g o i) (y x)"


@dataclass(frozen=True)
class Row:
    """One scheme of the catalog.

    pattern: einops pattern of its structure (see `structures`).
    blocks: option names that are block letters of the pattern -> axis they block ("o", "i" or "k").
    options: all options with their defaults.
    snap: makes the snap from the options; None means zero (pruning).
    own: the density that the snap has by itself when no group is left alone; None when `density` is the knob.
    needs: why a site cannot take the scheme with these options, or None.
    """

    name: str
    summary: str
    pattern: str
    blocks: Mapping[str, str] = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    snap: Callable[[Options], Snap] = lambda _: Zero()
    own: Callable[[Options], float] | None = None
    needs: Callable[[Site, Options], str | None] = lambda _site, _options: None


def _keeps(options: Options) -> tuple[int, int]:
    keep, of = int(options["keep"]), int(options["of"])
    if not 0 < keep <= of:
        raise SchemeError(f"n_m needs 0 < keep <= of, got keep={keep}, of={of}; write keep=2, of=4 for 2:4")
    return keep, of


def _needs_3x3(site: Site, _options: Options) -> str | None:
    if tuple(site.shape[2:]) == (3, 3):
        return None
    window = " x ".join(str(s) for s in site.shape[2:]) or "no window"
    return f"patterns are for 3 x 3 kernels, this one has {window}; use block_punched here"


CATALOG: dict[str, Row] = {}


def _add(row: Row) -> None:
    if row.name in CATALOG:
        raise ValueError(f"scheme {row.name!r} stands twice in the catalog")
    CATALOG[row.name] = row


_add(Row("filter", "whole filters (rows of the GEMM matrix)", "g o i y x -> (g o) (i y x)"))
_add(Row("column", "one input channel at one kernel position, in all filters", "g o i y x -> (g i y x) o"))
_add(Row("channel", "whole input channels", "g o i y x -> (g i) (o y x)"))
_add(Row("shape", "one kernel position in the whole layer", "g o i y x -> (y x) (g o i)"))
_add(Row("layer", "the whole layer at once", "g o i y x -> () (g o i y x)"))
_add(
    Row(
        "block_punched",
        "m filters x n channels share their kernel positions; with permute, filters need not be neighbours",
        "g (O m) (I n) y x -> (g O I y x) (m n)",
        {"m": "o", "n": "i"},
        {"m": 8, "n": 4, "permute": False},
    )
)
_add(
    Row(
        "block_column",
        "columns m rows high; with permute, rows need not be neighbours",
        "g (O m) k -> (g O k) m",
        {"m": "o"},
        {"m": 8, "permute": False},
    )
)
_add(Row("block_row", "rows n columns wide", "g o (K n) -> (g o K) n", {"n": "k"}, {"n": 8}))
_add(Row("kernel", "whole kernels: the connectivity of filters and channels", KERNEL))
_add(
    Row(
        "pattern",
        "4 of the 9 positions of every 3 x 3 kernel, in one of eight patterns",
        KERNEL,
        snap=lambda _: BestPattern(),
        own=lambda _: len(FOUR_OF_NINE[0]) / 9,
        needs=_needs_3x3,
    )
)
_add(
    Row(
        "n_m",
        "the `keep` largest of every `of` consecutive input channels",
        "g o (I of) y x -> (g o I y x) of",
        {"of": "i"},
        {"keep": 2, "of": 4},
        snap=lambda options: KeepLargest(_keeps(options)[0]),
        own=lambda options: _keeps(options)[0] / _keeps(options)[1],
    )
)
_add(
    Row(
        "micro_block",
        "blocks of r rows x c columns of the GEMM matrix",
        "g (O r) (K c) -> (g O K) (r c)",
        {"r": "o", "c": "k"},
        {"r": 1, "c": 4},
    )
)
_add(Row("weight", "single weights (unstructured)", "g o i y x -> (g o i y x) ()"))
_add(
    Row(
        "unify",
        "blocks of r x c weights share one magnitude; `free` is the share of blocks left alone",
        "g (O r) (K c) -> (g O K) (r c)",
        {"r": "o", "c": "k"},
        {"r": 1, "c": 4, "free": 0.5},
        snap=lambda _: EqualMagnitude(),
        own=lambda _: 1.0,
    )
)


def scheme(name: str, density: float | None = None, **options: Any) -> Scheme:
    """A scheme of the catalog, or several joined by "+" and applied in order.

    density: the kept share of weights, 0..1. Parts with a density of their own (pattern, n_m, unify) keep
    it; the
        rest of it is split evenly, as a product, over the other parts. Leave it out for 1 or for the
        parts' own.
    options: options of the parts, such as ``m=8, n=4``; write ``{"filter.density": 0.5}`` for an option of
    one part.
    Raises UnknownNameError for a name, SchemeError for an option or density that cannot be.

    >>> scheme("filter+column", density=0.25).rules[0].free
    0.5
    """
    rows = [_row(part) for part in name.split("+")]
    settings = _settings(name, rows, dict(options))
    fixed = [_fixed_density(row, own) for row, own in zip(rows, settings)]
    base = math.prod(value for value in fixed if value is not None)
    target = base if density is None else float(density)
    if not 0 <= target <= 1:
        raise SchemeError(f"density must lie between 0 and 1, got {density}")
    loose = fixed.count(None)
    if target > base * (1 + 1e-9) or (not loose and not math.isclose(target, base, rel_tol=0.01)):
        raise SchemeError(
            f"{name} has density {base:.4g} by itself, so {target:.4g} cannot be reached: leave density out"
            + (" or ask for less" if loose else f", or join a scheme to it, as in '{name}+kernel'")
        )
    share = (target / base) ** (1 / loose) if loose and base else 1.0
    rules = tuple(_rule(row, own, value, share) for row, own, value in zip(rows, settings, fixed))
    return Scheme(name, target, rules, dict(options))


def ceiling(chosen: Scheme) -> float:
    """The highest density that the scheme can be given: 1, or what its parts leave by themselves."""
    rows = [_row(part) for part in chosen.name.split("+")]
    settings = _settings(chosen.name, rows, dict(chosen.options))
    return math.prod(v for v in map(_fixed_density, rows, settings) if v is not None)


def at_density(chosen: Scheme, density: float) -> Scheme:
    """The same scheme at another density, no higher than its `ceiling`.

    >>> at_density(scheme("filter", 0.1), 0.5).rules[0].free
    0.5
    """
    return scheme(chosen.name, min(density, ceiling(chosen)), **chosen.options)


def unfit(chosen: Scheme, site: Site) -> str | None:
    """Why `site` cannot take the scheme, and what to write instead; None when it can."""
    rows = [_row(part) for part in chosen.name.split("+")]
    for row, options in zip(rows, _settings(chosen.name, rows, dict(chosen.options))):
        reason = row.needs(site, options) or _block_too_large(row, options, site)
        if reason:
            return reason
    return None


def _row(name: str) -> Row:
    if name not in CATALOG:
        raise UnknownNameError("scheme", name, CATALOG, "Join several with '+', as in filter+column")
    return CATALOG[name]


def _settings(name: str, rows: list[Row], given: Options) -> list[dict[str, Any]]:
    """The options of every part: defaults, then what was given for it."""
    settings: list[dict[str, Any]] = [dict(row.options) for row in rows]
    for key, value in given.items():
        part, _, option = key.rpartition(".")
        takes = [
            i
            for i, row in enumerate(rows)
            if (not part or row.name == part) and (option in row.options or (part and option == "density"))
        ]
        if not takes:
            known = [*dict.fromkeys(o for row in rows for o in row.options), "density"]
            raise UnknownNameError(f"option of scheme {name}", key, known)
        if len(takes) > 1:
            hint = " or ".join(f"{rows[i].name}.{option}" for i in takes)
            raise SchemeError(f"option {key!r} could belong to several parts of {name}: write {hint}")
        settings[takes[0]][option] = value
    return settings


def _fixed_density(row: Row, options: Options) -> float | None:
    if "density" in options:
        return float(options["density"])
    return row.own(options) if row.own else None


def _rule(row: Row, options: Options, fixed: float | None, share: float) -> Rule:
    for letter in row.blocks:
        if not isinstance(options[letter], int) or options[letter] < 1:
            raise SchemeError(f"{row.name}: {letter} must be a whole number from 1, got {options[letter]!r}")
    structure = Structure(row.pattern, {k: int(options[k]) for k in row.blocks})
    free = share if fixed is None else fixed
    if row.own is not None:  # such a snap has its density by itself and snaps every group, or all but `free`
        free = float(options.get("free", 0.0))
    if not 0 <= free <= 1:
        raise SchemeError(f"{row.name}: free must lie between 0 and 1, got {free}")
    permute = options.get("permute", False)
    if not isinstance(permute, bool):
        raise SchemeError(f"{row.name}: permute must be true or false, got {permute!r}")
    return Rule(structure, row.snap(options), free, "m" if permute else None)


def _block_too_large(row: Row, options: Options, site: Site) -> str | None:
    rows, inputs = site.shape[0] // site.conv_groups, site.shape[1]
    limits = {"o": rows, "i": inputs, "k": inputs * math.prod(site.shape[2:])}
    large = {letter: axis for letter, axis in row.blocks.items() if int(options[letter]) > limits[axis]}
    if not large:
        return None
    got = ", ".join(f"{letter}={options[letter]}" for letter in row.blocks)
    fits = ", ".join(f"{letter}={min(int(options[letter]), limits[axis])}" for letter, axis in row.blocks.items())
    return f"{row.name} with {got} is larger than the weight {list(site.shape)}: write {fits}, or 'dense'"
