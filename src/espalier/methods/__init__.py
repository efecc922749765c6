"""How training gets there: the run protocol, one file per method, allocation, purification."""

from espalier.methods.admm import ADMM
from espalier.methods.allocate import Allocation, allocate, open_plan
from espalier.methods.base import Density, Method, Run
from espalier.methods.magnitude import Magnitude
from espalier.methods.primal_proximal import PrimalProximal
from espalier.methods.purify import PurifyReport, purify, remove_unused
from espalier.methods.reweighted import Reweighted
from espalier.methods.selective_decay import SelectiveDecay
from espalier.methods.structure_parameters import StructureParameters
from espalier.methods.table import METHODS, get, start

__all__ = [
    "ADMM",
    "METHODS",
    "Allocation",
    "Density",
    "Magnitude",
    "Method",
    "PrimalProximal",
    "PurifyReport",
    "Reweighted",
    "Run",
    "SelectiveDecay",
    "StructureParameters",
    "allocate",
    "get",
    "open_plan",
    "purify",
    "remove_unused",
    "start",
]
