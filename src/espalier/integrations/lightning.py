"""A callback for Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from espalier.errors import MethodError, MissingExtraError
from espalier.graph import ExampleInputs
from espalier.integrations.course import Course
from espalier.methods import Method, Run
from espalier.sparsity import Plan, Scheme

try:  # an optional extra
    from lightning.pytorch.callbacks import Callback
except ImportError:
    Callback = None  # type: ignore[assignment,misc]

_Base: Any = object if Callback is None else Callback


class PruningCallback(_Base):
    """Train a LightningModule into a plan: the penalty joins the gradients, the run steps after the optimizer.

    plan, method, example_inputs: as `espalier.start` takes them.
    shaping: the share of the optimizer steps after which the weights lie in the plan; the rest retrains them there.
    module: the attribute of the LightningModule to prune, such as "model"; by default all of it (its `forward`).

    Works with gradient accumulation, clipping (the penalty's gradient is clipped too), every precision, DDP (the
    penalty is the same on every process) and Lightning's checkpoints, from which a run goes on exactly. With several
    optimizers the one that holds the weights drives the run. Sharded weights (FSDP) are not supported here:
    `espalier.train.fit(strategy="fsdp")` is. Raises MissingExtraError without the package ``lightning``.

    >>> callback = PruningCallback(plan, "admm", example_inputs=x)             # doctest: +SKIP
    >>> Trainer(max_epochs=20, callbacks=[callback]).fit(module, loader)       # doctest: +SKIP
    >>> small = espalier.shrink(module, x)                                     # doctest: +SKIP
    """

    def __init__(
        self,
        plan: Plan | Mapping[str, Scheme],
        method: Method | str = "magnitude",
        *,
        example_inputs: ExampleInputs,
        shaping: float = 0.5,
        module: str | None = None,
    ) -> None:
        if Callback is None:
            raise MissingExtraError("lightning", "lightning")
        super().__init__()
        self.course, self.module = Course(plan, method, example_inputs, shaping), module
        self._stepped = False

    @property
    def run(self) -> Run:
        """The run. Raises MethodError before training has begun."""
        return self.course.run

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the run, now that the weights are where they stay."""
        network = pl_module if self.module is None else getattr(pl_module, self.module, None)
        if not isinstance(network, nn.Module):
            raise MethodError(f"{type(pl_module).__name__} has no module {self.module!r}: name the one to prune")
        self.course.begin(network, trainer.estimated_stepping_batches)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are whole and unscaled here, and not clipped yet."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(target.weight) in held for target in self.run.targets):
            pl_module.log("pruning_penalty", self.course.before(), prog_bar=False, on_step=True)
            self._stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """After the batch, if the optimizer made a step in it."""
        if self._stepped:
            self._stepped = False
            self.course.after()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Whatever came of the length of the training, the weights lie in the plan."""
        self.course.end()

    def state_dict(self) -> dict[str, Any]:
        """Goes into Lightning's checkpoints."""
        return self.course.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes from Lightning's checkpoints."""
        self.course.load_state_dict(state_dict)
