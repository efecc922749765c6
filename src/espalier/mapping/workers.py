"""Workers: where the trials of a search run. A trial is work on a job; results come back as they end.

`Here` runs one after the other, `Processes` several at once on this machine; `cluster.Cluster` on several machines.
"""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, final

from espalier.errors import TrainingError

Work = Callable[[Any], Any]


class Workers(ABC):
    """Where jobs are worked. `work` and jobs must be picklable for all but `Here`."""

    @abstractmethod
    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(index of a job, its result) for every job, in the order in which they end. Raises what `work` raises."""


@final
class Here(Workers):
    """In this process, one after the other."""

    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for index, job in enumerate(jobs):
            yield index, work(job)


@final
class Processes(Workers):
    """In so many processes at once, which stay for the next jobs until `close` (or the end of a with block).

    When one dies, what it was at is done again by others, `tries` times at most.

    >>> with Processes(4) as workers:
    ...     search(space, score, "trials.jsonl", limit_ms=2.0, trials=64, workers=workers)
    """

    def __init__(self, count: int, tries: int = 3) -> None:
        self.count, self.tries = count, tries
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        left = set(range(len(jobs)))
        for _ in range(self.tries):
            for index, result in self._round(work, jobs, sorted(left)):
                left.discard(index)
                yield index, result
            if not left:
                return
        raise TrainingError(
            f"{len(left)} trials ended {self.tries} times with the process that ran them: it was killed, or ran out of "
            "memory. Use fewer workers; what was finished is kept"
        )

    def _round(self, work: Work, jobs: Sequence[Any], left: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """What ends before a process dies."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # forked threads of torch and the engine would hang
            self._pool = ProcessPoolExecutor(self.count, mp_context=context)
        waiting: dict[Future[Any], int] = {}
        try:
            for index in left:
                waiting[self._pool.submit(work, jobs[index])] = index
            while waiting:
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    index = waiting.pop(done)
                    yield index, done.result()
        except BrokenProcessPool:
            self.close()
        finally:
            for future in waiting:
                future.cancel()
