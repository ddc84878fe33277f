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
