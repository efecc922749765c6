"""Checkpoints: everything that training needs to go on bit for bit, in one file that is whole or not there."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.errors import TrainingError

FORMAT = "espalier checkpoint 1"


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and random.

    >>> seed_everything(7)
    >>> first = torch.rand(1)
    >>> seed_everything(7)
    >>> bool(torch.rand(1) == first)
    True
    """
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every random number generator, as tensors and plain values.

    >>> sorted(random_state())
    ['cuda', 'numpy', 'python', 'torch']
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), [int(key) for key in keys], *rest],
        "python": list(random.getstate()),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to a state that `random_state` gave.

    >>> state = random_state()
    >>> first = random.random()
    >>> set_random_state(state)
    >>> random.random() == first
    True
    """
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():  # else the run has moved to another machine
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to `path`, whole or not at all: a file beside it, flushed, then renamed.

    Raises TrainingError naming the file where the disk is full or the folder cannot be written; what was there stays.

    >>> write_checkpoint(Path("out/run.pt"), {"epoch": 3})  # doctest: +SKIP
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as stream:
            torch.save({"format": FORMAT, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        with suppress(OSError):  # what went wrong may go wrong here too
            part.unlink()
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise TrainingError(
            f"cannot write the checkpoint {path}: {cause}. "
            + ("The one before it is whole: make room" if path.exists() else "Make room")
            + ", or choose another folder, and resume"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote. No code in the file is run.

    Raises TrainingError for a file that is missing, damaged or no checkpoint.

    >>> read_checkpoint(Path("out/run.pt"))["epoch"]  # doctest: +SKIP
    3
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        first = str(error).partition("\n")[0]
        raise TrainingError(f"{path} cannot be read as a checkpoint: {first}. Remove it to start anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path} is no checkpoint of this version ({FORMAT!r}). Remove it to start anew")
    return state


def check_same(path: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise TrainingError, naming what differs, unless a checkpoint was made with the same things.

    >>> check_same(Path("run.pt"), "recipe", {"lr": 0.1}, {"lr": 0.2})
    Traceback (most recent call last):
    espalier.errors.TrainingError: run.pt belongs to another recipe: lr was 0.1, is 0.2. Resume with that one, or ...
    """
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        told = ", ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise TrainingError(f"{path} belongs to another {what}: {told}{more}. Resume with that one, or remove the file")


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """name -> shape of everything in a network's state: what tells it from another.

    >>> shapes(nn.Linear(3, 2))
    {'weight': [2, 3], 'bias': [2]}
    """
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
