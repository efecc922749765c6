"""Every network of the zoo, with random masks of every scheme: masked == shrunk == compiled == saved and reloaded."""

from pathlib import Path

import pytest
import torch
from torch import nn

import espalier as es
from espalier.sparsity import unfit
from espalier.train import ZOO, build, example_shape

# Whole ImageNet networks at their own resolution would take minutes; any size that survives their pooling will do.
SMALL_INPUT = {224: 64}
TOLERANCE = 1e-4  # relative to the largest output: rounding of another order of summation

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
    plan = es.Plan.uniform(scheme_name, None if FIXED[scheme_name] else density)
    graph = es.capture(model, example)
    with torch.no_grad():
        for site, scheme in plan.resolve(graph.sites()).items():
            assert unfit(scheme, graph.sites()[site]) is None
            weight = graph.tensors[site]
            weight.copy_(
                scheme.project(torch.randn_like(weight) * float(weight.std()), graph.sites()[site].conv_groups)
            )
    return model, example


def hash_of(*names: str) -> int:
    return sum(ord(letter) * (k + 1) for k, letter in enumerate("/".join(names)))


def check(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    scale = float(want.abs().max()) or 1.0
    worst = float((got - want).abs().max()) / scale
    assert worst <= TOLERANCE, f"{what} differs by {worst:.2e} of the largest output"


def check_whole_way(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    with torch.inference_mode():
        want = model(example)
        small = es.shrink(model, example).eval()
        check(small(example), want, "shrunk")
    program = es.compile(small, example)
    check(program(example), want, "compiled")
    es.save(small, example, path)
    loaded = es.load(path)
    check(loaded(example), want, "reloaded")
    with torch.inference_mode():
        check(loaded.to_module().eval()(example), want, "reloaded as a module")
    check(loaded(example[:1]), want[:1], "a batch of one")


# Small networks meet every scheme; each large one meets a few in turn, so that every network and every scheme is met.
LARGE = [name for name in ZOO if ZOO[name].parameters > 5_000_000]
PAIRS = [(name, scheme) for name in ZOO if name not in LARGE for scheme in es.CATALOG] + [
    (name, scheme)
    for k, name in enumerate(LARGE)
    for scheme in ("filter", "block_punched", sorted(es.CATALOG)[k % len(es.CATALOG)])
]


@pytest.mark.parametrize("name,scheme", PAIRS)
def test_masked_shrunk_compiled_and_reloaded_agree(name: str, scheme: str, tmp_path: Path) -> None:
    model, example = shaped(name, scheme, 0.3)
    check_whole_way(model, example, tmp_path / "model.esp")


def test_a_network_that_differs_is_found(tmp_path: Path) -> None:
    model, example = shaped("lenet5", "filter", 0.3)
    with torch.inference_mode():
        want = model(example)
        next(model.parameters()).mul_(1.01)
        with pytest.raises(AssertionError, match="differs"):
            check(model(example), want, "broken")
