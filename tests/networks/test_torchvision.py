"""Networks as torchvision has them: the engine gives what PyTorch gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import espalier as es
from tests.networks.torchvision_models import models

TOLERANCE = 1e-4

NATIVE = {
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(weights=None),
    "efficientnet_b0": lambda: models.efficientnet_b0(weights=None),
    "shufflenet_v2_x0_5": lambda: models.shufflenet_v2_x0_5(weights=None),
    "squeezenet1_1": lambda: models.squeezenet1_1(weights=None),
    "regnet_y_400mf": lambda: models.regnet_y_400mf(weights=None),
    "segmentation": lambda: models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
    "vit": lambda: models.VisionTransformer(64, 16, 2, 3, 48, 96),
    "convnext": lambda: models.ConvNeXt(
        [models.convnext.CNBlockConfig(24, 48, 1), models.convnext.CNBlockConfig(48, None, 1)]
    ),
}


@pytest.mark.parametrize("name", NATIVE)
def test_the_engine_runs_all_of_it(name: str) -> None:
    torch.manual_seed(0)
    model = NATIVE[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)  # heads that begin at zero say nothing
    x = torch.randn(2, 3, 64, 64)
    program = es.compile(model, x, threads=2)
    assert program.fallbacks == ()
    with torch.no_grad():
        want, got = model(x), program(x)
    if isinstance(want, dict):
        want, got = want["out"], got["out"]
    assert float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())


def test_what_the_engine_lacks_is_named() -> None:
    """Windowed attention: parts run through PyTorch, with a reason each."""
    torch.manual_seed(0)
    model = models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4]).eval()
    x = torch.randn(2, 3, 64, 64)
    program = es.compile(model, x, threads=2)
    with torch.no_grad():
        want = model(x)
    assert program.fallbacks and all(": " in why for why in program.fallbacks)
    assert float((program(x) - want).abs().max()) <= TOLERANCE * float(want.abs().max())
