"""The training phases of a compression, each done once and kept: dense, shape, recover, purify, retrain.

The allowance (`max_drop`) is read on held-out images, paired with the dense network's answers: what was lost, and the
standard error of that. Purification may spend what is left of the allowance by the careful reading (loss plus one
standard error). When the end still lies above the allowance, retraining goes on, and at last purification is undone.

A network that was trained elsewhere may have seen the held-out images, and then remembers them better than any that
goes on without them. Where it looks so (`seen`), a copy trained on without them, for as long as the recovery, gives the
answers to compare with.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import MethodError
from espalier.methods import Method, Run, purify, start
from espalier.sparsity import Plan
from espalier.train import (
    Data,
    Drop,
    Processes,
    Recipe,
    Tried,
    correct,
    drop,
    evaluate,
    fit,
    recalibrate_if_better,
    seed_everything,
)
from espalier.workspace import Workspace

SHAPING = 0.5  # of the epochs; the rest retrains, half before purification and half after
FINE_TUNING = 0.4  # of the recipe's learning rate, once the dense network is trained
ROUNDS = 2  # of further retraining, where the allowance is not met; one of them before purification
_PHASE_SEEDS = 104_729


@dataclass(frozen=True)
class Outcome:
    """What the phases came to. `original` is the dense network; the job's network is the compressed one.

    holdout: the loss on the held-out images at the end. facts: what each phase reported, for report.json.
    """

    original: nn.Module
    holdout: Drop
    facts: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A network on its way: `run` does every phase that is not in `work` yet, and leaves `network` at its end.

    Every phase is seeded by `seed` and its own name, so a resumed one ends like an unbroken one.
    """

    network: nn.Module
    data: Data
    plan: Plan
    method: Method
    example: Tensor
    work: Workspace
    recipe: Recipe
    seed: int
    epochs: int
    dense_epochs: int
    max_drop: float
    processes: Processes = field(default_factory=Processes)

    def run(self) -> Outcome:
        """Every phase in turn; the network ends shaped and retrained."""
        self.dense()
        dense = copy.deepcopy(self.network.state_dict())
        right = correct(self.network, self.data.holdout)
        remembers = not self.dense_epochs and self.recovery > 0 and seen(self.network, self.data)
        if remembers:
            right = self.work.phase("reference", self._reference)["right"]
            self.network.load_state_dict(dense)
        return _Way(self, copy.deepcopy(self.network).eval(), right, remembers).go()

    @property
    def shaping(self) -> int:
        """Epochs of shaping; without any the method makes its choice at once."""
        return math.ceil(self.epochs * SHAPING)

    @property
    def recovery(self) -> int:
        """Epochs of retraining before purification."""
        return math.ceil((self.epochs - self.shaping) / 2)

    def dense(self) -> None:
        """Train the dense network, or take it as it was trained; `run` does so first."""
        self.network.load_state_dict(self.work.phase("dense", self._dense)["model"])

    def train(self, phase: str, epochs: int, run: Run | None, teacher: nn.Module | None) -> None:
        """So many epochs of the recipe; the dense network at its full learning rate and without a teacher."""
        seed = self.seed * _PHASE_SEEDS + zlib.crc32(phase.encode())  # each phase draws its own batches
        seed_everything(seed)
        if epochs < 1:
            return
        recipe, checkpoint = replace(self.recipe, epochs=epochs, seed=seed), self.work.checkpoint(phase)
        if run is None:
            recipe = replace(recipe, distill=0.0)
        if phase != "dense":
            recipe = replace(recipe, lr=recipe.lr * FINE_TUNING)
        fit(
            self.network,
            self.data,
            recipe,
            hooks=run,
            teacher=teacher,
            checkpoint=checkpoint,
            resume=True,
            phase=phase,
            devices=self.processes.devices,
            num_nodes=self.processes.num_nodes,
            strategy=self.processes.strategy,
            accelerator=self.processes.accelerator,
        )

    def _dense(self) -> dict[str, Any]:
        self.train("dense", self.dense_epochs, None, None)
        return {"model": self.network.state_dict()}

    def _reference(self) -> dict[str, Any]:
        self.train("reference", self.recovery, None, None)
        return {"right": correct(self.network, self.data.holdout)}


def seen(network: nn.Module, data: Data) -> bool:
    """Whether a network answers held-out images no worse than training images, as if it had been trained on both.

    Of both as many images; within two standard errors, and clearly better than chance.
    """
    count = min(len(data.holdout), len(data.train))
    among = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:count]
    held, trained = (evaluate(network, split).accuracy for split in (data.holdout, data.train.only(among)))
    error = math.sqrt((held * (1 - held) + trained * (1 - trained)) / count)
    chance = 1 / data.classes
    return trained - held <= 2 * error and held > chance + 0.25 * (1 - chance)


