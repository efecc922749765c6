"""Cache: the folder where measured tables are kept, and files in it that are whole, checked, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from espalier.runtime import machine
from espalier.runtime.engine import library_path

FORMAT = 1
_FACTS = ("cpu", "cores", "isa", "system")


def folder() -> Path:
    """Where tables are kept: $ESPALIER_CACHE, or the platform's place for caches."""
    forced = os.environ.get("ESPALIER_CACHE")
    return Path(forced) if forced else user_cache_path("espalier", appauthor=False)


def identity(threads: int) -> dict[str, Any]:
    """What a measurement depends on beside the network: this machine, the engine's very build, the threads."""
    facts = machine()
    engine = hashlib.sha256(library_path().read_bytes()).hexdigest()[:16]
    return {"format": FORMAT, **{key: facts[key] for key in _FACTS}, "engine": engine, "threads": threads}


class Shelf:
    """A cached table of numbers: key -> milliseconds, for one identity.

    >>> Shelf(identity(threads=1)).read()
    {}
    """

    def __init__(self, who: Mapping[str, Any], root: Path | None = None) -> None:
        self.who = dict(who)
        digest = hashlib.sha256(json.dumps(self.who, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (root or folder()) / "latency" / f"{digest}.json"

    def read(self) -> dict[str, float]:
        """What is stored. A file that is damaged or of another identity counts as none, with a warning."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._refused(str(error))
        try:
            held = json.loads(text)
        except ValueError as error:
            return self._refused(str(error))
        if not isinstance(held, dict) or held.get("who") != self.who:
            return self._refused("it belongs to another machine, engine or format")
        rows = held.get("ms")
        if not isinstance(rows, dict) or not all(type(v) is float and 0 <= v < 1e9 for v in rows.values()):
            return self._refused("its rows are no milliseconds")
        return rows

    def add(self, rows: Mapping[str, float]) -> dict[str, float]:
        """Join `rows` to what is stored now, and write the file whole. Returns all of it.

        A folder that cannot be written costs the measurement again next time, not the result: a warning says so.
        """
        joined = {**self.read(), **{key: float(value) for key, value in rows.items()}}
        part = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({"who": self.who, "ms": joined}, stream, indent=0)
            os.replace(part, self.path)
        except OSError as error:
            if part is not None:
                Path(part).unlink(missing_ok=True)
            warnings.warn(f"the latency table cannot be kept in {self.path.parent}: {error}", stacklevel=2)
        return joined

    def _refused(self, reason: str) -> dict[str, float]:
        warnings.warn(f"{self.path} is not used, and will be measured anew: {reason}", stacklevel=3)
        return {}
