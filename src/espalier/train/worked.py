"""The network under training as the optimizer sees it: whole in every process, or shared out over them (FSDP).

A method projects whole weights. Where they are shared out, every process keeps the network itself, whole, beside the
shards that are trained: the method's penalty and step act on the whole weights, its gradient goes to the shards, and
what the step changed goes back to them. All processes do the same on the same numbers, so their runs stay identical.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from espalier.train.recipe import Recipe
from espalier.train.team import Team


class TrainHooks(Protocol):
    """What the loop calls: a `methods.Run`, or anything like it.

    While training, conv weights lie in memory as channels_last: reshape them, don't view them.

    >>> class Nothing:
    ...     def penalty(self): return torch.zeros(())
    ...     def step(self): pass
    ...     def state_dict(self): return {}
    ...     def load_state_dict(self, state): pass
    >>> hooks: TrainHooks = Nothing()
    """

    def penalty(self) -> Tensor:
        """A scalar that is added to the loss."""
        ...

    def step(self) -> None:
        """Called after every step of the optimizer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which the hooks go on as if they had not been stopped."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        ...


class Worked(ABC):
    """`wrapped` is called and trained by `optimizer`; `model` is the user's network, whole."""

    wrapped: Any
    optimizer: torch.optim.Optimizer

    def __init__(self, team: Team, model: nn.Module) -> None:
        self.team, self.model = team, model

    @abstractmethod
    def penalty(self, hooks: TrainHooks) -> tuple[Tensor, float]:
        """What to add to the loss, and the penalty's value."""

    @abstractmethod
    def before_step(self) -> None:
        """Gradients are whole: add what the loss could not hold."""

    @abstractmethod
    def after_step(self, hooks: TrainHooks | None) -> None:
        """The optimizer has made its step: the hooks' turn."""

    @abstractmethod
    def settle(self) -> None:
        """Make `model` what is trained, on every process: before scoring and saving."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, whole; every process must ask for it."""

    @abstractmethod
    def load(self, model: Mapping[str, Any], optimizer: dict[str, Any]) -> None:
        """Go on from whole states of network and optimizer."""


@final
class Whole(Worked):
    """Every process holds everything; gradients are averaged (DDP), or there is one process."""

    def __init__(self, team: Team, model: nn.Module, recipe: Recipe) -> None:
        super().__init__(team, model)
        self.wrapped, self.optimizer = team.fabric.setup(model, recipe.make_optimizer(model))

    def penalty(self, hooks: TrainHooks) -> tuple[Tensor, float]:
        made = hooks.penalty()
        return made, float(made.detach())

    def before_step(self) -> None: ...

    def after_step(self, hooks: TrainHooks | None) -> None:
        if hooks is not None:
            hooks.step()

    def settle(self) -> None:
        self.team.average_norms(self.model)

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load(self, model: Mapping[str, Any], optimizer: dict[str, Any]) -> None:
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


@final
class Sharded(Worked):
    """Weights, gradients and optimizer states are shared out by rows; `model` is kept whole beside them."""

    def __init__(self, team: Team, model: nn.Module, recipe: Recipe) -> None:
        super().__init__(team, model)
        self.twin = copy.deepcopy(model)
        for p in self.twin.parameters():  # fully_shard takes nothing else
            p.data = p.data.clone(memory_format=torch.contiguous_format)
        self.wrapped = team.fabric.setup_module(self.twin)
        self.optimizer = team.fabric.setup_optimizers(recipe.make_optimizer(self.twin))
        self._pulled: list[Tensor | None] = []

    def penalty(self, hooks: TrainHooks) -> tuple[Tensor, float]:
        made, weights = hooks.penalty(), [p for p in self.model.parameters() if p.requires_grad]
        if made.requires_grad:
            self._pulled = list(torch.autograd.grad(made, weights, allow_unused=True))
        return made.detach().new_zeros(()), float(made.detach())

    def before_step(self) -> None:
        trained = [shard for _, shard in self._pairs() if shard.requires_grad]
        for shard, gradient in zip(trained, self._pulled):
            if gradient is not None and shard.grad is not None:
                self._local(shard.grad).add_(self._mine(gradient))
        self._pulled = []

    def after_step(self, hooks: TrainHooks | None) -> None:
        if hooks is None:
            return
        self._pull()
        hooks.step()
        self._push()

    def settle(self) -> None:
        self.team.average_norms(self.twin)
        self._pull()
        with torch.no_grad():
            for whole, trained in zip(self.model.buffers(), self.twin.buffers()):
                whole.copy_(trained)

    def optimizer_state(self) -> dict[str, Any]:
        return pytree.tree_map_only(self._kind(), lambda shard: shard.full_tensor(), self.optimizer.state_dict())

    def load(self, model: Mapping[str, Any], optimizer: dict[str, Any]) -> None:
        self.model.load_state_dict(model)
        self._push()
        with torch.no_grad():
            for whole, trained in zip(self.model.buffers(), self.twin.buffers()):
                trained.copy_(whole)
        shards: list[Any] = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {k: self._shared_out(values, shards[k]) for k, values in optimizer["state"].items()}
        self.optimizer.load_state_dict({**optimizer, "state": state})

    def _pull(self) -> None:
        """Shards -> whole weights."""
        with torch.no_grad():
            for whole, shard in self._pairs():
                whole.copy_(shard.full_tensor())

    def _push(self) -> None:
        """Whole weights -> shards."""
        with torch.no_grad():
            for whole, shard in self._pairs():
                self._local(shard).copy_(self._mine(whole))

    def _pairs(self) -> Iterator[tuple[Tensor, Any]]:
        return zip(self.model.parameters(), self.twin.parameters())

    def _shared_out(self, values: dict[str, Any], shard: Any) -> dict[str, Any]:
        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.shape != shard.shape:
                return value  # a count of steps
            mine = self._mine(value.to(shard.device)).clone()
            options = {"run_check": False, "shape": shard.shape, "stride": shard.stride()}
            return self._kind().from_local(mine, shard.device_mesh, shard.placements, **options)

        return {key: cut(value) for key, value in values.items()}

    def _mine(self, whole: Tensor) -> Tensor:
        """This process's rows, as `torch.chunk` deals them out."""
        rows = -(-whole.shape[0] // self.team.world)
        return whole[self.team.rank * rows : (self.team.rank + 1) * rows]

    @staticmethod
    def _local(shard: Any) -> Tensor:
        return shard.to_local()

    @staticmethod
    def _kind() -> Any:
        from torch.distributed.tensor import DTensor  # needs a build with torch.distributed

        return DTensor
