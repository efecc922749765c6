"""The native library under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: valid programs with every
kind of step, damaged ones, many callers. Skipped, loudly, only where the compiler has no such runtime."""

from __future__ import annotations

import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espalier.compiler import bands, depth_first, emit_blocks, emit_winograd, row_bands
from espalier.compiler.lower import lower
from espalier.compiler.program import STEP_OPS
from espalier.graph.capture import capture
from espalier.runtime.engine import isas
from tests.native.builds import build, missing

CALLERS, ROUNDS_OF_A_CALLER = 4, 4  # of driver.c
ROUNDS = int(os.environ.get("ESPALIER_FUZZ_ROUNDS", "250"))
ISAS = [isa.name for isa in isas() if isa.supported]


class Everything(nn.Module):
    """A step of every kind, with margins, phases, views, residuals and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2, 1, groups=2)
        self.dw, self.far = nn.Conv2d(6, 12, 5, 2, 2, groups=6), nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12)
        self.fc, self.scale = nn.Linear(48, 5), nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x):
        y = self.a(x).sigmoid() * self.scale
        y = torch.relu(y + self.a(F.silu(x * 2)))
        z = F.pad(F.max_pool2d(self.b(y), 3, 2, 1), (1, 0))
        z = torch.cat([F.adaptive_avg_pool2d(z * z, 3), F.avg_pool2d(y, 4, 4)[:, :, :3, :3]], 1)
        z = z * z.mean((2, 3), keepdim=True)
        w = F.elu(self.far(self.dw(y)))
        w = F.adaptive_avg_pool2d(w, 2) + F.gelu(z[:, :, :2, :2])
        return self.fc(w.flatten(1)).softmax(1), F.log_softmax(z, 1).permute(0, 2, 3, 1)


def single_rows() -> nn.Module:
    """Convolutions whose weights are zero one by one, with more rows than sums wait for in a group."""
    network = nn.Sequential(nn.Conv2d(24, 131, 3, 1, 1), nn.Conv2d(131, 24, 3, 2, 1)).requires_grad_(False)
    for conv in network:
        conv.weight *= torch.rand_like(conv.weight) < 0.1
    return network


def sparse(network: nn.Module, density: float) -> nn.Module:
    """The network with most weights zero: blocks of every height."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p *= torch.rand(p.shape[0] // 4 + 1, *p.shape[1:]).repeat_interleave(4, 0)[: p.shape[0]] < density
    return network


def inverted(n: int, stride: int) -> nn.Module:
    window = nn.Conv2d(n, n, 3, stride, 1, groups=n)
    return nn.Sequential(nn.Conv2d(4, n, 1), nn.ReLU6(), window, nn.ReLU6(), nn.Conv2d(n, 9, 1))


