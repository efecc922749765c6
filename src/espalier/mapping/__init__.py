"""Which scheme where."""

from espalier.mapping.cluster import Cluster
from espalier.mapping.everywhere import uniform
from espalier.mapping.latency import LatencyModel, check, latency_model, mean_error
from espalier.mapping.proposal import Proposal, plan, propose
from espalier.mapping.rules import explain
from espalier.mapping.search import final, search, study
from espalier.mapping.sensitivity import Sensitivity, measure_sensitivity, scored
from espalier.mapping.space import Space, space_of
from espalier.mapping.targets import Targets
from espalier.mapping.trials import Log, Trial, best, front
from espalier.mapping.workers import Here, Processes, Workers

__all__ = [
    "Cluster",
    "Here",
    "LatencyModel",
    "Log",
    "Processes",
    "Proposal",
    "Sensitivity",
    "Space",
    "Targets",
    "Trial",
    "Workers",
    "best",
    "check",
    "explain",
    "final",
    "front",
    "latency_model",
    "mean_error",
    "measure_sensitivity",
    "plan",
    "propose",
    "scored",
    "search",
    "space_of",
    "study",
    "uniform",
]
