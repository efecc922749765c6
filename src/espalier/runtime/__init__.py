"""Running a program: the engine, PyTorch where the engine lacks an op, timing, rivals."""

from espalier.runtime.bench import Timing, bench, machine
from espalier.runtime.engine import isa, isas
from espalier.runtime.executable import Executable, compile
from espalier.runtime.rivals import RIVALS, rival

__all__ = ["RIVALS", "Executable", "Timing", "bench", "compile", "isa", "isas", "machine", "rival"]
