"""Loader: the next step's batches for one rank, built ahead on a thread.

Every rank follows the same order of rows and builds its own share: row r of a step belongs to rank
r mod world size. Each step comes with the data state after it, so saving is writing that down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mmseq.data.mixture import DataState, Mixture, RowOrder, Sample
from mmseq.packing import Batch, collate


@dataclass
class StepData:
    """passes: the batches of this rank. state: of the data after this step. samples: of this rank."""

    passes: list[Batch]
    state: DataState
    samples: list[Sample]
    used_tokens: int
    slot_tokens: int


def build_step(
    mixture: Mixture, rows: list[list[Sample]], state: DataState, *, rank: int, world: int, rows_per_pass: int
) -> StepData:
    mine = rows[rank::world]
    passes = []
    for i in range(0, len(mine), rows_per_pass):
        chosen = [s for row in mine[i : i + rows_per_pass] for s in row]
        sequences = [mixture.build(s) for s in chosen]
        tasks = [s.task for s in chosen]
        size = mixture.row_tokens * len(mine[i : i + rows_per_pass])
        passes.append(collate(sequences, mixture.tokenizers.vocabulary, tasks=tasks, pad_to=size))
    used = sum(b.used_tokens for b in passes)
    return StepData(passes, state, [s for row in mine for s in row], used, mixture.row_tokens * len(mine))


def steps(
    mixture: Mixture, state: DataState, *, rows_per_step: int, rows_per_pass: int, rank: int, world: int, prefetch: int
) -> Iterator[StepData]:
    """Steps for ever, from `state` on."""
    order = RowOrder(mixture, state)
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        ahead: deque[Future[StepData]] = deque()

        def submit() -> None:
            # the order advances on the worker too: one thread, so submissions run in order
            def work() -> StepData:
                rows = order.take(rows_per_step)
                return build_step(mixture, rows, order.state, rank=rank, world=world, rows_per_pass=rows_per_pass)

            ahead.append(pool.submit(work))

        try:
            for _ in range(prefetch):
                submit()
            while True:
                submit()
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
