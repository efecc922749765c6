"""Cluster: trials of a search on the machines of a Ray cluster. The only file that knows Ray.

A trial whose worker or machine dies is done again elsewhere; results are written by the process that searches, so
none is lost with a worker. Every machine needs Espalier installed, and the data where the evaluation looks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from espalier.errors import MissingExtraError, TrainingError
from espalier.mapping.workers import Work, Workers

try:  # an optional extra
    import ray
except ImportError:
    ray = None  # type: ignore[assignment]

RETRIES = 5  # of a trial whose worker died


@final
@dataclass(frozen=True)
class Cluster(Workers):
    """The workers of a Ray cluster.

    address: of the cluster (``host:port``), "auto" for the one that this machine is part of, "local" to start one here.
    cpus: that one trial takes.

    >>> search(space, evaluate, "trials.jsonl", limit_ms=2.0, trials=64, workers=Cluster("auto"))
    """

    address: str = "auto"
    cpus: float = 1

    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Raises MissingExtraError without Ray, TrainingError where no cluster answers or a trial's workers all die."""
        if ray is None:
            raise MissingExtraError("ray", "cluster")
        if not ray.is_initialized():
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise TrainingError(
                    f"no Ray cluster answers at {self.address}: {error}. Start one: ray start --head"
                ) from error
        remote = ray.remote(num_cpus=self.cpus, max_retries=RETRIES)(work_on)
        shared = ray.put(work)
        waiting = {remote.remote(shared, job): index for index, job in enumerate(jobs)}
        while waiting:
            for done in ray.wait(list(waiting), num_returns=1)[0]:
                index = waiting.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise TrainingError(f"a trial's workers died {RETRIES + 1} times: {error}") from error
                yield index, result


def work_on(work: Work, job: Any) -> Any:
    """One trial, on the machine that it was sent to."""
    return work(job)
