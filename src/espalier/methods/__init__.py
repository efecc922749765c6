"""How training gets there: the run protocol, one file per method, purification."""

from espalier.methods.admm import ADMM
from espalier.methods.base import Method, Run
from espalier.methods.magnitude import Magnitude
from espalier.methods.purify import PurifyReport, purify
from espalier.methods.table import METHODS, get, start

__all__ = ["ADMM", "METHODS", "Magnitude", "Method", "PurifyReport", "Run", "get", "purify", "start"]