class _Way:
    """From the dense network to the compressed one; `right` are the answers on held-out images to compare with."""

    def __init__(self, job: Job, original: nn.Module, right: Tensor, remembers: bool) -> None:
        self.job, self.original, self.network = job, original, job.network
        self.right, self.remembers = right, remembers
        steps = job.shaping * job.data.train.steps(job.recipe.batch_size)
        self.run = start(job.network, job.plan, job.method, job.example, steps=max(1, steps))

    def go(self) -> Outcome:
        recovery = self.job.recovery
        shaped = self._do("shape", self._shape)
        whole = self._do("recover", lambda: self._retrain("recover", recovery))
        early = 0
        if self.job.epochs and Drop(*whole["drop"]).bound > self.job.max_drop:
            early = max(1, recovery)
            whole = self._do("recover2", lambda: self._retrain("recover2", early))
        pure = self._do("purify", self._purify)
        rounds = ROUNDS - bool(early)
        final, late, undone = self._settle(whole, self.job.epochs - self.job.shaping - recovery, rounds)
        facts = {
            "dense": 100 * float(self.right.float().mean()),
            "dense_had_seen_the_holdout": self.remembers,
            "shaped": shaped["score"],
            "recovered": whole["score"],
            "purified": pure["score"],
            "retrained": final["score"],
            "purify": pure["report"],
            "recalibrated": {"shape": shaped["recalibrated"], "purify": pure["recalibrated"]},
            "extra_epochs": early + late,
            "densities": [asdict(row) for row in self.run.densities()],
            "purification_undone": undone,
        }
        return Outcome(self.original, Drop(*final["drop"]), facts)

    # -- the phases --------------------------------------------------------------------------------

    def _shape(self) -> dict[str, Any]:
        self._fit("shape", self.job.shaping)
        self.run.finish()
        return self._state(recalibrated=self._recalibrate())

    def _purify(self) -> dict[str, Any]:
        """Spend what is left of the allowance; where shaping has spent it all, remove nothing more."""
        left = self.job.max_drop - self._drop().bound
        report: dict[str, Any] = {}
        if left > 0:
            tried = Tried("purify", shown=self.job.work.team.leads)

            def careful() -> float:
                found = self._drop()
                tried.one(f"holdout lost {found}  density {self.run.density():.4f}")
                return 100.0 - found.bound

            report = asdict(purify(self.run, careful, left))
            tried.end(f"removed {sum(report['removed'].values()):,} weights, density {self.run.density():.4f}")
        return self._state(report=report, recalibrated=bool(report) and self._recalibrate())

    def _retrain(self, phase: str, epochs: int) -> dict[str, Any]:
        """In the frozen plan; before purification, so that its thresholds are set by a network that works."""
        self._fit(phase, epochs)
        return self._state()

    def _settle(self, whole: dict[str, Any], epochs: int, rounds: int) -> tuple[dict[str, Any], int, bool]:
        """Retrain until the allowance is met, or undo the purification; returns the state chosen.

        The first time it always runs, the second where loss plus error is above the allowance, the third where the loss
        itself is. If it still is then, the network before purification is retrained and is chosen, where it is better.
        """
        tries = [self._do("retrain", lambda: self._retrain("retrain", epochs))]
        extra, epochs_more = 0, max(1, epochs)
        for k in range(rounds):
            found = Drop(*tries[-1]["drop"])
            if (found.points if k else found.bound) <= self.job.max_drop or not self.job.epochs:
                break
            name = f"retrain{k + 2}"
            tries.append(self._do(name, partial(self._retrain, name, epochs_more)))
            extra += epochs_more
        purified = any(state["nonzero"] < whole["nonzero"] for state in tries)
        if purified and min(Drop(*state["drop"]).points for state in tries) > self.job.max_drop:
            self._restore(whole)
            tries.append(self._do("undo", lambda: self._retrain("undo", epochs_more)))
            extra += epochs_more
        best = min(range(len(tries)), key=lambda k: self._worth(tries[k], k))
        self._restore(tries[best])
        return tries[best], extra, tries[best]["nonzero"] > tries[0]["nonzero"]

    def _worth(self, state: dict[str, Any], place: int) -> tuple[int, float, float, int]:
        """What to choose: surely allowed, allowed, close; among those the smallest, the best, the first."""
        found = Drop(*state["drop"])
        rank = 0 if found.bound <= self.job.max_drop else 1 if found.points <= self.job.max_drop else 2
        return rank, found.points if rank == 2 else state["nonzero"], found.points, place

    # -- what they are made of ---------------------------------------------------------------------

    def _drop(self) -> Drop:
        return drop(self.right, correct(self.network, self.job.data.holdout))

    def _recalibrate(self) -> bool:
        return recalibrate_if_better(self.network, self.job.data.train, self.job.data.holdout, seed=self.job.seed)

    def _do(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a phase, or take what it left; either way network and run stand where it ended."""
        state = self.job.work.phase(name, work)
        self._restore(state)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        try:
            self.run.load_state_dict(state["run"])
        except MethodError as error:
            raise MethodError(
                f"{self.job.work.path} cannot be resumed: {error}. Its files, or the version of Espalier that chooses, "
                "have changed since: choose another --out to begin anew (with --plan FILE to fix the plan)"
            ) from error

    def _fit(self, phase: str, epochs: int) -> None:
        self.job.train(phase, epochs, self.run, self.original)

    def _state(self, **extra: Any) -> dict[str, Any]:
        found = self._drop()
        return {
            "model": self.network.state_dict(),
            "run": self.run.state_dict(),
            "score": 100 * float(self.right.float().mean()) - found.points,
            "drop": [found.points, found.error, found.n],
            "nonzero": sum(int(mask.sum()) for mask in self.run.masks.values()),
            **extra,
        }
