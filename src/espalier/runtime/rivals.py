"""Rivals: other engines on the same network, each at its best settings, to be measured beside ours.

A row of RIVALS makes a call from a module, an example input and a number of threads; the call runs the module on the
example and gives its (first) output, a tensor or an array that the next call may overwrite.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espalier.errors import MissingExtraError, UnknownNameError

Rival = Callable[[nn.Module, Tensor, int], Callable[[], object]]


def rival(name: str) -> Rival:
    """How to make a rival: ``rival("onnxruntime")(module, example, threads)`` gives a call to be timed.

    Raises UnknownNameError; making one raises MissingExtraError when its package is not installed.

    >>> bench({name: rival(name)(module, example, threads=4) for name in ("onnxruntime", "openvino")})
    """
    if name not in RIVALS:
        raise UnknownNameError("rival", name, RIVALS)
    return RIVALS[name]


def _torch(module: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """PyTorch as it is."""
    return _in_torch(module.eval(), example, threads)


def _torch_compile(module: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """torch.compile with its inductor backend: static shapes, weights frozen and packed, kernels of C++."""
    compiled = torch.compile(module.eval(), dynamic=False, options={"freezing": True})
    call = _in_torch(compiled, example, threads)
    call()  # compiles
    return call


def _in_torch(module: Callable[[Tensor], object], example: Tensor, threads: int) -> Callable[[], object]:
    def call() -> object:
        if torch.get_num_threads() != threads:  # a setting of the process, which others may have changed
            torch.set_num_threads(threads)
        with torch.inference_mode():
            return module(example)

    return call


def _extra(package: str) -> Any:
    """An optional extra, imported only here: it takes its time, which few need."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package, "rivals") from None


def _onnx(module: nn.Module, example: Tensor) -> bytes:
    """The module as ONNX bytes."""
    _extra("onnxscript")  # without which torch.onnx cannot export
    with _silence():
        program = torch.onnx.export(module.eval(), (example,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


@contextmanager
def _silence() -> Iterator[None]:
    """Without what the exporter says about itself and about packages that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _onnxruntime(module: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """ONNX Runtime on the CPU: all graph optimisations, input and outputs bound, so that a run copies nothing.

    Its threads stop spinning when a run is over, so that they do not slow down what is measured next.
    """
    onnxruntime = _extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_onnx(module, example), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, np.ascontiguousarray(example.numpy()))
    session_outputs = [output.name for output in session.get_outputs()]
    for name in session_outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    for name, value in zip(session_outputs, binding.get_outputs()):
        binding.bind_ortvalue_output(name, value)  # the same memory from now on

    def call() -> object:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return call


def _openvino(module: nn.Module, example: Tensor, threads: int) -> Callable[[], object]:
    """OpenVINO on the CPU in fp32, with the latency hint, input and output in shared memory."""
    openvino = _extra("openvino")
    core = openvino.Core()
    model = core.read_model(_onnx(module, example))
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    array = np.ascontiguousarray(example.numpy())
    request.set_input_tensor(openvino.Tensor(array, shared_memory=True))

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
