"""Engine: the native library through ctypes. The only file that knows it; calls release the GIL."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from ctypes import POINTER, Array, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import espalier
from espalier.errors import EngineError

_FLOAT = np.dtype(np.float32)
_VERSION = 1
_BUSY, _BAD_VERSION = 6, 3
_NAME = {"darwin": "libespalier.dylib", "win32": "espalier.dll"}.get(sys.platform, "libespalier.so")
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "esp_version": (c_uint32, []),
    "esp_code_name": (c_char_p, [c_int]),
    "esp_isa_name": (c_char_p, [c_int]),
    "esp_isa_supported": (c_int, [c_int]),
    "esp_isa": (c_int, [c_char_p, c_size_t]),
    "esp_peak_gflops": (c_double, [c_int32]),
    "esp_load": (c_int, [c_char_p, c_size_t, POINTER(c_void_p), c_char_p, c_size_t]),
    "esp_program_bytes": (c_void_p, [c_void_p, POINTER(c_size_t)]),
    "esp_free": (None, [c_void_p]),
    "esp_workspace_size": (c_int64, [c_void_p]),
    "esp_step_count": (c_int32, [c_void_p]),
    "esp_step_name": (c_char_p, [c_void_p, c_int32]),
    "esp_step_note": (c_char_p, [c_void_p, c_int32]),
    "esp_step_kernel": (c_char_p, [c_void_p, c_int32]),
    "esp_input_count": (c_int32, [c_void_p]),
    "esp_output_count": (c_int32, [c_void_p]),
    "esp_input_name": (c_char_p, [c_void_p, c_int32]),
    "esp_output_name": (c_char_p, [c_void_p, c_int32]),
    "esp_input_shape": (c_int32, [c_void_p, c_int32, POINTER(c_int64), c_int32]),
    "esp_output_shape": (c_int32, [c_void_p, c_int32, POINTER(c_int64), c_int32]),
    "esp_context_create": (c_int, [c_void_p, c_int32, POINTER(c_void_p), c_char_p, c_size_t]),
    "esp_context_free": (None, [c_void_p]),
    "esp_run": (c_int, [c_void_p, c_int64, POINTER(c_void_p), POINTER(c_void_p)]),
    "esp_profile": (c_int, [c_void_p, c_int]),
    "esp_step_ms": (c_double, [c_void_p, c_int32]),
}


@dataclass(frozen=True)
class Isa:
    """An instruction set that the library was compiled for, and whether this machine has it."""

    name: str
    supported: bool


def library_path() -> Path:
    """Where the native library is: $ESPALIER_LIBRARY, or beside the package. Raises EngineError when it is nowhere."""
    forced = os.environ.get("ESPALIER_LIBRARY")
    if forced:
        if not Path(forced).is_file():
            raise EngineError(f"ESPALIER_LIBRARY={forced}: no such file")
        return Path(forced)
    package = Path(espalier.__file__).parent
    places = [package / "_native" / _NAME, Path(sysconfig.get_path("platlib")) / "espalier" / "_native" / _NAME]
    for place in places:
        if place.is_file():
            return place
    raise EngineError(
        f"the native engine is not built: {places[0]} is missing. Build it with `cmake -S . -B build && "
        "cmake --build build` in the checkout, install a wheel, or set ESPALIER_LIBRARY to the library's path"
    )


@functools.cache
def _library() -> ctypes.CDLL:
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise EngineError(f"{path} cannot be loaded: {error}. Build it again") from error
    if library.esp_version() != _VERSION:
        raise EngineError(
            f"{path} has interface {library.esp_version()}, this package needs {_VERSION}. Build it again"
        )
    return library


def isas() -> tuple[Isa, ...]:
    """The instruction sets of the library, best first."""
    library = _library()
    found: list[Isa] = []
    while (name := library.esp_isa_name(len(found))) is not None:
        found.append(Isa(name.decode(), bool(library.esp_isa_supported(len(found)))))
    return tuple(found)


def isa() -> str:
    """The instruction set that a program loaded now runs on: the best one here, or $ESPALIER_ISA.

    Raises EngineError when ESPALIER_ISA names one that is unknown or missing here.
    """
    message = ctypes.create_string_buffer(512)
    number = _library().esp_isa(message, len(message))
    if number < 0:
        raise EngineError(message.value.decode(errors="replace"), 5)
    return isas()[number].name


@functools.cache
def fingerprint() -> str:
    """Of the native library: what was compiled for another one is compiled again."""
    return hashlib.sha256(library_path().read_bytes()).hexdigest()


def peak_gflops(threads: int = 1) -> float:
    """Billions of floating-point operations a second that this machine can do at most, measured on `threads` threads.

    A multiply-add is two. Of the instruction set that `isa` names.
    """
    return float(_library().esp_peak_gflops(threads))


class LoadedProgram:
    """A program in the engine. Read-only: any number of contexts may run it at once."""

    def __init__(self, data: bytes) -> None:
        """Raises EngineError with the engine's reason for refusing `data`."""
        self._handle: c_void_p | None = None
        self._library = _library()
        handle, message = c_void_p(), ctypes.create_string_buffer(512)
        code = self._library.esp_load(data, len(data), ctypes.byref(handle), message, len(message))
        if code:
            raise EngineError(message.value.decode(errors="replace") or self._code_name(code), code)
        self._handle = handle
        self.workspace_bytes = int(self._library.esp_workspace_size(handle))
        self.inputs = self._tensors("input")
        self.outputs = self._tensors("output")
        count = self._library.esp_step_count(handle)
        self.steps = [self._text("esp_step_name", i) for i in range(count)]
        self.notes = [self._text("esp_step_note", i) for i in range(count)]
        self.kernels = [self._text("esp_step_kernel", i) for i in range(count)]

    def to_bytes(self) -> bytes:
        """A copy of what it was loaded from."""
        size = c_size_t()
        address = self._library.esp_program_bytes(self._handle, ctypes.byref(size))
        return ctypes.string_at(address, size.value)

    def __del__(self) -> None:
        if self._handle is not None:
            self._library.esp_free(self._handle)

    def _code_name(self, code: int) -> str:
        return str(self._library.esp_code_name(code).decode())

    def _text(self, function: str, i: int) -> str:
        return str(getattr(self._library, function)(self._handle, i).decode(errors="replace"))

    def _tensors(self, kind: str) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of one sample of each input or output."""
        count = getattr(self._library, f"esp_{kind}_count")(self._handle)
        dims = (c_int64 * 8)()
        found = []
        for i in range(count):
            rank = getattr(self._library, f"esp_{kind}_shape")(self._handle, i, dims, 8)
            found.append((self._text(f"esp_{kind}_name", i), tuple(dims[:rank])))
        return found


class Context:
    """Workspace and threads for running a program; for one caller at a time."""

    def __init__(self, program: LoadedProgram, threads: int) -> None:
        """Raises EngineError when memory or threads are refused."""
        self._handle: c_void_p | None = None
        self._library, self.program = _library(), program
        handle, message = c_void_p(), ctypes.create_string_buffer(512)
        code = self._library.esp_context_create(program._handle, threads, ctypes.byref(handle), message, len(message))
        if code:
            raise EngineError(message.value.decode(errors="replace"), code)
        self._handle, self.process = handle, os.getpid()
        self._shapes = [[shape for _, shape in ends] for ends in (program.inputs, program.outputs)]
        self._pointers = self._new_pointers()

    def __del__(self) -> None:
        if self._handle is not None and self.process == os.getpid():  # its threads did not follow a fork
            self._library.esp_context_free(self._handle)

    def run(self, inputs: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
        """Outputs for `batch` samples; inputs are contiguous float32 ``[batch, *shape]`` and checked by the caller."""
        outputs = self._aim(self._pointers, inputs, batch)
        code = self._library.esp_run(self._handle, batch, *self._pointers)
        if code:
            raise self._refused(code)
        return outputs

    def bind(self, inputs: Sequence[np.ndarray], batch: int) -> tuple[Callable[[], None], list[np.ndarray]]:
        """A run that reads these arrays as they are by then, and the arrays that it writes. The caller keeps both."""
        pointers = self._new_pointers()
        outputs = self._aim(pointers, inputs, batch)
        run, arguments = self._library.esp_run, (self._handle, c_int64(batch), *pointers)

        def call() -> None:
            code = run(*arguments)
            if code:
                raise self._refused(code)

        return call, outputs

    def _new_pointers(self) -> list[Array[c_void_p]]:
        return [(c_void_p * max(1, len(shapes)))() for shapes in self._shapes]

    def _aim(self, pointers: list[Array[c_void_p]], inputs: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
        """Pointers to inputs and to new outputs, which are given back."""
        taken, made = self._shapes
        outputs = [np.empty((batch, *shape), _FLOAT) for shape in made]
        fits = len(inputs) == len(taken)
        for x, shape in zip(inputs, taken):
            fits = fits and x.shape == (batch, *shape) and x.dtype == _FLOAT and x.flags.c_contiguous
        if not fits:
            shapes = [(batch, *shape) for shape in taken]
            raise EngineError(f"the program takes contiguous float32 arrays of shapes {shapes}", 1)
        for places, arrays in zip(pointers, (inputs, outputs)):
            for i, x in enumerate(arrays):
                places[i] = x.__array_interface__["data"][0]  # half the time of x.ctypes.data
        return outputs

    def _refused(self, code: int) -> EngineError:
        return EngineError(f"the engine refused to run: {self.program._code_name(code)}", code)

    def profile(self, on: bool) -> None:
        """Time every step of the runs that follow; sets the times to zero."""
        self._library.esp_profile(self._handle, int(on))

    def step_ms(self) -> list[float]:
        """Milliseconds spent in each step since `profile`."""
        return [self._library.esp_step_ms(self._handle, i) for i in range(len(self.program.steps))]
