"""Running a program: the engine, PyTorch where the engine lacks an op, timing, rivals."""

from espalier.runtime.bench import Timing, bench, machine
from espalier.runtime.engine import isa, isas, peak_gflops
from espalier.runtime.executable import Executable, compile
from espalier.runtime.layers import LayerTime, layers
from espalier.runtime.rivals import RIVALS, rival
from espalier.runtime.torch_backend import backend

__all__ = [
    "RIVALS",
    "Executable",
    "LayerTime",
    "Timing",
    "backend",
    "bench",
    "compile",
    "isa",
    "isas",
    "layers",
    "machine",
    "peak_gflops",
    "rival",
]
