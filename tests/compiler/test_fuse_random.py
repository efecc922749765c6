"""Fusing random graphs changes no output, and none of the tensors it was given."""

import importlib
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from espalier.compiler.fuse import fold_constants, fuse
from espalier.compiler.reference import run_fused
from espalier.graph import Graph, Node, Value, capture, run

CHANNELS = 4
SHAPE = (2, CHANNELS, 5, 5)
CONV = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "conv_groups": 1}
NORM = {"eps": 1e-5, "momentum": 0.1}
PLAIN = {"relu": {}, "clamp": {"min": -0.5, "max": 0.5}, "leaky_relu": {"slope": 0.2}, "silu": {}, "identity": {}}


@dataclass
class Builder:
    """A graph that grows node by node; all values have one shape, and any of them may be read again."""

    rng: random.Random
    dtype: torch.dtype = torch.float32
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    made: list[str] = field(default_factory=lambda: ["x"])

    def tensor(self, name: str, *shape: int, positive: bool = False) -> str:
        x = torch.rand(shape) + 0.5 if positive else torch.randn(shape) * 0.4
        self.tensors[name], self.values[name] = x.to(self.dtype), Value(name, shape, self.dtype)
        return name

    def read(self) -> str:
        """Mostly the newest value, so that chains come about."""
        return self.made[-1] if self.rng.random() < 0.7 else self.rng.choice(self.made)

    def node(self, op: str, inputs: tuple[str | None, ...], attrs: dict) -> None:
        name = f"n{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, (f"{name}.out",), attrs))
        self.values[f"{name}.out"] = Value(f"{name}.out", SHAPE, self.dtype, True)
        self.made.append(f"{name}.out")

    def grow(self) -> None:
        kind, k = self.rng.choice(["conv", "conv", "batch_norm", "batch_norm", "plain", "add", "add"]), len(self.nodes)
        if kind == "conv":
            shared = [n for n in self.tensors if n.endswith("weight4d")]
            fresh = not shared or self.rng.random() < 0.7
            weight = self.tensor(f"{k}.weight4d", CHANNELS, CHANNELS, 3, 3) if fresh else self.rng.choice(shared)
            bias = self.tensor(f"{k}.bias", CHANNELS) if self.rng.random() < 0.5 else None
            self.node("conv", (self.read(), weight, bias), CONV)
        elif kind == "batch_norm":
            names = [self.tensor(f"{k}.{n}", CHANNELS, positive=n == "var") for n in ("mean", "var", "scale", "shift")]
            self.node("batch_norm", (self.read(), *names), NORM)
        elif kind == "add":
            other = {"alpha": 2} if self.rng.random() < 0.2 else {}
            self.node("add", (self.read(), self.read()), other)
        else:
            op = self.rng.choice(list(PLAIN))
            self.node(op, (self.read(),), PLAIN[op])

    def graph(self) -> Graph:
        self.values["x"] = Value("x", SHAPE, self.dtype, True)
        outputs = tuple(dict.fromkeys([self.made[-1], *self.rng.sample(self.made[1:], self.rng.randint(0, 2))]))
        tree = list(range(len(outputs)))
        return Graph(("x",), outputs, tuple(self.nodes), self.values, self.tensors, frozenset(self.tensors), tree)


def grown(seed: int, dtype: torch.dtype = torch.float32) -> Graph:
    torch.manual_seed(seed)
    builder = Builder(random.Random(seed), dtype)
    for _ in range(builder.rng.randint(2, 14)):
        builder.grow()
    return builder.graph()


