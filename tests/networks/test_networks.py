"""Small versions of networks that are deployed, cut at random: masked == shrunk == compiled == saved and reloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import espalier as es
from espalier.sparsity import CATALOG
from tests.networks.pictures import PICTURES
from tests.networks.tokens import TOKENS, Bert

TOLERANCE = 1e-4  # relative to the largest output: rounding of another order of summation
THROUGH_PYTORCH = {Bert: ("embedding",)}  # ops of these networks that the engine leaves to PyTorch


def example_of(kind: type[nn.Module], batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    if kind is Bert:
        return torch.randint(0, Bert.words, (batch, *Bert.shape), generator=generator)
    return torch.randn(batch, *kind.shape, generator=generator)  # type: ignore[attr-defined]


def stirred(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def leaves(tree: object) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in leaves(part)]  # type: ignore


def check(got: object, want: object, what: str) -> None:
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert a.shape == b.shape
        worst = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        assert worst <= TOLERANCE, f"{what} differs by {worst:.2e} of the largest output"


@pytest.mark.parametrize("scheme", ["filter+column", "mixed"])
@pytest.mark.parametrize("kind", [*PICTURES, *TOKENS])
def test_masked_shrunk_compiled_and_reloaded_agree(kind: type[nn.Module], scheme: str, tmp_path: Path) -> None:
    model, x = stirred(kind), example_of(kind, 2)
    graph = es.capture(model, x)
    names = [name for name, row in CATALOG.items() if row.own is None] if scheme == "mixed" else [scheme]
    sites = graph.sites()
    plan = es.Plan.of({site: es.scheme(names[k % len(names)], 0.4) for k, site in enumerate(sites)}, unfit="dense")
    with torch.no_grad():
        for site, made in plan.resolve(sites).items():
            weight = graph.tensors[site]
            weight.copy_(made.project(weight, sites[site].conv_groups))
        want = model(x)
        small = es.shrink(model, x).eval()
        check(small(x), want, "shrunk")
    program = es.compile(small, x, threads=2)
    check(program(x), want, "compiled")
    named = [f.split(" ")[1].strip("():") for f in program.fallbacks]
    assert set(named) == set(THROUGH_PYTORCH.get(kind, ()))
    es.save(small, x, tmp_path / "model.esp")
    loaded = es.load(tmp_path / "model.esp")
    check(loaded(x), want, "reloaded")
    other = example_of(kind, 5)
    with torch.no_grad():
        check(loaded(other), model(other), "another batch")
        check(loaded.to_module()(other), model(other), "reloaded as a module")
        check(loaded(other[:1]), model(other[:1]), "a batch of one")


def test_a_network_that_differs_is_found() -> None:
    model, x = stirred(PICTURES[0]), example_of(PICTURES[0], 2)
    with torch.no_grad():
        want = model(x)
        list(model.parameters())[-2].mul_(1.01)
        with pytest.raises(AssertionError, match="differs"):
            check(model(x), want, "broken")


def test_every_instruction_set_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (*PICTURES, *TOKENS):
        model, x = stirred(kind), example_of(kind, 2)
        graph = es.capture(model, x)
        with torch.no_grad():
            want = model(x)
        for isa in (row.name for row in es.runtime.isas() if row.supported):
            monkeypatch.setenv("ESPALIER_ISA", isa)
            check(es.compile(graph, threads=1)(x), want, f"{kind.__name__} on {isa}")


def test_hidden_channels_of_transformers_are_cut() -> None:
    model, x = stirred(TOKENS[0]), example_of(TOKENS[0], 2)
    hidden = model.blocks[0].mlp[0]  # type: ignore[index,union-attr]
    with torch.no_grad():
        hidden.weight[10:40] = 0
        hidden.bias[10:40] = 0
        want = model(x)
        small = es.shrink(model, x).eval()
        assert small.blocks[0].mlp[2].weight.shape == (24, 66)  # type: ignore[index,union-attr]
        check(small(x), want, "shrunk")
