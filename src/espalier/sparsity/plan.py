"""Plan: site -> scheme, by name or glob. In a file it is TOML:

[[site]]
match = "layer*"            # a site, its module, or a glob over either; later entries override earlier ones
scheme = "block_punched"    # or "dense": leave it alone
density = 0.2
m = 8
n = 4
unfit = "dense"             # what to do where the scheme does not fit: "error" (the default) or "dense"
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError, PlanError
from espalier.graph.ir import Site
from espalier.sparsity.catalog import scheme, unfit
from espalier.sparsity.scheme import Scheme

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library reads TOML from 3.11 on
    import tomli as tomllib

DENSE = "dense"


@dataclass(frozen=True)
class Entry:
    """One line of a plan: the sites that `match` names get `scheme` (None: they stay dense).

    unfit: "error" or "dense": what happens at a matching site that cannot take the scheme.
    why: the reason, in words, of whoever made the plan; it is kept in the file and changes nothing.
    """

    match: str
    scheme: Scheme | None
    unfit: str = "error"
    why: str = ""

    def matches(self, site: str) -> bool:
        """Does `match` name this site, or its module (the site without ``.weight``)?"""
        module = site.rpartition(".")[0]
        # literally first: a name may hold brackets
        return self.match in (site, module) or fnmatchcase(site, self.match) or fnmatchcase(module, self.match)


@dataclass(frozen=True)
class Plan:
    """site -> scheme. Entries apply in order; the last that matches a site decides.

    >>> plan = Plan.of({"*": scheme("filter", density=0.5), "fc": None})
    >>> print(plan.to_toml())  # doctest: +ELLIPSIS
    [[site]]
    match = "*"
    scheme = "filter"
    density = 0.5
    ...
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, table: Mapping[str, Scheme | None], unfit: str = "error") -> Plan:
        """A plan from ``{site, module or glob: scheme}``; None leaves the sites dense."""
        return cls(tuple(Entry(match, chosen, unfit) for match, chosen in table.items()))

    @classmethod
    def uniform(cls, name: str, density: float | None = None, *, dense: Iterable[str] = (), **options: Any) -> Plan:
        """One scheme at every site that can take it; the sites in `dense` are left alone."""
        chosen = scheme(name, density, **options)
        spared = tuple(Entry(match, None) for match in dense)
        return cls((Entry("*", chosen, unfit=DENSE), *spared))

    def resolve(self, sites: Mapping[str, Site]) -> dict[str, Scheme]:
        """The scheme of every site that is not left dense, in the order of `sites`.

        Raises PlanError when an entry matches no site, or a site cannot take its scheme.
        """
        for entry in self.entries:
            if not any(entry.matches(name) for name in sites):
                raise PlanError(_unmatched(entry.match, sites))
        resolved: dict[str, Scheme] = {}
        for name, site in sites.items():
            entry = next((e for e in reversed(self.entries) if e.matches(name)), Entry(name, None))
            if entry.scheme is None:
                continue
            reason = unfit(entry.scheme, site)
            if reason is None:
                resolved[name] = entry.scheme
            elif entry.unfit != DENSE:
                raise PlanError(
                    f"{name}: {reason} (the plan gives it {entry.scheme.name} by match = {entry.match!r}). "
                    'Add an entry for this site after it, or unfit = "dense" to it'
                )
        return resolved

    # -- files -------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """The text of a plan file; `Plan.from_toml` reads it back."""
        blocks = []
        for entry in self.entries:
            fields: dict[str, Any] = {"match": entry.match, "scheme": DENSE}
            if entry.scheme is not None:
                fields |= {"scheme": entry.scheme.name, "density": entry.scheme.density, **entry.scheme.options}
            if entry.unfit != "error":
                fields["unfit"] = entry.unfit
            if entry.why:
                fields["why"] = entry.why
            lines = [f"{_key(key)} = {_literal(value)}" for key, value in fields.items()]
            blocks.append("\n".join(["[[site]]", *lines]))
        return "\n\n".join(blocks) + "\n"

    @classmethod
    def from_toml(cls, text: str, source: str = "plan") -> Plan:
        """The plan in `text`; `source` names it in errors. Raises PlanError."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{source}: not valid TOML: {error}") from None
        listed = table.get("site")
        if set(table) != {"site"} or not isinstance(listed, list) or not all(isinstance(e, dict) for e in listed):
            raise PlanError(f"{source}: a plan is a list of [[site]] tables and nothing else, got {sorted(table)}")
        return cls(tuple(_entry(dict(fields), f"{source}, [[site]] {k + 1}") for k, fields in enumerate(listed)))

    def save(self, path: str | Path) -> None:
        """Write the plan as TOML, whole or not at all. Raises PlanError where it cannot be written."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        try:
            part.write_text(self.to_toml(), encoding="utf-8")
            os.replace(part, target)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            with suppress(OSError, ValueError):
                part.unlink(missing_ok=True)
            raise PlanError(f"{path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises PlanError that names the file and the entry."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot be read: {error}") from None
        return cls.from_toml(text, str(path))


def _entry(fields: dict[str, Any], where: str) -> Entry:
    match, name = fields.pop("match", None), fields.pop("scheme", None)
    if not isinstance(match, str) or not isinstance(name, str):
        raise PlanError(f'{where}: needs match = "..." and scheme = "..."')
    on_unfit, why = fields.pop("unfit", "error"), str(fields.pop("why", ""))
    if on_unfit not in ("error", DENSE):
        raise PlanError(f'{where}: unfit must be "error" or "dense", got {on_unfit!r}')
    if name == DENSE:
        if fields:
            raise PlanError(f"{where}: a dense site takes no {', '.join(fields)}")
        return Entry(match, None, on_unfit, why)
    try:
        return Entry(match, scheme(name, **fields), on_unfit, why)
    except (EspalierError, TypeError, ValueError) as error:
        raise PlanError(f"{where} ({match}): {error}") from None


def _unmatched(match: str, sites: Mapping[str, Site]) -> str:
    modules = [name.rpartition(".")[0] for name in sites]
    close = difflib.get_close_matches(match, [*modules, *sites], n=3)
    guess = f"did you mean {', '.join(close)}?" if close else f"the sites are {', '.join(sites)}"
    return f"the plan's {match!r} matches no site of this network; {guess}"


def _key(key: str) -> str:
    return key if key.replace("_", "").isalnum() else json.dumps(key)


def _literal(value: Any) -> str:
    return json.dumps(value)  # numbers, booleans and strings are the same in TOML
