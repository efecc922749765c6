"""The zoo: networks by name."""

from espalier.train.zoo.table import ZOO, Network, build, example_shape, load_weights

__all__ = ["ZOO", "Network", "build", "example_shape", "load_weights"]
