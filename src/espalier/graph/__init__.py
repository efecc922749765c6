"""What a network computes: capture, channels, liveness, shrinking."""

from espalier.graph.capture import ExampleInputs, capture
from espalier.graph.channels import Couplings, couplings
from espalier.graph.interpret import run
from espalier.graph.ir import OPAQUE, Graph, Node, Site, Value
from espalier.graph.liveness import Liveness, bury, liveness, needed
from espalier.graph.module import to_module
from espalier.graph.op import Op
from espalier.graph.ops import OPS
from espalier.graph.shrink import Cuts, shrink, shrink_graph

__all__ = [
    "OPAQUE",
    "OPS",
    "Couplings",
    "Cuts",
    "ExampleInputs",
    "Graph",
    "Liveness",
    "Node",
    "Op",
    "Site",
    "Value",
    "bury",
    "capture",
    "couplings",
    "liveness",
    "needed",
    "run",
    "shrink",
    "shrink_graph",
    "to_module",
]
