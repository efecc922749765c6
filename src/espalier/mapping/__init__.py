"""Which scheme where."""

from espalier.mapping.everywhere import uniform
from espalier.mapping.latency import LatencyModel, check, latency_model, mean_error
from espalier.mapping.proposal import Proposal, plan, propose
from espalier.mapping.rules import explain
from espalier.mapping.sensitivity import Sensitivity, measure_sensitivity, scored
from espalier.mapping.targets import Targets

__all__ = [
    "LatencyModel",
    "Proposal",
    "Sensitivity",
    "Targets",
    "check",
    "explain",
    "latency_model",
    "mean_error",
    "measure_sensitivity",
    "plan",
    "propose",
    "scored",
    "uniform",
]
