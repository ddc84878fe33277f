"""Loader: the next step's batches for one rank, built ahead on a thread or in processes.

Every rank follows the same order of rows and builds its own share: row r of a step belongs to rank
r mod world size. Each step comes with the data state after it, so saving is writing that down.
A sample that cannot be read is left out of its row and reported with the step; the others stay in their places.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmseq.data.mixture import DataState, MixConfig, Mixture, RowOrder
from mmseq.data.moments import Sample
from mmseq.errors import MMSeqError
from mmseq.packing import Batch, collate
from mmseq.sequence import TokenSequence, void_sequence
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.signals import ASKED


@dataclass
class StepData:
    """batches: of this rank, one a pass through the model. state: of the data after this step. samples: of all ranks.

    bad: samples of this rank that could not be read, with the reason.
    """

    batches: list[Batch]
    state: DataState
    samples: list[Sample]
    used_tokens: int
    slot_tokens: int
    bad: list[tuple[Sample, str]] = field(default_factory=list)


@dataclass
class _Built:
    """The batch of one pass, and what could not be read."""

    batch: Batch
    bad: list[tuple[Sample, str]]


def build_batch(mixture: Mixture, rows: list[list[Sample]]) -> _Built:
    sequences: list[TokenSequence] = []
    tasks, bad = [], []
    for row in rows:
        for sample in row:
            try:
                sequences.append(mixture.build(sample))
                tasks.append(sample.task)
            except MMSeqError as error:
                bad.append((sample, str(error)))
    vocabulary = mixture.tokenizers.vocabulary
    if not sequences:  # every sample of the pass is bad: the rank still takes part in the step
        sequences, tasks = [void_sequence(mixture.builder)], [0]
    return _Built(collate(sequences, vocabulary, tasks=tasks, pad_to=mixture.row_tokens * len(rows)), bad)


def steps(
    mixture: Mixture,
    state: DataState,
    *,
    rows_per_step: int,
    rows_per_pass: int,
    rank: int,
    world: int,
    prefetch: int,
    workers: int = 0,
) -> Iterator[StepData]:
    """Steps for ever, from `state` on. They are the same for every `prefetch` and number of `workers`."""
    order = RowOrder(mixture, state)
    pool = _processes(mixture, workers) if workers else ThreadPoolExecutor(1, thread_name_prefix="builder")
    build = _build_in_worker if workers else lambda rows: build_batch(mixture, rows)

    def prepare() -> tuple[list[list[Sample]], DataState, list[Future[Any]]]:
        rows = order.take(rows_per_step)
        mine = rows[rank::world]
        portions = [mine[i : i + rows_per_pass] for i in range(0, len(mine), rows_per_pass)]
        return rows, order.state, [pool.submit(build, p) for p in portions]

    def finish(prepared: Future[tuple[list[list[Sample]], DataState, list[Future[Any]]]]) -> StepData:
        rows, after, futures = prepared.result()
        built: list[_Built] = [pickle.loads(f.result()) if workers else f.result() for f in futures]
        return StepData(
            [b.batch for b in built],
            after,
            [s for row in rows for s in row],
            sum(b.batch.used_tokens for b in built),
            mixture.row_tokens * len(rows[rank::world]),
            [bad for b in built for bad in b.bad],
        )

    # a thread of its own for the order: packing a block then delays no step that is already prepared
    ordering = ThreadPoolExecutor(1, thread_name_prefix="order")
    finishing = ThreadPoolExecutor(1, thread_name_prefix="finish")
    ahead = deque(finishing.submit(finish, ordering.submit(prepare)) for _ in range(prefetch))
    try:
        while True:
            ahead.append(finishing.submit(finish, ordering.submit(prepare)))
            yield ahead.popleft().result()
    finally:
        for executor in (ordering, pool, finishing):
            executor.shutdown(wait=False, cancel_futures=True)


_mixture: Mixture | None = None  # of a worker process


def _processes(mixture: Mixture, workers: int) -> Executor:
    # spawned, not forked: the parent has threads (torch, gloo) that a fork would leave in any state
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(mixture.mix, mixture.tokens, mixture.tokenizers, mixture.row_tokens, mixture.seed),
    )


def _start_worker(mix: MixConfig, tokens: Path, tokenizers: Tokenizers, row_tokens: int, seed: int) -> None:
    global _mixture
    for number in (signal.SIGINT, *ASKED):  # meant for the rank, which still needs what is being built
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _mixture = Mixture(mix, tokens, tokenizers, row_tokens=row_tokens, seed=seed)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build_in_worker(rows: list[list[Sample]]) -> bytes:
    assert _mixture is not None
    # as bytes, or each tensor would be a file in shared memory
    return pickle.dumps(build_batch(_mixture, rows))
