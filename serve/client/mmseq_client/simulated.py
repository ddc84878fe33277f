"""Simulated time for the control loop: the same code as on a robot, with delays of one's choice and no threads."""

from __future__ import annotations

import time
from typing import Any, Callable

from mmseq_client.errors import ClientError


class SimulatedClock:
    """Seconds that pass only when told. `sleep` of the loop."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SimulatedExecutor:
    """Runs each call at once and delivers its outcome after latency_s() of simulated time.

    timeout_s: a latency above it, such as `math.inf` for a reply that is lost, ends in a ClientError after it.
    busy_s: real seconds spent in calls.
    """

    def __init__(self, clock: Callable[[], float], latency_s: Callable[[], float], timeout_s: float = 1.0):
        self._clock, self._latency_s, self._timeout_s = clock, latency_s, timeout_s
        self.busy_s = 0.0

    def submit(self, call: Callable[..., Any], *arguments: Any) -> SimulatedJob:
        began, latency_s = time.perf_counter(), self._latency_s()
        value, error = None, None
        try:
            value = call(*arguments)
        except Exception as caught:
            error = caught
        self.busy_s += time.perf_counter() - began
        if latency_s > self._timeout_s:
            latency_s, error = self._timeout_s, ClientError(f"no reply within {self._timeout_s:.1f} s")
        return SimulatedJob(self._clock, self._clock() + latency_s, value, error)

    def shutdown(self) -> None:
        """Nothing runs."""


class SimulatedJob:
    """What `SimulatedExecutor.submit` returns, as far as the loop reads a `concurrent.futures.Future`."""

    def __init__(self, clock: Callable[[], float], ready_at: float, value: Any, error: Exception | None):
        self._clock, self._ready_at, self._value, self._error = clock, ready_at, value, error

    def done(self) -> bool:
        return self._clock() >= self._ready_at - 1e-9

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value
