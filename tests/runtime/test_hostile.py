"""Damaged and hostile programs: an error with a message, or a run; never a crash."""

import os
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn

from espalier.compiler import emit_blocks
from espalier.compiler.lower import lower
from espalier.compiler.program import STEP_OPS, Program
from espalier.errors import EngineError
from espalier.graph.capture import capture
from espalier.runtime.engine import LoadedProgram

ATTACK = """
import random, struct, sys
import numpy as np
from espalier.errors import EngineError
from espalier.runtime.engine import Context, LoadedProgram

data, seed = open(sys.argv[1], "rb").read(), int(sys.argv[2])
random.seed(seed)
words = struct.unpack_from("<7q", data, 16)
tables = struct.unpack_from("<2q", data, 56)
heads = tables[1] + words[4] * 576  # header and tables: where a change means something
EXTREME = [0, 1, 2, 3, 5, 7, 8, 15, 16, 63, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**38, 2**40, 2**63 - 1]
refused = ran = 0
for round in range(int(sys.argv[3])):
    bad = bytearray(data)
    kind = random.randrange(4)
    if kind == 0:
        bad = bad[: random.randrange(len(bad))]
    elif kind == 1:
        for _ in range(random.randrange(1, 4)):
            bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
    else:
        for _ in range(random.choice([1, 1, 1, 2, 5])):
            at = random.randrange(12, heads // 8) * 8 if kind == 2 else random.randrange(heads, len(bad) - 4) // 4 * 4
            old = struct.unpack_from("<q" if kind == 2 else "<i", bad, at)[0]
            new = random.choice([old + 1, old - 1, old * 2, -old, random.choice(EXTREME), -random.choice(EXTREME)])
            if kind == 2:
                struct.pack_into("<q", bad, at, max(-(2**63), min(2**63 - 1, new)))
            else:
                struct.pack_into("<i", bad, at, max(-(2**31), min(2**31 - 1, new)))
    try:
        program = LoadedProgram(bytes(bad))
        ends = sum(int(np.prod(shape)) for _, shape in program.inputs + program.outputs)
        if program.workspace_bytes > 1 << 28 or ends > 1 << 24:
            continue
        context = Context(program, 1 + round % 2)
        context.run([np.ones((1, *shape), np.float32) for _, shape in program.inputs], 1)
        ran += 1
    except EngineError as error:
        assert str(error)
        refused += 1
print(refused, ran)
"""


class Everything(nn.Module):
    """A step of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2, 1, groups=2)
        self.c, self.d = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.dw, self.fc = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Linear(24, 5)
        self.turn, self.wide = nn.Linear(4, 8), nn.Conv2d(3, 9, (3, 7), 2, 3)
        self.stem, self.thin = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 6, 3, padding=1),
        )  # with copies to either side
        self.thin.weight.data *= torch.rand_like(self.thin.weight) < 0.45

    def forward(self, x):
        y = self.a(x).sigmoid()
        y = torch.relu(y + self.dw(self.a(x * 2)))
        y = y + self.d(nn.functional.pad(self.c(x), (4, 4, 4, 4)))[:, :6, 4:15, 4:15]
        y = nn.functional.pad(nn.functional.max_pool2d(self.b(y), 3, 2, 1), (1, 0))
        y = nn.functional.adaptive_avg_pool2d(y * y, 2).flatten(1)
        tokens = torch.nn.functional.layer_norm(self.turn(y.reshape(-1, 6, 4)), (8,))
        tokens = (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        larger = torch.nn.functional.interpolate(tokens.reshape(-1, 6, 2, 4), scale_factor=2, mode="bilinear")
        beside = self.thin(self.stem(x[:, :, :8, :8]).relu())
        wide = self.wide(nn.functional.interpolate(x, size=(3, 64)))
        return self.fc(y).softmax(1), nn.functional.interpolate(larger, size=(5, 7)), beside, wide


@pytest.fixture(scope="module")
def attacked() -> Program:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emit_blocks, "_PIECE_FLOATS", 512)
        patch.setattr(emit_blocks, "_LEAST_COLUMNS", 1)
        return lower(capture(Everything().eval(), torch.randn(2, 3, 11, 11)))


@pytest.fixture(scope="module")
def program(attacked) -> bytes:
    return attacked.to_bytes()


def test_every_kind_of_step_is_attacked(attacked, program) -> None:
    kinds = {kernel.split("/")[0] for kernel in LoadedProgram(program).kernels}
    assert kinds == set(STEP_OPS)
    convs = [step.params for step in attacked.steps if step.op == "conv" and len(step.params) > 9]
    assert any(params[8] for params in convs) and any(params[9] for params in convs)


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_programs_never_crash(program, tmp_path, seed) -> None:
    path = tmp_path / "program"
    path.write_bytes(program)
    rounds = os.environ.get("ESPALIER_FUZZ_ROUNDS", "2500")
    command = [sys.executable, "-c", ATTACK, str(path), str(seed), rounds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, ran = map(int, done.stdout.split())
    assert min(refused, ran) > int(rounds) / 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:100], "does not begin with ESPALIER"),
        (lambda b: b"ONNXONNX" + b[8:], "does not begin with ESPALIER"),
        (lambda b: b[:-64], "size is not the one it states"),
        (lambda b: b[:8] + struct.pack("<I", 99) + b[12:], "format version 99, this engine reads 1"),
        (lambda b: b"", "does not begin"),
    ],
)
def test_refusals_say_why(program, change, message) -> None:
    with pytest.raises(EngineError, match=message):
        LoadedProgram(change(program))
