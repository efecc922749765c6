"""The zoo: networks by name, and their weights."""

from espalier.train.zoo.table import ZOO, Network, build, example_shape
from espalier.train.zoo.weights import inner_widths, load_weights, read_weights

__all__ = ["ZOO", "Network", "build", "example_shape", "inner_widths", "load_weights", "read_weights"]
