"""Espalier: structured pruning that you can measure in milliseconds.

>>> import espalier as es
>>> run = es.start(model, es.Plan.uniform("block_punched", 0.2), "admm", example_inputs, steps=1000)
>>> # in your loop: loss = loss + run.penalty(); ...; optimizer.step(); run.step()
>>> run.finish()
>>> program = es.compile(es.shrink(model, example_inputs), example_inputs)
"""

from espalier.compress import Result, compress
from espalier.errors import EspalierError
from espalier.graph import Graph, capture, shrink
from espalier.mapping import Targets, explain, latency_model, plan, propose, scored, uniform
from espalier.methods import METHODS, Run, allocate, purify, start
from espalier.report import size
from espalier.runtime import Executable, bench, compile, machine
from espalier.sparsity import CATALOG, Plan, Scheme, scheme
from espalier.store import info, load, save

__version__ = "0.1.0"

__all__ = [
    "CATALOG",
    "METHODS",
    "EspalierError",
    "Executable",
    "Graph",
    "Plan",
    "Result",
    "Run",
    "Scheme",
    "Targets",
    "allocate",
    "bench",
    "capture",
    "compile",
    "compress",
    "explain",
    "info",
    "latency_model",
    "load",
    "machine",
    "plan",
    "propose",
    "purify",
    "save",
    "scheme",
    "scored",
    "shrink",
    "size",
    "start",
    "uniform",
]
