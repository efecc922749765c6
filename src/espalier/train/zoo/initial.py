"""Starting weights."""

from __future__ import annotations

from torch import nn


def initialise(model: nn.Module) -> None:
    """He initialisation of every conv, counted over its outputs, as the networks of this folder were first trained.

    Source: He et al. 2015, "Delving deep into rectifiers", eq. 14.

    >>> conv = nn.Conv2d(3, 8, 3)
    >>> initialise(conv)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
