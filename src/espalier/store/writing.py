"""Writing: a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from espalier.errors import FileFormatError


def write_whole(path: str | Path, parts: Iterable[bytes]) -> None:
    """Write `parts` behind one another to `path`: into a new file beside it, to the disk, then under its name.

    Whatever happens on the way (a full disk, Ctrl-C, power that fails), the file that was there stays whole and nothing
    is left beside it, save for what lost power leaves. Links are followed. Raises FileFormatError with the system's
    reason.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise FileFormatError(path, "cannot be written: it is no ordinary file")
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as stream:
            for data in parts:
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, target)
    except OSError as error:
        _remove(part)
        cause = error.strerror or str(error)
        raise FileFormatError(
            path, f"cannot be written: {cause}. What was there before is whole; make room, or choose another place"
        ) from error
    except BaseException:  # Ctrl-C: leave nothing half behind
        _remove(part)
        raise


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # the first error is the one to tell
        part.unlink()
