"""The run protocol: what a training loop sees of a method.

run = start(model, plan, method, example_inputs, steps=steps)
loss = loss + run.penalty()      before backward
run.step()                       after optimizer.step()
run.finish()                     the weights lie in the plan; training may go on with step() and stays there
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import MethodError
from espalier.graph import Graph, bury
from espalier.methods.targets import Target, freeze, targets
from espalier.sparsity import Frozen, Scheme, ceiling
from espalier.sparsity.scheme import Tie


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` optimizer steps are done, of `steps` (None when not told)."""

    step: int
    steps: int | None

    def share(self, method: str) -> float:
        """0 at the start, 1 at the end. Raises MethodError when `steps` was not told."""
        if self.steps is None:
            raise MethodError(f"{method} needs to know how long the run is: es.start(..., steps=epochs * len(loader))")
        return min(1.0, self.step / max(1, self.steps))


State = dict[str, Tensor]
_TOLD = 3  # differences that a message names


class Method(ABC):
    """How the weights are brought into the plan. Its fields are its settings; what changes in a run is in the state."""

    @abstractmethod
    def begin(self, targets: list[Target], progress: Progress) -> State:
        """The state at the start of a run."""

    def penalty(self, targets: list[Target], state: State, progress: Progress) -> Tensor | None:
        """What is added to the loss (a scalar), or None."""
        return None

    @abstractmethod
    def step(self, targets: list[Target], state: State, progress: Progress) -> None:
        """After an optimizer step; `progress.step` counts it already."""

    def land(self, targets: list[Target], state: State) -> dict[str, Frozen]:
        """The support that every weight is to have: what the schemes choose for the weights as they are now."""
        return freeze(targets)


@dataclass(frozen=True)
class Density:
    """What was asked of a site and what it came to; `requested` is None where the method was to find it."""

    site: str
    weights: int
    requested: float | None
    achieved: float


def pull(weights: Sequence[Tensor], gradients: Sequence[Tensor], value: Tensor) -> Tensor:
    """A scalar `value` whose gradient with respect to `weights` is `gradients`.

    For penalties whose gradient is known: it costs no more than making the gradients, and adding them up.

    >>> w = torch.ones(3, requires_grad=True)
    >>> pull([w], [w.detach()], 0.5 * w.detach().square().sum()).backward()
    >>> w.grad
    tensor([1., 1., 1.])
    """
    return _Pull.apply(value, len(weights), *weights, *gradients)


def draw(
    weights: Sequence[Tensor],
    points: Sequence[Tensor],
    strengths: Sequence[Tensor],
    drawn: Sequence[Tensor] | None = None,
) -> Tensor | None:
    """``sum_k strengths_k/2 ||drawn_k (weights_k - points_k)||^2``, drawn 0 or 1; None where there are none."""
    if not weights:
        return None
    with torch.no_grad():
        wide = [w.detach().float() for w in weights]
        apart = torch._foreach_sub(wide, list(points))
        if drawn is not None:
            torch._foreach_mul_(apart, list(drawn))
        value = 0.5 * (torch.stack(torch._foreach_norm(apart)).square() * torch.stack(list(strengths))).sum()
        torch._foreach_mul_(apart, list(strengths))
    return pull(weights, apart, value)


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        made = ctx.saved_tensors
        return None, None, *torch._foreach_mul(made, outer[0]), *[None] * len(made)


