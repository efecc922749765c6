"""Bound: a call of a compiled network whose inputs and outputs keep their places in memory."""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from espalier.errors import EngineError, ShapeError
from espalier.runtime.runners import array_of

if TYPE_CHECKING:  # it makes these
    from espalier.runtime.executable import Executable


class Bound:
    """See `Executable.bind`.

    inputs: as they were given; what stands in them when it is called counts. outputs: of the last call.
    """

    def __init__(self, program: Executable, inputs: Sequence[Any], batch: int) -> None:
        """inputs: checked. Raises ShapeError for one that does not lie in one piece on the CPU."""
        for name, x in zip(program.graph.inputs, inputs):
            if not (x.is_contiguous() and x.device.type == "cpu" if isinstance(x, Tensor) else x.flags.c_contiguous):
                raise ShapeError(f"input {name}: bind needs one that lies in one piece on the CPU; make it contiguous")
        self.inputs, self.outputs = tuple(inputs), None
        self._program, self._process = program, os.getpid()
        self._native = program.only_native if batch else None
        if self._native is None:
            return
        self._context = self._native.borrow()
        weakref.finalize(self, self._native.idle.append, self._context)
        # the engine's call does not keep them
        self._arrays = [array_of(x) for x in inputs]
        self._run, results = self._context.bind(self._arrays, batch)
        values = dict(zip(program.graph.inputs, inputs)) | dict(zip(self._native.outputs, results))
        self.outputs = program.results(values, inputs)

    def __call__(self) -> Any:
        """The outputs for what stands in the inputs now. Raises EngineError while another thread is in it."""
        if self._native is None:
            self.outputs = self._program(*self.inputs)
        elif os.getpid() != self._process:
            raise EngineError("bound before this process was forked, and its threads did not follow: bind again")
        else:
            self._run()
        return self.outputs

    def profile(self) -> dict[str, float]:
        """As `Executable.profile`, in these places."""
        if self._native is None:
            return self._program.profile(*self.inputs)
        times: defaultdict[str, float] = defaultdict(float)
        with self._native.timing(self._context, times):
            self()
        return dict(times)
