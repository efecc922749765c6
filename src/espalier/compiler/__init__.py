"""How a network will run: fusing, formats, memory, lowering to a program."""

from espalier.compiler.formats import RowBlocks, pack, unpack
from espalier.compiler.lower import Piece, split
from espalier.compiler.program import Program

__all__ = ["Piece", "Program", "RowBlocks", "pack", "split", "unpack"]
