"""The compressed file."""

from espalier.store.container import FileInfo, TensorInfo, info, load, load_graph, save
from espalier.store.writing import write_whole

__all__ = ["FileInfo", "TensorInfo", "info", "load", "load_graph", "save", "write_whole"]
