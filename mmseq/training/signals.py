"""Signals: being asked to stop, by SLURM, Kubernetes or a person, and saving before the process ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

ASKED = (signal.SIGTERM, signal.SIGUSR1)  # SLURM sends the second ahead of the time limit when told to


class StopRequest:
    """While it is entered, SIGTERM and SIGUSR1 only set `asked`. A second one ends the process as ever."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python cannot take signals
            self._before = {number: signal.signal(number, self._ask) for number in ASKED}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
