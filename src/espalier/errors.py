"""Every error that Espalier raises on purpose.

    EspalierError
    |-- UnknownNameError (KeyError)       a name that no table holds; lists the names it does hold
    |-- SchemeError      (ValueError)     a scheme that cannot apply to this weight
    |-- PlanError        (ValueError)     a plan that does not fit the network or cannot be read
    |-- CaptureError     (RuntimeError)   a network that torch.export cannot follow
    |-- ShapeError       (ValueError)     an input or weight of the wrong shape or dtype
    |-- MethodError      (RuntimeError)   a run used out of order, or resumed into another network
    |-- TrainingError    (RuntimeError)   a loss that is not finite, a checkpoint that does not fit
    |-- DataError        (ValueError)     data that is missing, truncated or of the wrong kind
    |-- CompileError     (RuntimeError)   a graph that cannot be lowered
    |-- EngineError      (RuntimeError)   the native engine refused a program or an input
    |-- FileFormatError  (ValueError)     a file that is not what it claims to be
    `-- MissingExtraError (ImportError)   an optional dependency that is not installed

Each message says what failed, where, what was got and expected, and what to do next. The data of the
message are fields of the error too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EspalierError(Exception):
    """Base of every error that Espalier raises on purpose."""


class UnknownNameError(EspalierError, KeyError):
    """A name that no row of a table has.

    >>> raise UnknownNameError("scheme", "filtr", ["filter", "column"])
    Traceback (most recent call last):
    espalier.errors.UnknownNameError: unknown scheme 'filtr': did you mean 'filter'? Known: column, filter
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        close = difflib.get_close_matches(name, self.known, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        tail = f". {hint}" if hint else ""
        self.message = f"unknown {kind} {name!r}: {guess}Known: {', '.join(self.known)}{tail}"
        super().__init__(self.message)

    def __str__(self) -> str:  # KeyError would print the repr
        return self.message


class SchemeError(EspalierError, ValueError):
    """A scheme that cannot apply to this weight, with its `site` (or "" where none is known)."""

    def __init__(self, message: str, site: str = "") -> None:
        self.site = site
        super().__init__(f"{site}: {message}" if site else message)


class PlanError(EspalierError, ValueError):
    """A plan that does not fit the network, or a plan file that cannot be read."""


class CaptureError(EspalierError, RuntimeError):
    """A network whose computation torch.export cannot follow."""


class ShapeError(EspalierError, ValueError):
    """An input or weight whose shape or dtype is not the expected one."""


class MethodError(EspalierError, RuntimeError):
    """A run used out of order, or a state that belongs to another network or plan."""


class TrainingError(EspalierError, RuntimeError):
    """Training that cannot go on: a loss that is not finite, a checkpoint that does not fit."""


class DataError(EspalierError, ValueError):
    """Data that is missing, truncated or of the wrong kind."""


class CompileError(EspalierError, RuntimeError):
    """A graph that cannot be lowered to a program."""


class EngineError(EspalierError, RuntimeError):
    """The native engine refused a program or an input; `code` is its error code."""

    def __init__(self, message: str, code: int = 0) -> None:
        self.code = code
        super().__init__(message)


class FileFormatError(EspalierError, ValueError):
    """A file that is not what it claims to be: wrong magic, version, size or checksum."""

    def __init__(self, path: object, message: str) -> None:
        self.path = str(path)
        super().__init__(f"{path}: {message}")


class MissingExtraError(EspalierError, ImportError):
    """An optional dependency that is not installed; the message names the extra to install."""

    def __init__(self, what: str, extra: str) -> None:
        self.what, self.extra = what, extra
        super().__init__(f"{what} is not installed: pip install 'espalier[{extra}]'")
