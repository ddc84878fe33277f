"""Which request the model answers next, and with which others: earliest deadline first, in batches.

The queue belongs to the event loop and has no locks. The model runs in one thread, a batch at a time, so that the
loop stays free for health checks and sockets. A request waits at most until its deadline; one more than `max_waiting`
is refused at once, with the time after which the queue will have room.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmseq.errors import ConfigError
from mmseq.serving.errors import RequestError

ORDER_S = 1.0  # a request without a deadline stands in the queue as if it had this one
BACKGROUND_S = 10.0  # and one that no robot waits for


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How requests share the model."""

    max_waiting: int = 32  # requests that may wait for the model; one more is answered `busy` at once
    max_batch: int = 8  # requests of several robots that share a model call
    # how long an idle model waits for the requests of other robots; those that come while it computes share a batch
    # anyway
    batch_wait_ms: float = 0.0

    def __post_init__(self):
        for name, least in (("max_waiting", 1), ("max_batch", 1), ("batch_wait_ms", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"scheduling.{name} is {getattr(self, name)}", fix=f"use {least} or more")
        if not self.batch_wait_ms <= 60_000:
            raise ConfigError(f"scheduling.batch_wait_ms is {self.batch_wait_ms}", fix="use at most a minute")


@dataclass(eq=False, slots=True)
class Job:
    """One request. key: jobs with the same key may share a batch. Times are of the monotonic clock, in seconds.

    order: when its answer should be there. expires: when an answer is of no use any more. queued: whether it waits for
    the model. outcome: a result, or what it failed with. begun, ended: when the model began with its batch and ended
    it; batch: requests in it.
    """

    call: str
    arguments: tuple
    key: Hashable
    future: asyncio.Future
    arrived: float
    order: float
    expires: float | None = None
    background: bool = False
    queued: bool = False
    timer: asyncio.TimerHandle | None = None
    begun: float = 0.0
    ended: float = 0.0
    batch: int = 1
    outcome: Any = None


@dataclass
class SchedulerStats:
    """batch_s: how long a model call takes, an average that forgets. busy_since: of the call under way."""

    batches: int = 0
    batch_s: float = 0.0
    busy_since: float | None = None
    sizes: dict[int, int] = field(default_factory=dict)


def make_job(policy: Any, call: str, arguments: tuple, arrived: float, deadline_ms: float | None = None) -> Job:
    """A request of the event loop that runs now. deadline_ms: after its arrival, when nobody waits for it any more."""
    expires = None if deadline_ms is None else arrived + deadline_ms / 1000
    background, batch_key = call == "predict", getattr(policy, "batch_key", None)
    return Job(
        call=call,
        arguments=arguments,
        key=object() if background or batch_key is None else batch_key(arguments[0]),  # an object's own: alone
        future=asyncio.get_running_loop().create_future(),
        arrived=arrived,
        order=arrived + (BACKGROUND_S if background else ORDER_S) if expires is None else expires,
        expires=expires,
        background=background,
    )


class Scheduler:
    """run: answers a batch in the model's thread by setting `outcome` of each job.

    robots: how many there are; an idle model waits for no more of them than that.
    """

    def __init__(self, run: Callable[[Sequence[Job]], None], config: SchedulerConfig):
        self.config, self.stats = config, SchedulerStats()
        self._run = run
        self._heap: list[tuple[float, int, Job]] = []
        self._arrivals = itertools.count()
        self._calls: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, list[Job]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.waiting, self.robots = 0, config.max_batch

    def start(self, first: Callable[[], None] | None = None) -> None:
        """first: called in the model's thread before any job."""
        self._thread = threading.Thread(target=self._work, args=(first,), name="mmseq-inference", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread once it is idle; False when that took longer than `timeout_s`."""
        if self._thread is None:
            return True
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def busy_s(self) -> float:
        """How long the call under way has taken by now; 0 when the model is idle."""
        since = self.stats.busy_since
        return 0.0 if since is None else time.monotonic() - since

    def retry_after_ms(self) -> float:
        """An estimate of when one waiting request will have left the queue."""
        calls = math.ceil((self.waiting + 1) / self.config.max_batch)
        left = max(0.0, self.stats.batch_s - self.busy_s)
        return round(1000 * max(0.001, min(60.0, left + (calls - 1) * self.stats.batch_s)), 3)

    def submit(self, job: Job) -> None:
        """Raises: RequestError `busy`. Jobs in the background may fill half of the queue."""
        limit = self.config.max_waiting
        if self.waiting >= (max(1, limit // 2) if job.background else limit):
            raise RequestError(
                "busy",
                f"{self.waiting} requests are waiting already",
                fix="ask again later, or less often",
                retry_after_ms=self.retry_after_ms(),
            )
        if job.expires is not None:
            delay = max(0.0, job.expires - time.monotonic())
            job.timer = asyncio.get_running_loop().call_later(delay, self._expire, job)
        if len(self._heap) > 2 * limit:  # most of them cancelled while the model was busy
            self._heap = [item for item in self._heap if not item[2].future.done()]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (job.order, next(self._arrivals), job))
        job.queued = True
        self.waiting += 1
        if self.stats.busy_since is None:
            self._next()

    def cancel(self, job: Job, error: RequestError | None = None) -> None:
        """Take a waiting job out of the queue: its future is cancelled, or fails with `error`.

        What the model has begun is not stopped; its outcome is thrown away.
        """
        if job.queued:
            job.queued = False
            self.waiting -= 1
            job.arguments = ()  # half a megabyte, and it may stay in the heap for a while
            if job.timer is not None:
                job.timer.cancel()
        if job.future.done():  # such as cancelled with the task that waited for it
            return
        if error is None:
            job.future.cancel()
        else:
            job.future.set_exception(error)

    def _expire(self, job: Job) -> None:
        waited = 1000 * (time.monotonic() - job.arrived)
        self.cancel(job, RequestError("late", f"the deadline passed after {waited:.0f} ms in the queue"))

    def _useful(self, job: Job, now: float) -> bool:
        """Whether somebody still waits for it; fails a job whose deadline the timer is about to find."""
        if not job.future.done() and job.expires is not None and now >= job.expires:
            self._expire(job)
        return not job.future.done()

    def _next(self) -> None:
        """Hand the most urgent job and those that may go with it to the model."""
        now = time.monotonic()
        while self._heap and not self._useful(self._heap[0][2], now):
            heapq.heappop(self._heap)
        if not self._heap:
            return
        first = self._heap[0][2]
        wait_s = self.config.batch_wait_ms / 1000
        if wait_s and self.waiting < min(self.config.max_batch, self.robots):
            left = first.arrived + wait_s - now
            if left > 0:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(left, self._waited)
                return
        batch: list[Job] = []
        others: list[tuple[float, int, Job]] = []
        while self._heap and len(batch) < self.config.max_batch:
            item = heapq.heappop(self._heap)
            job = item[2]
            if not self._useful(job, now):
                continue
            if job.key == first.key:
                batch.append(job)
            else:
                others.append(item)
        for item in others:
            heapq.heappush(self._heap, item)
        self.waiting -= len(batch)
        self.stats.busy_since = now
        for job in batch:
            job.begun, job.batch, job.queued = now, len(batch), False
            if job.timer is not None:
                job.timer.cancel()
        self._calls.put((asyncio.get_running_loop(), batch))

    def _waited(self) -> None:
        self._timer = None
        if self.stats.busy_since is None:
            self._next()

    def _done(self, batch: list[Job]) -> None:
        stats, took = self.stats, batch[0].ended - batch[0].begun
        stats.batches += 1
        stats.batch_s = took if stats.batches == 1 else 0.8 * stats.batch_s + 0.2 * took
        stats.sizes[len(batch)] = stats.sizes.get(len(batch), 0) + 1
        stats.busy_since = None
        self._next()  # the model first: the answers can wait for the time that this takes
        for job in batch:
            if job.future.done():
                continue
            if isinstance(job.outcome, BaseException):
                job.future.set_exception(job.outcome)
            else:
                job.future.set_result(job.outcome)

    def _work(self, first: Callable[[], None] | None) -> None:
        if first is not None:
            first()
        while (item := self._calls.get()) is not None:
            loop, batch = item
            try:
                self._run(batch)
            except BaseException as error:  # whatever the model raises belongs to the callers, not to this thread
                for job in batch:
                    job.outcome = error
            ended = time.monotonic()
            for job in batch:
                job.ended = ended
            try:
                loop.call_soon_threadsafe(self._done, batch)
            except RuntimeError:  # the loop has ended; nobody waits any more
                return