class Run:
    """A method at work on a network. Made by `start`."""

    def __init__(self, graph: Graph, schemes: Mapping[str, Scheme], method: Method, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise MethodError(f"steps is {steps}: a run is one optimizer step long or more")
        self.graph, self.method = graph, method
        self.targets: list[Target] = targets(graph, schemes)
        self._progress = Progress(0, steps)
        self._state = method.begin(self.targets, self._progress)
        self._frozen: dict[str, Frozen] = {}
        self._buried: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        """Whether the weights lie in the plan, held there by `step`."""
        return bool(self._frozen) or not self.targets

    @property
    def masks(self) -> dict[str, Tensor]:
        """site -> boolean mask, once finished."""
        return {site: frozen.mask for site, frozen in self._frozen.items()}

    def penalty(self) -> Tensor:
        """What to add to the loss: a scalar, zero when the method has none or the run is finished."""
        made = None if self.finished else self.method.penalty(self.targets, self._on_device(), self._progress)
        if made is None:
            device = self.targets[0].weight.device if self.targets else torch.device("cpu")
            return torch.zeros((), device=device)
        return made

    def add_penalty_gradients(self) -> float:
        """Add the penalty's gradient to the weights' `.grad`, and return the penalty's value.

        For loops in which nothing can be added to the loss (a Hugging Face Trainer): call it after backward, before
        the optimizer's step, instead of adding `penalty()`. With a scaler, unscale the gradients first.

        >>> loss.backward(); run.add_penalty_gradients(); optimizer.step(); run.step()  # doctest: +SKIP
        """
        with torch.enable_grad():
            value = self.penalty()
        weights = [target.weight for target in self.targets if target.weight.requires_grad]
        if value.requires_grad:
            for weight, made in zip(weights, torch.autograd.grad(value, weights, allow_unused=True)):
                if made is not None:
                    made = made.to(weight.dtype)
                    weight.grad = made.clone() if weight.grad is None else weight.grad.add_(made)
        return float(value.detach())

    def step(self) -> None:
        """Call it after every optimizer step: it drives the method, and keeps a finished run in its plan."""
        with torch.no_grad():
            if self.finished:
                self._hold()
                return
            self._progress = Progress(self._progress.step + 1, self._progress.steps)
            self.method.step(self.targets, self._on_device(), self._progress)

    def hold(self, copy: nn.Module) -> None:
        """Bring a copy of the network (an EMA, a deep copy, a twin for quantisation) into this finished run's support.

        copy: a module whose parameters and buffers have the names that they have in the network; others are left
        alone. An average of weights from before `finish` needs it; a copy made afterwards only if it is trained.
        Raises MethodError before `finish`, and for a copy that lacks a weight of the plan.

        >>> run.hold(averaged.module)  # doctest: +SKIP
        """
        if not self.finished:
            raise MethodError("finish() the run before holding a copy to its support")
        named = [*copy.named_parameters(remove_duplicate=False), *copy.named_buffers()]
        tensors = {_plain(name): tensor for name, tensor in named}
        if missing := [site for site in self._frozen if _plain(site) not in tensors]:
            raise MethodError(
                f"the copy has no {', '.join(missing)}: pass the module itself, such as ema.module for an AveragedModel"
            )
        with torch.no_grad():
            for site, frozen in self._frozen.items():
                weight = tensors[_plain(site)]
                weight.copy_(_moved(frozen, weight.device).apply(weight))
            for name, keep in self._buried.items():
                if (tensor := tensors.get(_plain(name))) is not None:
                    tensor.masked_fill_(~keep.to(tensor.device), 0)

    def finish(self) -> None:
        """Bring the weights exactly into the plan and freeze their support.

        The affine part of a filter that died dies with it (see `graph.bury`), so its channel is exactly zero.
        Called again it changes nothing.
        """
        if self.finished:
            return
        with torch.no_grad():
            self._frozen = self.method.land(self.targets, self._on_device())
            self._state = {}
            self._settle()

    def tighten(self, masks: Mapping[str, Tensor]) -> None:
        """Remove more: only what `masks` keep too stays alive (purification). Raises MethodError before `finish`."""
        if not self.finished:
            raise MethodError("finish() the run before tightening it")
        for site, mask in masks.items():
            self._frozen[site] = self._frozen[site].tighten(mask.to(self._frozen[site].mask.device))
        with torch.no_grad():
            self._settle()

    def density(self) -> float:
        """The share of all conv and linear weights of the network that is not zero now."""
        weights = [self.graph.tensors[site].detach() for site in self.graph.sites()]
        return sum(int(w.count_nonzero()) for w in weights) / max(1, sum(w.numel() for w in weights))

    def densities(self) -> list[Density]:
        """Requested and achieved, site by site, as the weights are now."""
        rows = []
        for t in self.targets:
            found = any(lane.open for lane in t.lanes()) and t.scheme.density >= ceiling(t.scheme)
            kept = int(t.weight.count_nonzero()) / t.weight.numel()
            rows.append(Density(t.site, t.weight.numel(), None if found else t.scheme.density, kept))
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on bit for bit: tensors and plain values only."""
        return {
            "identity": self._identity(),
            "step": self._progress.step,
            "steps": self._progress.steps,
            "method": dict(self._state),
            "masks": self.masks,
            "ties": {site: [tie.tied for tie in f.ties] for site, f in self._frozen.items()},
            "signs": {site: f.signs for site, f in self._frozen.items() if f.signs is not None},
            "buried": dict(self._buried),
            "orders": self._orders(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises MethodError, naming what differs, for another network, plan or method."""
        if (before := state.get("identity")) != self._identity():
            raise MethodError(f"this state belongs to another {self._differs(before or {})}")
        self._progress = Progress(int(state["step"]), state["steps"])
        self._state = {key: value.clone() for key, value in state["method"].items()}
        self._buried = dict(state["buried"])
        self._frozen = {}
        orders = state.get("orders", {})
        self.targets = [replace(t, scheme=t.scheme.ordered(orders.get(t.site, []))) for t in self.targets]
        for target in self.targets:
            if target.site in state["masks"]:
                structures = [rule.structure for rule in target.scheme.rules if rule.snap.ties]
                ties = tuple(Tie(s, tied) for s, tied in zip(structures, state["ties"][target.site]))
                signs = state["signs"].get(target.site)
                self._frozen[target.site] = Frozen(state["masks"][target.site], target.conv_groups, ties, signs)

    # -- inside ------------------------------------------------------------------------------------

    def _orders(self) -> dict[str, list[Tensor]]:
        """site -> the orders of rows that its scheme was fitted to, rule by rule; empty for those in their own."""
        kept = {t.site: [rule.structure.order for rule in t.scheme.rules] for t in self.targets}
        none = torch.empty(0, dtype=torch.int64)
        return {
            s: [none if o is None else o for o in each] for s, each in kept.items() if any(o is not None for o in each)
        }

    def _identity(self) -> dict[str, str]:
        plan = {t.site: f"{t.scheme.name} {t.scheme.density:.6g} {list(t.weight.shape)}" for t in self.targets}
        return {"method": repr(self.method), **plan}

    def _differs(self, before: Mapping[str, str]) -> str:
        """Which of network, plan and method are others than `before` (an `_identity`), and where."""
        now, sites = self._identity(), self.graph.sites()
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        shapes = {key: {text.partition(" [")[2] for text in (before.get(key), now.get(key)) if text} for key in changed}
        kinds = {key: "network" if key not in sites or len(shapes[key]) > 1 else "plan" for key in changed}
        kinds |= {"method": "method"} if "method" in changed else {}
        what = " and ".join(kind for kind in ("network", "plan", "method") if kind in kinds.values())
        told = [f"{key} was {before.get(key, 'dense')}, is {now.get(key, 'dense')}" for key in changed]
        more = f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        return f"{what}: {'; '.join(told[:_TOLD])}{more}"

    def _on_device(self) -> State:
        """The state, moved to where the weights are now (the module may have been moved after `start`)."""
        if self.targets:
            device = self.targets[0].weight.device
            for key, value in self._state.items():
                if value.device != device:
                    self._state[key] = value.to(device)
        return self._state

    def _settle(self) -> None:
        """Apply the supports, bury what died with them, and keep both."""
        self._hold()
        for name, keep in bury(self.graph).items():
            self._buried[name] = self._buried[name] & keep if name in self._buried else keep
        self._hold()

    def _hold(self) -> None:
        for target in self.targets:
            weight, frozen = target.weight, self._frozen[target.site]
            if frozen.mask.device != weight.device:
                frozen = self._frozen[target.site] = _moved(frozen, weight.device)
            weight.copy_(frozen.apply(weight)) if frozen.ties else weight.masked_fill_(~frozen.mask, 0)
        for name, keep in self._buried.items():
            tensor = self.graph.tensors[name]
            tensor.masked_fill_(~keep.to(tensor.device), 0)


def _plain(name: str) -> str:
    """A name as it was before `torch.compile` wrapped the module."""
    return name.replace("_orig_mod.", "")


def _moved(frozen: Frozen, device: torch.device) -> Frozen:
    ties = tuple(Tie(tie.structure, tie.tied.to(device)) for tie in frozen.ties)
    signs = None if frozen.signs is None else frozen.signs.to(device)
    return Frozen(frozen.mask.to(device), frozen.conv_groups, ties, signs)
