"""Whole networks against float64, on each instruction set."""

import pytest
import torch
from tests.runtime import mobile
from torch import Tensor, nn

from espalier.errors import ShapeError
from espalier.runtime.executable import compile


def randomised(module: nn.Module) -> nn.Module:
    """Batch norms with statistics of their own."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return module.eval()


def pruned(module: nn.Module, density: float = 0.3) -> nn.Module:
    """Blocks of 4 filters lose input channels together."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d) and part.weight.shape[0] % 4 == 0:
                keep = torch.rand(part.weight.shape[0] // 4, *part.weight.shape[1:]) < density
                part.weight *= keep.repeat_interleave(4, 0)
    return module


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        norm, relu = nn.BatchNorm2d, nn.ReLU(inplace=True)
        self.body = nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False), norm(o), relu, nn.Conv2d(o, o, 3, 1, 1, bias=False), norm(o)
        )
        self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), norm(o)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


class Inverted(nn.Module):
    """An inverted residual with squeeze and excitation."""

    def __init__(self, c: int, wide: int, act: type[nn.Module] = nn.Hardswish) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide), act())
        self.depth = nn.Sequential(nn.Conv2d(wide, wide, 5, 1, 2, groups=wide, bias=False), nn.BatchNorm2d(wide), act())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        return x + self.project(y * self.gate(y))


class Dense(nn.Module):
    """Concatenations of concatenations, and one value in two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.b, self.c = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(16, 5, 1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x).relu()
        y = torch.cat([x, self.a(x).relu()], 1)
        z = torch.cat([y, self.b(y)], 1)
        return {"pooled": self.pool(self.c(z)), "mixed": torch.cat([z, x], 1).mean((2, 3))}


class Branches(nn.Module):
    """Two inputs, two outputs, a split, a value that is an output and read on."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = self.left(x).relu()
        p, q = (a + self.right(y)).chunk(2, 1)
        return a, (p * q).flatten(1)


def lenet() -> nn.Module:
    front = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 10), nn.Softmax(1))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet() -> nn.Module:
    blocks = [Inverted(8, 24), Inverted(8, 16, nn.SiLU), Inverted(8, 16, nn.ReLU6)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, nn.Conv2d(8, 12, 3, 2, 1, groups=4), nn.BatchNorm2d(12))


NETWORKS = {
    "lenet": (lenet, (1, 28, 28)),
    "resnet": (resnet, (3, 64, 64)),
    "mobilenet": (mobilenet, (3, 30, 30)),
    "dense": (Dense, (3, 12, 12)),
}


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(isa, name, cut, check_network) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net = randomised(make())
    executable = check_network(pruned(net) if cut else net, shape)
    assert all(row.kernel.endswith(isa) for row in executable.describe())


def test_several_inputs_and_outputs(check_network) -> None:
    check_network(Branches(), (3, 12, 12), (2, 6, 6))


class Copies(nn.Module):
    """Outputs that are copies of other values, dropout of every kind at the end and in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.single, self.whole = nn.Dropout(), nn.Dropout2d()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x).relu()
        z = self.whole(self.b(self.whole(y)))
        return y.detach(), z, self.single(z.flatten(1)), x.clone(), y[:, :]


def test_copies_are_outputs_too(check_network) -> None:
    executable = check_network(Copies(), (3, 12, 12))
    assert not executable.fallbacks


class Partly(nn.Module):
    """An op without a kernel in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.b(x.cumsum(1)) + self.b(x)


def test_what_the_engine_lacks_runs_in_pytorch(check_network) -> None:
    executable = check_network(Partly(), (3, 9, 9), native=False)
    assert len(executable.fallbacks) == 1 and "cumsum" in executable.fallbacks[0]
    kinds = [row.kernel.split("/")[0] for row in executable.describe()]
    assert "torch" in kinds and kinds.count("conv") == 3


class Words(nn.Module):
    """Attention: values whose first dimension is a multiple of the batch, or another one."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 7, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x + self.place)
        return self.head(y), x


def test_attention(check_network) -> None:
    executable = check_network(Words(), (7, 32), batches=(1, 2, 5))
    assert {"conv", "matmul", "norm", "softmax"} <= {row.op for row in executable.describe()}


def test_a_network_runs_in_parts(check_network) -> None:
    """An op that the engine lacks in the middle: PyTorch runs it, and the rest runs natively around it."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).cumsum(1))

    executable = check_network(Parts(), (7, 32), native=False, batches=(1, 2, 5))
    assert executable.fallbacks and {"conv", "torch"} <= {row.kernel.split("/")[0] for row in executable.describe()}


class OneSample(nn.Module):
    """Written for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(1, -1))


def test_a_network_for_one_batch_size(assert_close) -> None:
    net, x = OneSample().eval(), torch.randn(1, 3, 6, 6)
    executable = compile(net, x, threads=1)
    assert executable.fallbacks == ()
    assert_close(executable(x), net(x))
    with pytest.raises(ShapeError, match=r"expected shape \[1, 3, 6, 6\], got \[2, 3, 6, 6\]"):
        executable(torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("name", mobile.NETWORKS)
@pytest.mark.parametrize("cut", [False, True])
def test_networks_for_telephones(isa, name, cut, check_network) -> None:
    network = randomised(mobile.NETWORKS[name]())
    check_network(pruned(network) if cut else network, (3, 72, 67))


@pytest.mark.parametrize("name", mobile.NETWORKS)
def test_networks_for_telephones_run_on_the_kernels_made_for_them(name) -> None:
    """Depthwise windows and a wide stem on theirs; phases are gathered for other stems; nothing is left to PyTorch."""
    executable = compile(mobile.NETWORKS[name]().eval(), torch.randn(1, 3, 64, 64), threads=1)
    assert executable.fallbacks == ()
    depthwise = [n for n in executable.graph.nodes if n.op == "conv" and n.attrs["conv_groups"] > 16]
    rows = executable.describe()
    assert sum(row.kernel.startswith("depthwise/") for row in rows) >= len(depthwise)
    stem = "conv2d" if name == "resnext" else "conv2d/phases"
    assert [row.step for row in rows if row.op in ("gather", "stem")] == [stem]
