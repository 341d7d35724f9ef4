"""Batches ahead of time: a planning thread in step order, and any number of reading threads behind it.

Threads suffice: reading is copying from mapped files, which happens outside Python's lock. Order and content do not
depend on their number, because each batch is a function of its plan, and plans are made in order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

P = TypeVar("P")
B = TypeVar("B")


class Prefetcher(Generic[P, B]):
    """Yields make(plan(0)), make(plan(1)), ... in order; `wait_s` is how long the last `next` waited.

    workers = 0 does everything in `next`; else `workers` threads keep `depth` batches ready.
    """

    def __init__(self, plan: Callable[[int], P], make: Callable[[P], B], *, workers: int, depth: int = 0) -> None:
        """Raises ValueError for a negative number of workers."""
        if workers < 0:
            raise ValueError(f"num_workers {workers}: must be 0 (read in the training process) or more")
        self._plan, self._make, self._depth = plan, make, max(depth, workers + 1)
        self._asked = 0
        self._ready: deque[tuple[Future[P], Future[B]]] = deque()
        self._planner = ThreadPoolExecutor(1, "data-plan") if workers else None
        self._readers = ThreadPoolExecutor(workers, "data-read") if workers else None
        self.wait_s = 0.0
        self._fill()

    def next(self) -> tuple[P, B]:
        """The next plan and batch. An error of a worker is raised here, and again at each later call."""
        started = time.perf_counter()
        if self._planner is None:
            plan = self._plan(self._asked)
            batch = self._make(plan)
            self._asked += 1
        else:
            planned, made = self._ready[0]
            plan, batch = planned.result(), made.result()
            self._ready.popleft()
            self._fill()
        self.wait_s = time.perf_counter() - started
        return plan, batch

    def close(self) -> None:
        """Stop the threads; batches made ahead are dropped. Safe to call twice."""
        for pool in (self._planner, self._readers):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._ready.clear()

    def _fill(self) -> None:
        if self._planner is None or self._readers is None:
            return
        while len(self._ready) < self._depth:
            planned = self._planner.submit(self._plan, self._asked)
            self._ready.append((planned, self._readers.submit(self._make_from, planned)))
            self._asked += 1

    def _make_from(self, planned: Future[P]) -> B:
        return self._make(planned.result())
