"""Every network of the zoo, with random masks of every scheme: masked == shrunk == compiled == saved and reloaded."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import espalier as es
from espalier.graph import Site
from espalier.sparsity import unfit
from espalier.train import ZOO, build, example_shape

# Whole ImageNet networks at their own resolution would take minutes; any size that survives their pooling will do.
SMALL_INPUT = {224: 64}
TOLERANCE = 1e-4  # relative to the largest output: rounding of another order of summation

SITES: dict[str, dict[str, Site]] = {}  # of a network by its name, whatever its weights: a capture takes seconds
FIXED = {name: row.own is not None for name, row in es.CATALOG.items()}


def example_of(name: str) -> torch.Tensor:
    channels, height, width = example_shape(name)
    return torch.randn(2, channels, SMALL_INPUT.get(height, height), SMALL_INPUT.get(width, width))


def shaped(name: str, scheme_name: str, density: float) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights, its norms stirred, cut to the scheme by hand: no method in between."""
    torch.manual_seed(hash_of(name, scheme_name))
    model, example = build(name).eval(), example_of(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    if name not in SITES:
        SITES[name] = es.capture(model, example).sites()
    sites = SITES[name]
    with torch.no_grad():
        for site, scheme in plan_of(scheme_name, density, list(sites)).resolve(sites).items():
            assert unfit(scheme, sites[site]) is None
            weight = model.get_parameter(site)
            noise = torch.randn_like(weight).mul_(float(weight.std()))
            weight.copy_(scheme.project(noise, sites[site].conv_groups))
    return model, example


def plan_of(name: str, density: float, sites: list[str]) -> es.Plan:
    """One scheme everywhere, or ("every scheme, from k") the whole catalog in turn, layer by layer."""
    names = list(es.CATALOG)
    if name in names:
        return es.Plan.uniform(name, None if FIXED[name] else density)
    first = int(name.split()[-1])
    made = {n: es.scheme(n, None if FIXED[n] else density) for n in names}
    return es.Plan.of({site: made[names[(first + k) % len(names)]] for k, site in enumerate(sites)}, unfit="dense")


def hash_of(*names: str) -> int:
    return sum(ord(letter) * (k + 1) for k, letter in enumerate("/".join(names)))


def check(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    scale = float(want.abs().max()) or 1.0
    worst = float((got - want).abs().max()) / scale
    assert worst <= TOLERANCE, f"{what} differs by {worst:.2e} of the largest output"


def check_whole_way(name: str, scheme: str, path: Path) -> None:
    """Nothing is kept that the next step does not need: some networks fill half a gigabyte each time."""
    model, example = shaped(name, scheme, 0.3)
    with torch.inference_mode():
        want = model(example)
        small = es.shrink(model, example).eval()
        del model
        check(small(example), want, "shrunk")
    graph = es.capture(small, example)  # once: `compile` and `save` would each do it anew
    del small
    check(es.compile(graph)(example), want, "compiled")
    es.save(graph, None, path)
    del graph
    loaded = es.load(path)
    check(loaded(example), want, "reloaded")
    check(loaded(example[:1]), want[:1], "a batch of one")
    with torch.inference_mode():
        check(loaded.to_module().eval()(example), want, "reloaded as a module")


# Four networks, one of each kind, meet every scheme by itself; all others meet the whole catalog, each layer another
# scheme, from three starts, so that every network meets every scheme in the time that a test suite has.
# ESPALIER_EVERY_PAIR=1 takes the time (half an hour) and gives every network every scheme by itself.
ALONE = tuple(ZOO) if os.environ.get("ESPALIER_EVERY_PAIR") else ("lenet5", "lenet_digits", "resnet20", "mobilenetv2")
PAIRS = [(name, scheme) for name in ALONE for scheme in es.CATALOG] + [
    (name, scheme)
    for name in ZOO
    if name not in ALONE
    for scheme in ("filter", "every scheme, from 0", "every scheme, from 5", "every scheme, from 10")
    if ZOO[name].parameters < 40_000_000 or scheme == "every scheme, from 0"
]


@pytest.mark.parametrize("name,scheme", PAIRS)
def test_masked_shrunk_compiled_and_reloaded_agree(name: str, scheme: str, tmp_path: Path) -> None:
    check_whole_way(name, scheme, tmp_path / "model.esp")


def test_a_network_that_differs_is_found(tmp_path: Path) -> None:
    model, example = shaped("lenet5", "filter", 0.3)
    with torch.inference_mode():
        want = model(example)
        next(model.parameters()).mul_(1.01)
        with pytest.raises(AssertionError, match="differs"):
            check(model(example), want, "broken")
