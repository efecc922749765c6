"""Capture and the oracle: a graph computes what the module does."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import CaptureError, FileFormatError, ShapeError
from espalier.graph import OPAQUE, OPS, Op, capture, run, to_module
from espalier.graph.opaque import resolve
from espalier.graph.ops import add_op
from tests.graph.networks import NETWORKS, Several, Tied, Unknown, stirred


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_computes_what_the_module_does(kind: type[nn.Module], batch: int) -> None:
    model, example = stirred(kind)
    graph = capture(model, example)
    x = torch.randn(batch, *kind.shape)
    with torch.no_grad():
        torch.testing.assert_close(run(graph, [x]), model(x))
        module = to_module(graph)
        torch.testing.assert_close(module(x), model(x))
    assert set(dict(module.named_parameters())) == set(dict(model.named_parameters()))
    assert all(graph.tensors[graph.aliases.get(n, n)] is p for n, p in model.named_parameters()), "shared, not copied"


def test_several_inputs_and_nested_outputs() -> None:
    model = Several()
    inputs = {"x": torch.randn(2, 8), "y": torch.randn(2, 6)}
    graph = capture(model, inputs)
    for example in (inputs, tuple(inputs.values())):
        graph = capture(model, example)
        got, want = run(graph, list(inputs.values())), model(**inputs)
        torch.testing.assert_close(got["logits"], want["logits"])
        torch.testing.assert_close(list(got["more"]), want["more"])
    with pytest.raises(ShapeError, match="takes 2 inputs"):
        run(graph, [inputs["x"]])


def test_flags_stay_as_they_are_and_batches_are_free() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, torch.randn(1, 3, 8, 8))
    assert model.training and not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(graph.values[node.outputs[0]].batched for node in graph.nodes)


def test_the_module_of_a_graph_trains() -> None:
    model, example = stirred(NETWORKS[1])
    module = to_module(capture(model, example)).train()
    before = module.state_dict()["norm.running_mean"].clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    x, y = torch.randn(16, 3, 12, 12), torch.randint(0, 5, (16,))
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert not torch.equal(before, module.state_dict()["norm.running_mean"])


def test_tied_weights_stay_tied() -> None:
    model, example = stirred(Tied)
    module = to_module(capture(model, example))
    assert module.get_parameter("a.weight") is module.get_parameter("b.weight")


def test_an_op_without_a_row_is_opaque_and_says_where() -> None:
    model, example = stirred(Unknown)
    (node,) = capture(model, example).opaque()
    assert node.op == OPAQUE and node.target == "aten.cumsum.default" and "cumsum" in node.place


@pytest.mark.parametrize(
    "target", ["aten.from_file.default", "aten.add_.Tensor", "os.system", "aten.nothing.default", "prim.device.default"]
)
def test_a_graph_cannot_call_just_anything(target: str) -> None:
    with pytest.raises(FileFormatError):
        resolve(target)


def test_what_cannot_be_followed_is_said() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(CaptureError, match="Branching"):
        capture(Branching(), torch.ones(2, 3))
    with pytest.raises(ShapeError, match="must be tensors"):
        capture(nn.Linear(3, 3), [3])


def test_rows_are_unique() -> None:
    with pytest.raises(ValueError, match="twice"):
        add_op(OPS["conv"])
    with pytest.raises(ValueError, match="belongs to conv"):
        add_op(Op("other", "", "mix", lambda x: x, OPS["conv"].parse))


ACTIVATIONS = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "silu": F.silu, "mish": F.mish, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "softplus": F.softplus,
    "gelu": F.gelu, "exp": torch.exp, "abs": torch.abs, "neg": torch.neg, "square": torch.square,
    "clamp": F.relu6, "softmax": lambda x: F.softmax(x, 1), "log_softmax": lambda x: F.log_softmax(x, 1),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, (3, 2)), "mean": lambda x: x.mean((2, 3), keepdim=True),
    "upsample_nearest": lambda x: F.interpolate(x, scale_factor=2), "split": lambda x: x.split([1, 3], 1)[1],
    "upsample_bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "select": lambda x: x[:, 1],
    "add": lambda x: x + 3, "sub": lambda x: x - x.flip(1), "mul": lambda x: x * x, "div": lambda x: x / 3,
    "concat": lambda x: torch.cat([x, x], 1), "stack": lambda x: torch.stack([x, x], 1),
    "pad": lambda x: F.pad(x, (1, 2)),
    "flatten": lambda x: x.flatten(1), "permute": lambda x: x.transpose(1, 2), "slice": lambda x: x[:, 1:, ::2],
    "unsqueeze": lambda x: x.unsqueeze(1), "reshape": lambda x: x.reshape(-1, 2, 2, 7, 9),
    "group_norm": lambda x: F.group_norm(x, 2), "layer_norm": lambda x: F.layer_norm(x, (9,)),
    "matmul": lambda x: x @ x.transpose(2, 3), "flip": lambda x: x.flip(1),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_row_is_reached_and_right(name: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ACTIVATIONS[name](x)

    graph = capture(Model(), torch.randn(1, 4, 7, 9))
    assert name in [node.op for node in graph.nodes], [(node.op, node.target) for node in graph.nodes]
    x = torch.randn(3, 4, 7, 9)
    torch.testing.assert_close(run(graph, [x]), ACTIVATIONS[name](x))
