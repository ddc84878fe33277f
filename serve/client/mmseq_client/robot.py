"""What is driven, and how: a robot's four methods, what a control step did, pace, patience, and SIGTERM on the way."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable, Protocol

import numpy as np


class Robot(Protocol):
    """A robot, real or simulated. All four are called from the thread of the loop, and must not wait."""

    def contract(self) -> dict[str, Any]:
        """The embodiment as JSON: axes in order with units and limits, rate, cameras, gripper convention."""
        ...

    def observe(self) -> dict[str, Any]:
        """What is sensed now: `observation.images.<camera>` uint8 (H, W, 3), `observation.state` float32 (proprio,).

        Raises: NoObservationError while a sensor is silent.
        """
        ...

    def act(self, action: np.ndarray) -> None:
        """Command one control step, float32 (axes,), in the contract's order and units."""
        ...

    def stop(self) -> None:
        """Come to rest and stay there; called once, at the end and after any error."""
        ...


@dataclass(frozen=True)
class Tick:
    """What one control step did. action: commanded, float32 (axes,), None when nothing was (before the first
    action). held: no valid action was there. sequence, age_steps: of the chunk it comes from, and since its
    observation. asked: whether a chunk was asked for."""

    step: int
    action: np.ndarray | None
    held: bool
    asked: bool
    sequence: int | None = None
    age_steps: int | None = None


class Pace:
    """Notices a loop that cannot keep its rate: more than 5 % of the control steps of 2 s are skipped."""

    def __init__(self, rate_hz: float):
        self._rate_hz, self._quiet_until = rate_hz, -math.inf
        self._recent: deque[tuple[float, int]] = deque(maxlen=64)

    def skipped(self, now: float, steps: int) -> str | None:
        """Told when steps are skipped; what is to be said of it, every 30 s at most."""
        self._recent.append((now, steps))
        total = 2 * self._rate_hz
        recent = min(sum(count for at, count in self._recent if now - at <= 2), int(total))
        if recent <= max(2, 0.05 * total) or now < self._quiet_until:
            return None
        self._quiet_until = now + 30
        return (
            f"{recent} control steps of the last 2 s had no command: observe, act and whatever else runs between two "
            f"steps must take less than {1000 / self._rate_hz:g} ms together"
        )


class Steps:
    """Which control step it is, by a clock. Steps that a loop was late for are skipped, never made up for.

    step: the number of the one under way, -1 before the first. now: when it began, in seconds.
    """

    def __init__(self, rate_hz: float, clock: Callable[[], float]):
        self.rate_hz, self.clock = rate_hz, clock
        self.step, self.now, self._origin = -1, 0.0, 0.0

    def due(self) -> None:
        """The next step begins now."""
        self.now = self.clock()
        self._origin = self.now - (self.step + 1) / self.rate_hz

    def left_s(self) -> float:
        """Seconds until the next one."""
        return self._origin + (self.step + 1) / self.rate_hz - self.clock()

    def advance(self) -> tuple[int, float]:
        """On to the step that the clock says it is, at least the next. Returns: how many were skipped, and by how many
        seconds the clock went back."""
        now, back_s = self.clock(), 0.0
        if self.step >= 0:
            back_s = max(0.0, self.now - now)
        if self.step < 0 or back_s:
            self._origin = now - (self.step + 1) / self.rate_hz
        step = max(self.step + 1, self._at(now))
        skipped, self.step, self.now = step - self.step - 1, step, now
        return skipped, back_s

    def catch_up(self) -> int:
        """How many steps have passed meanwhile; the last of them is under way."""
        now = self.clock()
        passed = max(0, self._at(now) - self.step)
        if passed:
            self.step, self.now = self.step + passed, now
        return passed

    def _at(self, now: float) -> int:
        return int((now - self._origin) * self.rate_hz + 1e-6)


class Backoff:
    """Growing pauses between tries, with jitter, so that many robots do not come back at once."""

    FIRST_S, LONGEST_S, LONGEST_TOLD_S = 0.05, 2.0, 10.0

    def __init__(self, seed: int | None = None):
        self._random, self._next_s = random.Random(seed), self.FIRST_S

    def over(self) -> None:
        """It worked."""
        self._next_s = self.FIRST_S

    def pause_s(self, told_ms: float | None = None) -> float:
        """Until the next try, in seconds. told_ms: what the server says of it."""
        pause, self._next_s = self._next_s, min(self.LONGEST_S, 2 * self._next_s)
        if told_ms is not None:
            return min(self.LONGEST_TOLD_S, 0.001 * told_ms) * self._random.uniform(1.0, 1.25)
        return pause * self._random.uniform(0.5, 1.0)


@contextlib.contextmanager
def ended_by_sigterm(end: Callable[[], None]) -> Iterator[None]:
    """SIGTERM calls `end`; after the block it raises SystemExit(143), so `with` and `finally` run as after Ctrl-C.
    A second SIGTERM ends the process at once.

    Only on the main thread, and where nobody has installed a handler.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    came = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if came:
            raise SystemExit(128 + signal.SIGTERM)
