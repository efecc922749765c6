"""Running a program: the engine, PyTorch where the engine lacks an op, timing, rivals."""

from espalier.runtime.bench import Timing, bench, machine
from espalier.runtime.engine import fingerprint, isa, isas, peak_gflops
from espalier.runtime.executable import Executable, compile
from espalier.runtime.layers import LayerTime, layers
from espalier.runtime.rivals import RIVALS, rival
from espalier.runtime.saved import dump, restore
from espalier.runtime.torch_backend import backend

__all__ = [
    "RIVALS",
    "Executable",
    "LayerTime",
    "Timing",
    "backend",
    "bench",
    "compile",
    "dump",
    "fingerprint",
    "isa",
    "isas",
    "layers",
    "machine",
    "peak_gflops",
    "restore",
    "rival",
]
