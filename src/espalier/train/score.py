"""Scoring a network on a split, and estimating its batch norms anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F

from espalier.train.split import Split


@dataclass(frozen=True)
class Score:
    """Accuracy 0..1, mean cross-entropy, number of images.

    >>> Score(accuracy=0.5, loss=0.7, n=10).accuracy
    0.5
    """

    accuracy: float
    loss: float
    n: int


def evaluate(
    model: nn.Module, split: Split, *, batch_size: int = 128, device: torch.device | str | None = None
) -> Score:
    """Accuracy and loss of `model` in eval mode, on `device` (by default where it is).

    Its training flags and its place are put back.

    >>> evaluate(build("resnet20"), load_data("synthetic:3x32x32:2").test).n
    32
    """
    right, loss = 0, 0.0
    with torch.inference_mode(), _visiting(model, device) as place:
        model.eval()
        for x, y in split.batches(batch_size, device=place):
            out = model(x).float()
            right += int((out.argmax(1) == y).sum())
            loss += float(F.cross_entropy(out, y, reduction="sum"))
    return Score(right / max(1, len(split)), loss / max(1, len(split)), len(split))


def recalibrate(model: nn.Module, split: Split, batches: int = 50, *, batch_size: int = 128, seed: int = 0) -> None:
    """Estimate the running statistics of the batch norms anew, in place: plain means over `batches` batches.

    Needed after weights have changed without training, as by pruning. Nothing else changes: dropout is off, momenta
    and training flags are put back. A network without batch norms is left alone.

    >>> recalibrate(build("resnet20"), load_data("synthetic:3x32x32:2").train, batches=2)
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    with torch.no_grad(), _visiting(model, None) as place:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        try:
            for x, _ in islice(split.batches(batch_size, shuffle=True, seed=seed, device=place), batches):
                model(x)
        finally:
            for norm, momentum in zip(norms, before):
                norm.momentum = momentum


@contextmanager
def _visiting(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Put the model on `device` for a while; afterwards its place and its training flags are as before."""
    flags = [(module, module.training) for module in model.modules()]
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    place = home if device is None else torch.device(device)
    if place != home:
        model.to(place)
    try:
        yield place
    finally:
        if place != home:
            model.to(home)
        for module, training in flags:
            module.training = training
