"""What weights may be: structures, snaps, schemes, plans."""

from espalier.sparsity.catalog import CATALOG, at_density, ceiling, scheme, unfit
from espalier.sparsity.plan import Entry, Plan
from espalier.sparsity.scheme import Frozen, Rule, Scheme
from espalier.sparsity.size import size_bytes
from espalier.sparsity.snaps import BestPattern, EqualMagnitude, KeepLargest, Snap, Zero
from espalier.sparsity.structures import Structure

__all__ = [
    "CATALOG",
    "BestPattern",
    "Entry",
    "EqualMagnitude",
    "Frozen",
    "KeepLargest",
    "Plan",
    "Rule",
    "Scheme",
    "Snap",
    "Structure",
    "Zero",
    "at_density",
    "ceiling",
    "scheme",
    "size_bytes",
    "unfit",
]
