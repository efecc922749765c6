"""How many threads a training step is worth: on a small one they cost more than they bring, above all on busy cores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from espalier.train.score import visiting

# Multiply-adds of a batch's forward pass for each thread. The digits' network with 32 images a step (4.3e7) takes 5.4
# ms on one thread, 7.7 on four, and 1100 on four where others use the cores: threads that wait for each other spin.
MACS_PER_THREAD = 6e7


@contextmanager
def enough_threads(model: nn.Module, example: Tensor, samples: int) -> Iterator[None]:
    """No more of PyTorch's threads than steps on so many samples like `example` are worth, and as before afterwards."""
    before = torch.get_num_threads()
    wanted = before
    if before > 1 and all(p.device.type == "cpu" for p in model.parameters()):
        wanted = max(1, math.ceil(min(_macs(model, example) * samples / MACS_PER_THREAD, before)))
    try:
        torch.set_num_threads(wanted)
        yield
    finally:
        torch.set_num_threads(before)


def _macs(model: nn.Module, example: Tensor) -> float:
    """Of one sample; without end where it cannot be counted."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return math.inf  # the counter knows no recurrent layers
    counter = FlopCounterMode(display=False)
    try:
        with visiting(model, example.device), torch.no_grad(), counter:
            model.eval()(example)
    except Exception:  # whatever a network may raise: training will tell
        return math.inf
    return counter.get_total_flops() / 2 or math.inf