# The same formula to rounding in double; in single, what up to 14 layers make of their roundings.
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def check_fused(graph: Graph, dtype: torch.dtype = torch.float32) -> None:
    x, before = torch.randn(SHAPE, dtype=dtype), {name: t.clone() for name, t in graph.tensors.items()}
    fused = fuse(graph)
    with torch.no_grad():
        torch.testing.assert_close(run_fused(fused, [x]), run(graph, [x]), **TOLERANCE[dtype])
    assert all(torch.equal(t, before[name]) for name, t in graph.tensors.items())
    assert len(fused.nodes) <= len(graph.nodes) and fused.outputs == graph.outputs
    made = {*fused.inputs, *fused.tensors}
    for node in fused.nodes:  # still in an order that runs
        assert all(name is None or name in made for name in node.inputs)
        made |= set(node.outputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("start", range(0, 400, 50))
def test_random_graphs(start: int, dtype: torch.dtype) -> None:
    for seed in range(start, start + 50):
        graph = grown(seed, dtype)
        check_fused(graph, dtype)
        assert {t.dtype for t in fuse(graph).tensors.values()} <= {dtype}


def test_a_pass_that_forgets_a_reader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(graph: Graph) -> Graph:
        """Drops every relu."""
        nodes = tuple(replace(n, op="identity", attrs={}) if n.op == "relu" else n for n in graph.nodes)
        return replace(graph, nodes=nodes)

    module = importlib.import_module("espalier.compiler.fuse")  # the room has a function of that name
    monkeypatch.setattr(module, "PASSES", (careless, *module.PASSES))
    with pytest.raises(AssertionError):
        for seed in range(40):
            check_fused(grown(seed))


def test_a_weight_that_is_computed_is_a_constant() -> None:
    class Scaled(nn.Module):
        """A conv whose weight is a product."""

        def __init__(self) -> None:
            super().__init__()
            self.direction, self.length = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.rand(4, 1, 1, 1))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.length * torch.tanh(self.direction)
            return torch.relu(self.norm(torch.conv2d(x, weight)))

    torch.manual_seed(0)
    model = Scaled().eval()
    x = torch.randn(2, 3, 6, 6)
    graph = capture(model, x)
    assert fold_constants(graph).sites() and [n.op for n in fuse(graph).nodes] == ["conv"]
    with torch.no_grad():
        torch.testing.assert_close(run_fused(fuse(graph), [x]), model(x), rtol=1e-5, atol=1e-5)


def test_random_tensors_are_no_constants() -> None:
    value = Value("w", (2,), torch.float32)
    noise = Node("noise", "opaque", ("w",), ("out",), {"args": [{"input": 0}], "kwargs": {}}, "aten.rand_like.default")
    last = Node("last", "relu", ("out",), ("y",), {})
    values = {name: replace(value, name=name) for name in ("w", "out", "y")}
    graph = Graph((), ("y",), (noise, last), values, {"w": torch.ones(2)})
    assert fold_constants(graph) is graph


def test_constants_that_grow_or_are_outputs_stay() -> None:
    scale = Value("scale", (2,), torch.float32)
    big, out = Value("big", (2, 64), torch.float32), Value("out", (2,), torch.float32)
    nodes = (
        Node("concat", "concat", ("scale",) * 64, ("big",), {"dim": 0}),
        Node("relu", "relu", ("scale",), ("out",), {}),
    )
    values = {v.name: v for v in (scale, replace(big, shape=(128,)), out)}
    graph = Graph((), ("big", "out"), nodes, values, {"scale": torch.ones(2)})
    assert fold_constants(graph) is graph
    assert len(fold_constants(replace(graph, outputs=("big",))).nodes) == 1


def test_a_norm_with_computed_statistics_stays_a_norm() -> None:
    graph = grown(0)
    names = [f"stats.{k}" for k in range(4)]
    values = {**graph.values, **{n: Value(n, (CHANNELS,), torch.float32) for n in (*names, "y")}}
    values["y"] = Value("y", SHAPE, torch.float32, True)
    norm = Node("norm", "batch_norm", ("x", *names), ("y",), NORM)
    graph = Graph(("x", *names), ("y",), (norm,), values, {})
    assert [n.op for n in fuse(graph).nodes] == ["batch_norm"]


def test_a_residual_of_another_batch_is_not_fused() -> None:
    """At the captured batch both have one shape; at another batch only one of them follows."""
    builder = Builder(random.Random(0))
    weight = builder.tensor("w.weight4d", CHANNELS, CHANNELS, 3, 3)
    builder.node("conv", ("x", weight, None), CONV)
    builder.values["x"], builder.values["c"] = Value("x", SHAPE, torch.float32, True), Value("c", SHAPE, torch.float32)
    builder.node("add", ("n0.out", "c"), {})
    graph = Graph(("x", "c"), ("n1.out",), tuple(builder.nodes), builder.values, builder.tensors)
    assert [n.op for n in fuse(graph).nodes] == ["conv", "add"]
