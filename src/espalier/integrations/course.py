"""A run inside somebody else's loop: when it starts, what it does around an optimizer step, when it finishes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from espalier.errors import MethodError
from espalier.graph import ExampleInputs
from espalier.methods import Method, Run, start
from espalier.sparsity import Plan, Scheme


class Course:
    """Shape for the share `shaping` of the steps, then finish and retrain in the frozen plan.

    plan, method, example_inputs: as `espalier.start` takes them; inputs are brought to the network's device.

    >>> course = Course(Plan.uniform("filter", 0.5), "admm", torch.zeros(1, 3, 8, 8), shaping=0.5)
    >>> course.begin(model, steps=1000)      # doctest: +SKIP
    >>> course.before(); course.after()      # around every step of the optimizer  # doctest: +SKIP
    """

    def __init__(
        self,
        plan: Plan | Mapping[str, Scheme],
        method: Method | str,
        example_inputs: ExampleInputs,
        shaping: float = 0.5,
    ) -> None:
        if not 0 < shaping <= 1:
            raise MethodError(f"shaping is {shaping}, expected a share of the steps above 0 and up to 1")
        self.plan, self.method, self.example_inputs, self.shaping = plan, method, example_inputs, shaping
        self.done, self.steps = 0, 0
        self._run: Run | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def run(self) -> Run:
        """The run. Raises MethodError before training has begun."""
        if self._run is None:
            raise MethodError("the run starts with the training: there is none yet")
        return self._run

    def begin(self, model: nn.Module, steps: float) -> None:
        """Start the run on `model`, which will make so many optimizer steps in all, or go on from a loaded state."""
        if not 0 < steps < float("inf"):
            raise MethodError(f"the training makes {steps} steps: say how long it is (max_steps or epochs)")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        example = pytree.tree_map_only(Tensor, lambda x: x.to(device), self.example_inputs)
        self.steps = max(1, round(self.shaping * steps))
        self._run = start(model, self.plan, self.method, example, steps=self.steps)
        if self._loaded is not None:
            if self._loaded["steps"] != self.steps:
                raise MethodError(
                    f"the saved run shapes for {self._loaded['steps']} steps, this one for {self.steps}: resume with "
                    "the same length and the same share of shaping"
                )
            self._run.load_state_dict(self._loaded["run"])
            self.done, self._loaded = int(self._loaded["done"]), None

    def before(self) -> float:
        """Before the optimizer's step, gradients unscaled: add the penalty's. Returns the penalty."""
        return self.run.add_penalty_gradients()

    def after(self) -> None:
        """After the optimizer's step."""
        self.run.step()
        self.done += 1
        if self.done == self.steps:
            self.run.finish()

    def end(self) -> None:
        """The training is over: the weights lie in the plan, however long it was, whatever was loaded at its end."""
        if self.run.finished:
            self.run.step()
        self.run.finish()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which another course goes on exactly."""
        return {"run": self.run.state_dict(), "done": self.done, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state, when training begins."""
        self._loaded = dict(state)