def windows() -> nn.Module:
    sizes = ((3, 1), (5, 1), (7, 1), (3, 2), (5, 2), (7, 2))
    return nn.Sequential(*[nn.Conv2d(4, 4, k, s, k // 2, groups=4) for k, s in sizes])


def strided() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 9, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(9, 4, 1, 2))


class Pools(nn.Module):
    """Every window of native/kernels/pool.c, from inputs, from planes with margins, into outputs."""

    def forward(self, x):
        small = [(2, 1, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (5, 1, 2), (4, 3, 1)]
        made = [pool(x, *window) for window in small for pool in (F.max_pool2d, F.avg_pool2d)]
        return *made, x.softmax(-1), x.mean((2, 3)), F.adaptive_avg_pool2d(x, 3), x * x[:, :, :, 2:3]


class Tokens(nn.Module):
    """Attention over tokens, and up-sampling of what comes out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(12), nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        made = F.scaled_dot_product_attention(q, k, v).reshape(-1, 3, 7, 4)
        large = F.interpolate(made, scale_factor=2, mode="bilinear")
        return large, F.interpolate(made, scale_factor=3), q @ k.transpose(1, 2)


def narrow(stride: int) -> nn.Sequential:
    """Windows whose rows lose columns by eights: images row by row, shifted copies, phases of both."""
    layers = [nn.Conv2d(16, 24, 3, 1, 1), nn.Conv2d(24, 24, 3, stride, 1), nn.Conv2d(24, 16, 3, 1, 1)]
    with torch.no_grad():
        for conv in layers:
            rows, *rest = conv.weight.shape
            conv.weight *= (torch.rand(rows // 8, *rest) < 0.2).repeat_interleave(8, 0)
    return nn.Sequential(*layers)


def bottlenecks(density: float) -> nn.Sequential:
    """1 x 1 windows that go by bands, between 3 x 3 windows that want margins."""
    widths = [(16, 33, 1), (33, 16, 1), (16, 9, 3), (9, 40, 1), (40, 16, 1)]
    return sparse(nn.Sequential(*[nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in widths]), density)


def beside() -> nn.Module:
    """Values with copies of their planes to either side."""
    convs = [
        nn.Conv2d(3, 16, 3, 1, 1),
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.Conv2d(16, 24, 3, 2, 1),
        nn.Conv2d(24, 8, 3, 1, 1),
    ]
    thin = [convs[0], *[sparse(conv, 0.3) for conv in convs[1:]]]
    return nn.Sequential(*[part for conv in thin for part in (conv, nn.ReLU())])


NETWORKS = {
    "everything": (Everything, (3, 13, 12)),
    "sparse": (lambda: sparse(nn.Sequential(nn.Conv2d(8, 37, 3, padding=1), nn.Conv2d(37, 5, 1)), 0.2), (8, 15, 17)),
    "windows": (windows, (4, 43, 57)),
    "groups": (lambda: inverted(44, 2), (4, 30, 31)),
    "bands of wide rows": (lambda: inverted(44, 2), (4, 30, 31)),
    "bands of narrow rows": (lambda: inverted(24, 1), (4, 28, 14)),
    "bands": (lambda: bottlenecks(0.3), (16, 31, 29)),
    "strided": (strided, (3, 33, 31)),
    "pools": (Pools, (3, 19, 43)),
    "winograd": (lambda: nn.Sequential(nn.Conv2d(33, 40, 3, padding=1), nn.Conv2d(40, 35, 3, padding=1)), (33, 21, 18)),
    "stem": (lambda: nn.Sequential(nn.Conv2d(3, 12, 7, 2, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, 1, 1)), (3, 37, 83)),
    "wide stem": (lambda: nn.Conv2d(4, 9, (8, 6), 2, 8), (4, 9, 270)),
    "pieces": (single_rows, (24, 14, 13)),
    "rows": (lambda: narrow(1), (16, 14, 14)),
    "shifts": (lambda: narrow(2), (16, 8, 8)),
    "half vectors": (beside, (3, 16, 16)),
    "pairs of vectors": (beside, (3, 32, 32)),
    "attention": (Tokens, (7, 12)),
    "tokens": (lambda: nn.Sequential(nn.Linear(12, 33), nn.GELU(), nn.Linear(33, 12)), (7, 12)),
    "heavy": (lambda: nn.Sequential(nn.Linear(70, 3900), nn.ReLU(), nn.Linear(3900, 70)), (70,)),
    "line": (lambda: nn.Sequential(nn.Conv1d(4, 8, 5, 2, 2), nn.Conv1d(8, 8, 3, padding=1, groups=8)), (4, 50)),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, paths = tmp_path_factory.mktemp("programs"), []
    patch = pytest.MonkeyPatch()
    patch.setattr(bands, "LARGE_FLOATS", 10_000)
    patch.setattr(depth_first, "LARGE_BYTES", 37_000)
    patch.setattr(row_bands, "_FETCH", 100.0)
    patch.setattr(depth_first, "GROUP_BYTES", 60_000)
    patch.setattr(emit_blocks, "_PIECE_FLOATS", 2048)
    patch.setattr(emit_winograd, "_BAND_FLOATS", 36 * 64 * 15)
    patch.setattr(emit_winograd, "_TRANSFORM_CYCLES", 0.0)
    patch.setattr(emit_winograd, "_STREAMED_WEIGHT", 0.0)
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        paths.append(folder / name)
        threads = 3 if name.endswith(" rows") else 1
        program = lower(capture(make().eval(), torch.randn(2, *shape)), threads)
        assert any(s.op == "depthwise" and s.out.space == "scratch" for s in program.steps) == (threads > 1), name
        paths[-1].write_bytes(program.to_bytes())
    patch.undo()
    return paths


def driver(sanitizer: str, names: list[str], factory: pytest.TempPathFactory) -> Path:
    """Built; or a skip that nobody overlooks."""
    folder = factory.mktemp(sanitizer.split(",")[0])
    for one in sanitizer.split(","):
        reason = missing(one, folder)
        if reason:
            text = f"NOT CHECKED with the {one} sanitizer: this compiler has no runtime for it ({reason})"
            warnings.warn(text, stacklevel=1)
            pytest.skip(text)
    return build(sanitizer, names, folder)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver("address,undefined", [isa.name for isa in isas()], tmp_path_factory)


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver("thread", ["baseline"], tmp_path_factory)


def run(program: Path, *arguments: object, **environment: str) -> str:
    """What it prints. A sanitizer's report ends it. An instruction set forced from outside is for the engine alone."""
    outer = {name: value for name, value in os.environ.items() if name != "ESPALIER_ISA"}
    settings = {"ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=2000", **environment}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=outer | settings)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_valid_programs_in_clean_memory(memory, programs, isa) -> None:
    """Every kind of step, at several threads and batches, with equal bits."""
    kernels = run(memory, "run", *programs, ESPALIER_ISA=isa).split()
    assert {kernel.split("/")[0] for kernel in kernels} == set(STEP_OPS)
    assert {kernel.split("/")[-1] for kernel in kernels} == {isa}
    assert len({kernel for kernel in kernels if kernel.startswith(("conv/", "linear/"))}) >= 5


@pytest.mark.parametrize("isa", ISAS)
def test_damaged_programs_in_clean_memory(memory, programs, isa) -> None:
    seed = sum(map(ord, isa))
    refused, ran = map(int, run(memory, "attack", seed, ROUNDS, *programs, ESPALIER_ISA=isa).split())
    assert refused > ran > 0


def test_many_callers_without_races(threads, programs) -> None:
    kernels = run(threads, "run", *programs).split()
    assert {kernel.split("/")[0] for kernel in kernels} == set(STEP_OPS)
    runs = int(run(threads, "race", *programs))
    own = CALLERS * ROUNDS_OF_A_CALLER * len(programs)
    assert own + len(programs) <= runs <= 2 * own  # of the shared context each had one at least, or was told to wait


def test_a_float_too_far_is_found(memory, programs) -> None:
    """Outputs that are one float too short end with a report."""
    program = build("address,undefined", [isa.name for isa in isas()], memory.parent, ("-DSHORT_OUTPUTS=1",))
    for path in programs:
        with pytest.raises(AssertionError, match="heap-buffer-overflow"):
            run(program, "run", path)
