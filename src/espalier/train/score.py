"""Scoring a network on a split, and estimating its batch norms anew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
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
    right, loss = _answers(model, split, batch_size, device)
    return Score(int(right.sum()) / max(1, len(split)), loss, len(split))


def correct(
    model: nn.Module, split: Split, *, batch_size: int = 128, device: torch.device | str | None = None
) -> Tensor:
    """Which images of `split` the model gets right: bool ``[N]``, on the CPU. Flags and place are put back.

    >>> right = correct(build("resnet20"), load_data("synthetic:3x32x32:2").test)
    >>> right.dtype, len(right)
    (torch.bool, 32)
    """
    return _answers(model, split, batch_size, device)[0]


@dataclass(frozen=True)
class Drop:
    """How much accuracy was lost on `n` images, in points, and the standard error of that.

    >>> Drop(points=0.5, error=0.25, n=1000).bound
    0.75
    """

    points: float
    error: float
    n: int

    @property
    def bound(self) -> float:
        """One standard error above the points: what a careful reader takes the loss to be."""
        return self.points + self.error

    def __str__(self) -> str:
        return f"{self.points:.2f} +- {self.error:.2f} points"


def drop(before: Tensor, after: Tensor) -> Drop:
    """The accuracy lost between two networks that answered the same images (`correct`).

    Paired: only the images that one gets right and the other wrong count, ``b`` lost and ``c`` won:
    ``points = 100 (b - c) / n``, ``error = 100 sqrt(b + c - (b - c)^2 / n) / n`` (McNemar), and at least one image.

    >>> print(drop(torch.tensor([True, True, True, False]), torch.tensor([True, False, False, True])))
    25.00 +- 41.46 points
    """
    n = max(1, len(before))
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    net = lost - won
    return Drop(100 * net / n, 100 * math.sqrt(max(1.0, lost + won - net**2 / n)) / n, len(before))


def _answers(
    model: nn.Module, split: Split, batch_size: int, device: torch.device | str | None
) -> tuple[Tensor, float]:
    """Which images are right, and the mean loss."""
    right, loss = [], 0.0
    with torch.inference_mode(), visiting(model, device) as place:
        model.eval()
        for x, y in split.batches(batch_size, device=place):
            out = model(x).float()
            right.append((out.argmax(1) == y).cpu())
            loss += float(F.cross_entropy(out, y, reduction="sum"))
    return torch.cat(right) if right else torch.zeros(0, dtype=torch.bool), loss / max(1, len(split))


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
    with torch.no_grad(), visiting(model, None) as place:
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


def recalibrate_if_better(
    model: nn.Module, train: Split, holdout: Split, batches: int = 50, *, batch_size: int = 128, seed: int = 0
) -> bool:
    """Estimate the batch norms anew, as `recalibrate`, and keep that only where it lowers the loss on `holdout`.

    Returns whether it was kept; otherwise every running statistic is as before, bit for bit.

    >>> data = load_data("synthetic:3x32x32:2")
    >>> recalibrate_if_better(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), data.train, data.holdout)  # no norms
    False
    """
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    before = evaluate(model, holdout, batch_size=batch_size).loss
    recalibrate(model, train, batches, batch_size=batch_size, seed=seed)
    if evaluate(model, holdout, batch_size=batch_size).loss < before:
        return True
    with torch.no_grad():
        for name, tensor in model.named_buffers():
            tensor.copy_(buffers[name])
    return False


@contextmanager
def visiting(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
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
