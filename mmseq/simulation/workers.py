"""Workers: processes that simulate, each of which keeps the environment that it used last."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_environments: dict[Hashable, Any] = {}  # one: building it takes half a second


def environment(key: Hashable, make: Callable[[], Any]) -> Any:
    """This process's environment of a key, made where its last one is another."""
    if key not in _environments:
        for env in _environments.values():
            env.close()
        _environments.clear()
        _environments[key] = make()
    return _environments[key]


def run_jobs[T](
    work: Callable[[tuple], Sequence[T]],
    jobs: Sequence[tuple],
    workers: int,
    total: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[T]:
    """What `work` finds in each job, one by one, in order. workers: processes, which are spawned; 0 for none.

    on_progress: called with (what has come, total).
    """
    done = 0
    for found in _results(work, jobs, workers):
        for one in found:
            done += 1
            if on_progress is not None:
                on_progress(done, total)
            yield one


def _results[T](work: Callable[[tuple], T], jobs: Sequence[tuple], workers: int) -> Iterator[T]:
    if not workers:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("spawn")  # OpenGL does not survive a fork
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=start_worker) as pool:
        try:
            yield from pool.map(work, jobs)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """What a process does before it simulates."""
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer would start a thread per core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("mmseq_client").setLevel(logging.ERROR)  # each episode of the closed loop begins with a hold
