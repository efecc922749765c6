"""Which scheme where."""

from espalier.mapping.rules import uniform

__all__ = ["uniform"]
