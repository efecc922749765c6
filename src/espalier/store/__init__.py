"""The compressed file."""

from espalier.store.container import FileInfo, TensorInfo, info, load, load_graph, save

__all__ = ["FileInfo", "TensorInfo", "info", "load", "load_graph", "save"]
