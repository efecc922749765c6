"""A run inside the loop, in every way of training that the recipe offers: it lands in its plan and stays there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from espalier.methods import Run, start
from espalier.sparsity import Plan, scheme
from espalier.train import Recipe, evaluate, fit, load_data, seed_everything

BASE = Recipe(epochs=2, batch_size=32, lr=0.05, seed=2)
RECIPES: dict[str, Recipe] = {
    "plain": BASE,
    "bf16-mixed": replace(BASE, precision="bf16-mixed"),
    "accumulated": replace(BASE, accumulate=3),
    "clipped": replace(BASE, clip=0.05),
    "adamw": replace(BASE, optimizer="adamw", lr=0.005),
    "all": replace(BASE, precision="bf16-mixed", accumulate=2, clip=0.05, label_smoothing=0.1),
}


def shaped(recipe: Recipe) -> tuple[nn.Module, Run]:
    data = load_data("synthetic:2x8x8:4")
    seed_everything(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4))
    plan = Plan.of({"0": scheme("filter", 0.25), "4": scheme("block_punched", 0.5, m=4, n=4)})
    steps = recipe.epochs * data.train.steps(recipe.batch_size)
    run = start(model, plan, "admm", torch.zeros(1, 2, 8, 8), steps=steps)
    fit(model, data, recipe, hooks=run, progress=False)
    run.finish()
    support = {site: mask.clone() for site, mask in run.masks.items()}
    before = model[0].weight.detach().clone()
    fit(model, data, replace(recipe, epochs=1), hooks=run, progress=False)
    assert all(torch.equal(mask, support[site]) for site, mask in run.masks.items())
    assert not torch.equal(before, model[0].weight)
    assert evaluate(model, data.test).accuracy > 0.6
    return model, run


@pytest.mark.parametrize("name", RECIPES)
def test_masks_survive(name: str) -> None:
    model, run = shaped(RECIPES[name])
    weights: dict[str, Any] = dict(model.named_parameters())
    for site, mask in run.masks.items():
        assert weights[site].dtype == torch.float32 and not weights[site].detach()[~mask].any()
    assert int(weights["0.weight"].flatten(1).any(1).sum()) == 4
    dead = ~weights["0.weight"].detach().flatten(1).any(1)
    assert not model[1].weight[dead].any() and not model[1].bias[dead].any()
