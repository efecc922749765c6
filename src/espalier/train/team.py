"""The processes that share a training. The only file that knows lightning-fabric."""

from __future__ import annotations

import atexit
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, MissingExtraError, TrainingError

T = TypeVar("T")
AGREE_EVERY = 8  # steps after which processes ask each other whether to save or to stop


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and how.

    devices: processes on each node. num_nodes: machines. accelerator: as lightning-fabric says it: auto, cpu, cuda.
    strategy: "ddp" (every process holds everything), "fsdp" (optimizer states and gradients are shared out; each
        process also keeps one whole copy of the weights, on which the method works), "auto" for ddp where there is
        more than one.

    >>> Processes(devices=8, num_nodes=2).world
    16
    """

    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        if self.devices < 1 or self.num_nodes < 1:
            raise TrainingError(f"{self.devices} devices on {self.num_nodes} nodes: expected one or more of each")
        if self.strategy not in ("auto", "ddp", "fsdp"):
            raise TrainingError(f"strategy is {self.strategy!r}, expected auto, ddp or fsdp")

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes


class Team:
    """This process and those beside it. Alone, everything is what it would be without a team.

    >>> team = Team.alone()
    >>> team.first(lambda: 3), team.leads
    (3, True)
    """

    def __init__(self, fabric: Any, processes: Processes) -> None:
        self.fabric, self.processes = fabric, processes
        self._busy = False

    @classmethod
    def alone(cls) -> Team:
        """A team of one that cannot train: for what only reads and writes."""
        return cls(None, Processes())

    @property
    def world(self) -> int:
        """How many processes there are."""
        return 1 if self.fabric is None else int(self.fabric.world_size)

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        return 0 if self.fabric is None else int(self.fabric.global_rank)

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether the weights are shared out over the processes."""
        return self.processes.strategy == "fsdp"

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first process, handed to all; an error of ours there is an error on all.

        `work` must not ask for the team again: the others would take that answer for this one.
        """
        assert not self._busy, "Team.first inside Team.first"
        box: Any = None
        if self.leads:
            self._busy = True
            try:
                box = (work(), "")
            except EspalierError as error:
                if self.world > 1:
                    self.fabric.broadcast((None, str(error)))
                raise
            finally:
                self._busy = False
        if self.world == 1:
            return box[0]
        value, told = self.fabric.broadcast(box)
        if told:
            raise TrainingError(f"on the first process: {told}")
        return value

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on any process."""
        if self.world == 1:
            return list(flags)
        counts = torch.tensor([float(flag) for flag in flags], device=self.fabric.device)
        return [bool(value > 0) for value in self.fabric.all_reduce(counts, reduce_op="sum")]

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """The sums over all processes."""
        if self.world == 1:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.fabric.device)
        return dict(zip(values, self.fabric.all_reduce(numbers, reduce_op="sum").tolist()))

    def average_norms(self, model: nn.Module) -> None:
        """Give every process the mean of the batch norms' running statistics, of which each has seen its own part."""
        if self.world == 1:
            return
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for statistic in (module.running_mean, module.running_var):
                        if isinstance(statistic, Tensor):
                            statistic.copy_(self.fabric.all_reduce(statistic.clone(), reduce_op="mean"))


def launch(processes: Processes, precision: str = "32-true") -> Team:
    """Start the other processes, unless they run already (torchrun, or an earlier launch), and meet them.

    Fabric starts each by the command line of this one, so everything before runs in all of them. Raises TrainingError
    for devices or a precision that this machine does not have, MissingExtraError without lightning-fabric.

    >>> launch(Processes(accelerator="cpu")).world
    1
    """
    try:
        from lightning_fabric import Fabric  # here: an optional extra that takes its time, which training alone needs
    except ImportError:
        raise MissingExtraError("lightning-fabric", "train") from None
    told = f"{processes.num_nodes} x {processes.devices} x {processes.accelerator} in {precision}"
    try:
        fabric: Any = Fabric(
            accelerator=processes.accelerator,
            devices=processes.devices,
            num_nodes=processes.num_nodes,
            strategy=_strategy(processes),
            precision=precision,  # type: ignore[arg-type]
        )
        fabric.launch()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise TrainingError(f"cannot train on {told}: {error}") from error
    if fabric.world_size > 1:
        atexit.register(_part)  # once is enough, more do no harm
    return Team(fabric, processes)


def _part() -> None:
    """Close the connections while Python still runs: gloo's threads may not outlive the interpreter."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _strategy(processes: Processes) -> Any:
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy  # here: as in `launch`

    if processes.strategy == "fsdp":
        return ModelParallelStrategy(_share_out, data_parallel_size=processes.world, tensor_parallel_size=1)
    if processes.strategy == "ddp" or processes.world > 1:
        known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        options: dict[str, Any] = {name: False}
        return DDPStrategy(**options)  # else every process would see only the first one's statistics
    return "auto"


def _share_out(model: nn.Module, mesh: Any) -> nn.Module:
    """The whole network as one unit: right for every network, also where a weight is used outside its module."""
    from torch.distributed.fsdp import fully_shard  # needs a build with torch.distributed

    fully_shard(model, mesh=mesh["data_parallel"])
    return model
