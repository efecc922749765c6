"""How a network will run: fusing, formats, memory, lowering to a program."""

from espalier.compiler.formats import RowBlocks, pack, unpack
from espalier.compiler.fuse import fuse
from espalier.compiler.lower import Piece, lower, split
from espalier.compiler.program import Program

__all__ = ["Piece", "Program", "RowBlocks", "fuse", "lower", "pack", "split", "unpack"]
