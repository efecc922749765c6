"""Rivals: other engines on the same network, each at its best settings, to be measured beside ours."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import MissingExtraError, UnknownNameError

try:  # an optional extra
    import onnxruntime
except ImportError:
    onnxruntime = None
try:  # an optional extra
    import openvino
except ImportError:
    openvino = None

Rival = Callable[[nn.Module, Tensor, int], Callable[[], object]]


def rival(name: str) -> Rival:
    """How to make a rival: ``rival("onnxruntime")(module, example, threads)`` gives a call to be timed.

    Raises UnknownNameError; making one raises MissingExtraError when its package is not installed.
    """
    if name not in RIVALS:
        raise UnknownNameError("rival", name, RIVALS)
    return RIVALS[name]


def _torch(module: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """PyTorch as it is; threads are those of the process (torch.set_num_threads)."""
    torch.set_num_threads(threads)

    def call() -> object:
        with torch.inference_mode():
            return module(example)

    return call


def _torch_compile(module: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """torch.compile with its inductor backend, weights frozen."""
    torch.set_num_threads(threads)
    compiled = torch.compile(module, options={"freezing": True})

    def call() -> object:
        with torch.inference_mode():
            return compiled(example)

    call()
    return call


def _onnx(module: nn.Module, example: Tensor) -> bytes:
    """The module as ONNX bytes."""
    try:
        import onnxscript  # noqa: F401 (the exporter needs it, and says so less clearly)
    except ImportError:
        raise MissingExtraError("onnxscript", "rivals") from None
    stream = io.BytesIO()
    program = torch.onnx.export(module, (example,), dynamo=True, verbose=False)
    assert program is not None
    stream.write(program.model_proto.SerializeToString())
    return stream.getvalue()


def _onnxruntime(module: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """ONNX Runtime on the CPU, all graph optimisations, inputs and outputs bound in place."""
    if onnxruntime is None:
        raise MissingExtraError("onnxruntime", "rivals")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_onnx(module, example), options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, np.ascontiguousarray(example.numpy())
    return lambda: session.run(None, {name: array})[0]


def _openvino(module: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """OpenVINO on the CPU in fp32, with the latency hint."""
    if openvino is None:
        raise MissingExtraError("openvino", "rivals")
    core = openvino.Core()
    model = core.read_model(_onnx(module, example))
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(example.numpy()), shared_memory=True))

    def call() -> object:
        request.infer()
        return request.get_output_tensor(0).data

    return call


RIVALS: dict[str, Rival] = {
    "torch": _torch,
    "torch_compile": _torch_compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
