"""A callback for the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from espalier.errors import MethodError, MissingExtraError
from espalier.graph import ExampleInputs
from espalier.integrations.course import Course
from espalier.methods import Method, Run
from espalier.sparsity import Plan, Scheme

try:  # an optional extra
    from transformers import TrainerCallback
except ImportError:
    TrainerCallback = None  # type: ignore[assignment,misc]

FILE = "espalier.pt"  # in each checkpoint folder
_Base: Any = object if TrainerCallback is None else TrainerCallback


class PruningCallback(_Base):
    """Train a model of the Hugging Face Trainer into a plan.

    A TrainerCallback cannot add to the loss; so the penalty's gradient is added in `on_pre_optimizer_step` (after
    the Trainer's clipping, which therefore does not touch it), and the run steps in `on_optimizer_step`.

    plan, method, example_inputs: as `espalier.start` takes them; inputs may be a dict such as ``{"pixel_values": x}``.
    shaping: the share of the optimizer steps after which the weights lie in the plan; the rest retrains them there.

    The run is saved as ``espalier.pt`` in every checkpoint folder, and goes on from it with `resume_from_checkpoint`.
    Gradient accumulation and DDP need nothing; fp16 needs `max_grad_norm` above 0 (clipping unscales the gradients);
    sharded weights (FSDP, DeepSpeed) are not supported here. Raises MissingExtraError without ``transformers``.

    >>> callback = PruningCallback(plan, "admm", example_inputs={"pixel_values": x})             # doctest: +SKIP
    >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()              # doctest: +SKIP
    """

    def __init__(
        self,
        plan: Plan | Mapping[str, Scheme],
        method: Method | str = "magnitude",
        *,
        example_inputs: ExampleInputs,
        shaping: float = 0.5,
    ) -> None:
        if TrainerCallback is None:
            raise MissingExtraError("transformers", "transformers")
        super().__init__()
        self.course = Course(plan, method, example_inputs, shaping)

    @property
    def run(self) -> Run:
        """The run. Raises MethodError before training has begun."""
        return self.course.run

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Start the run, or go on from the checkpoint that the Trainer resumes."""
        if args.fp16 and not args.max_grad_norm:
            raise MethodError(
                "with fp16 it is clipping that unscales gradients: set max_grad_norm above 0, or use bf16"
            )
        if state.global_step:
            file = _folder(args, state) / FILE
            if not file.exists():
                raise MethodError(f"{file} is missing: it was saved without this callback, or lies elsewhere")
            self.course.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.course.begin(model, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Gradients are whole here."""
        self.course.before()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer has made its step."""
        self.course.after()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer has written a checkpoint."""
        if state.is_world_process_zero:
            torch.save(self.course.state_dict(), _folder(args, state) / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Whatever came of the length of the training, the weights lie in the plan."""
        self.course.end()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
