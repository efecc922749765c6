"""Shrinking: outputs stay, and what can go goes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.graph import bury, capture, couplings, liveness, run, shrink, shrink_graph
from tests.graph.networks import NETWORKS, Chain, Dense, Inverted, Pixels, Residual, Shuffle, Unknown, stirred

TOLERANCE = 1e-4


def cut_at_random(model: nn.Module, example: Tensor, filters: float, columns: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in capture(model, example).sites():
            weight = model.get_parameter(site)
            weight[torch.rand(weight.shape[0], generator=generator) < filters] = 0
            weight[:, torch.rand(weight.shape[1], generator=generator) < columns] = 0


def bury_all(model: nn.Module, example: Tensor) -> None:
    with torch.no_grad():
        for name, keep in bury(capture(model, example)).items():
            model.get_parameter(name).mul_(keep)


def check_same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= TOLERANCE * max(1e-6, float(want.abs().max()))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("filters,columns", [(0.4, 0.0), (0.0, 0.4), (0.4, 0.4), (0.9, 0.0), (1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("buried", [False, True])
def test_shrinking_changes_no_output(kind: type[nn.Module], filters: float, columns: float, buried: bool) -> None:
    model, example = stirred(kind)
    cut_at_random(model, example, filters, columns, seed=int(10 * filters + 3 * columns))
    if buried:
        bury_all(model, example)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, *kind.shape)
    with torch.no_grad():
        small, _ = shrink_graph(capture(model, example))
        check_same(run(small, [x]), model(x))
        check_same(shrink(model, example)(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model was changed"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NETWORKS), st.floats(0, 0.8), st.floats(0, 0.8), st.integers(0, 10_000))
def test_shrinking_changes_no_output_at_any_density(
    kind: type[nn.Module], filters: float, columns: float, seed: int
) -> None:
    model, example = stirred(kind, seed)
    cut_at_random(model, example, filters, columns, seed)
    small, cuts = shrink_graph(capture(model, example))
    x = torch.randn(2, *kind.shape)
    with torch.no_grad():
        check_same(run(small, [x]), model(x))
    assert cuts.removed >= 0


def test_a_chain_gets_exactly_as_narrow_as_it_can() -> None:
    model, example = stirred(Chain)
    with torch.no_grad():
        model.conv1.weight[[0, 3]] = 0  # dead filters: their bias is a constant, folded into conv2
        model.conv2.weight[:, 5] = 0  # nobody reads channel 5: its filter goes
        model.fc1.weight[:, :18] = 0  # nobody reads channels 0 and 1 of conv2
        model.fc2.weight[:, 7] = 0
    small = shrink(model, example)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes["conv1.weight"] == (3, 1, 5, 5)
    assert shapes["conv2.weight"] == (6, 3, 3, 3)
    assert shapes["fc1.weight"] == (19, 54)
    assert shapes["fc2.weight"] == (10, 19)


def test_a_residual_channel_goes_when_every_branch_is_dead() -> None:
    model, example = stirred(Residual)
    with torch.no_grad():
        model.stem.weight[2] = 0
        model.blocks[0].conv2.weight[2] = 0
        model.blocks[0].conv2.weight[3] = 0  # the stem still feeds channel 3
        for conv in (model.blocks[1].conv2,):
            conv.weight[2 + 4] = 0  # behind the padded shortcut, channel 2 is channel 6
    bury_all(model, example)
    small = shrink(model, example)
    assert small.get_parameter("stem.weight").shape[0] == 7
    assert small.get_parameter("blocks.0.conv2.weight").shape[0] == 7
    assert small.get_parameter("blocks.1.conv2.weight").shape[0] == 15


def test_depthwise_and_the_users_own_class() -> None:
    model, example = stirred(Inverted)
    with torch.no_grad():
        model.expand.weight[:10] = 0
    bury_all(model, example)
    small = shrink(model, example)
    assert isinstance(small, Inverted)
    assert small.deep.weight.shape == (14, 1, 3, 3) and small.deep.groups == 14
    assert small.deep.in_channels == small.deep.out_channels == small.norm2.num_features == 14


def test_slopes_go_with_their_channels() -> None:
    model, example = stirred(Pixels)
    with torch.no_grad():
        model.stem.weight[4:12] = 0
    bury_all(model, example)
    small = shrink(model, example)
    assert isinstance(small, Pixels) and small.slopes.num_parameters == 4
    assert small.stem.out_channels == 16 and small.last.in_channels == 4


def test_the_example_says_which_whole_numbers_make_sense() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.a, self.b = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, ids: Tensor, weights: Tensor) -> dict[str, Tensor | None]:
            hidden = F.relu(self.a(self.words(ids) * weights[..., None]))
            return {"logits": self.b(hidden).mean(1), "loss": None, "class": self.b(hidden).mean(1) > 0}

    torch.manual_seed(0)
    model = Words().eval()
    with torch.no_grad():
        model.b.weight[:, ::2] = 0
    example = {"weights": torch.ones(2, 5), "ids": torch.randint(10, 20, (2, 5))}  # in another order than it takes them
    small = shrink(model, example)
    assert isinstance(small, Words) and small.a.out_features == 8
    with torch.no_grad():
        check_same(small(**example)["logits"], model(**example)["logits"])


def test_concatenated_channels_go_one_by_one() -> None:
    model, example = stirred(Dense)
    with torch.no_grad():
        model.convs[1].weight[2] = 0
    bury_all(model, example)
    small = shrink(model, example)
    assert small.norms[2].num_features == 15 and small.norms[3].num_features == 19 and small.fc.in_features == 19


def test_what_touches_an_unknown_op_is_frozen_and_reported() -> None:
    model, example = stirred(Unknown)
    with torch.no_grad():
        model.conv1.weight[:3] = 0
        model.conv2.weight[:3] = 0
    small, cuts = shrink_graph(capture(model, example))
    assert small.tensors["conv1.weight"].shape[0] == 6 and small.tensors["conv2.weight"].shape[0] == 5
    assert any("aten.cumsum.default, which has no row in OPS" in why for why in cuts.frozen)


def test_a_cut_that_breaks_a_shape_is_not_made() -> None:
    model, example = stirred(Shuffle)
    with torch.no_grad():
        model.stem.weight[0] = 0
        model.stem.bias[0] = 0
    check_same(shrink(model, example)(example), model(example))


def test_outputs_keep_their_affine_part() -> None:
    model, example = stirred(Chain)
    with torch.no_grad():
        model.fc2.weight[3] = 0
        model.fc1.weight[4] = 0
    keep = bury(capture(model, example))
    assert "fc2.bias" not in keep and keep["fc1.bias"].sum() == 19


def test_the_small_network_goes_on_training() -> None:
    model, example = stirred(Residual)
    cut_at_random(model, example, 0.4, 0.2, 1)
    bury_all(model, example)
    small = shrink(model, example).train()
    assert parameters(small) < parameters(model)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    x, y = torch.randn(16, 3, 12, 12), torch.randint(0, 5, (16,))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(small(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert parameters(shrink(small, example)) <= parameters(small)


def test_inside_inference_mode_too() -> None:
    model, example = stirred(Residual)
    cut_at_random(model, example, 0.4, 0.2, 1)
    with torch.inference_mode():
        small = shrink(model, torch.randn(1, 3, 12, 12)).train()
    small(torch.randn(4, 3, 12, 12)).sum().backward()
    assert small.get_parameter("stem.weight").grad is not None


def test_liveness_that_ignores_a_reader_is_found() -> None:
    """The broken implementation: cutting a channel that somebody reads must show in the outputs."""
    model, example = stirred(Chain)
    graph = capture(model, example)
    live = liveness(graph)
    assert bool(live.alive.all())
    with torch.no_grad():
        want = model(example)
        model.conv2.weight[:, 0] = 0
    with pytest.raises(AssertionError):
        check_same(shrink(model, example)(example), want)


def test_couplings_of_a_residual_stage() -> None:
    model, example = stirred(Residual)
    found = couplings(capture(model, example))
    stem = [found.find(k) for k in found.labels["stem.weight@0"].tolist()]
    branch = [found.find(k) for k in found.labels["blocks.0.conv2.weight@0"].tolist()]
    inner = [found.find(k) for k in found.labels["blocks.0.conv1.weight@0"].tolist()]
    assert stem == branch and not set(stem) & set(inner)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return (x + self.b(x)).mean((2, 3))


def test_couplings_look_at_channels_and_not_at_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An add couples as many pairs as it has channels, however large its planes are."""
    seen, real = [], np.unique

    def spied(array, **options):
        seen.append(len(array))
        return real(array, **options)

    monkeypatch.setattr(np, "unique", spied)
    found = couplings(capture(Sum(), torch.zeros(1, 3, 48, 48)))
    assert seen == [8] and found.labels["a.weight@0"].shape == (8,)


@pytest.mark.parametrize("alive", [1, 2])
def test_what_is_cut_shares_no_memory(alive: int) -> None:
    """Also where one conv group is left, as it was: writing to the small network leaves the large one alone."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)).eval()
    with torch.no_grad():
        net[2].weight[:, 2 * alive :] = 0
    graph = capture(net, torch.randn(2, 3, 5, 5))
    small, _ = shrink_graph(graph)
    cut = [name for name, tensor in small.tensors.items() if tensor.shape != graph.tensors[name].shape]
    assert {small.tensors[name].shape for name in cut} >= {(2 * alive, 1, 3, 3), (2, 2 * alive, 1, 1)}
    held = {tensor.untyped_storage().data_ptr() for tensor in graph.tensors.values()}
    assert not held & {small.tensors[name].untyped_storage().data_ptr() for name in cut}
