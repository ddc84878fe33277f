"""One thread that runs the model, so that the event loop stays free for health checks and sockets."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mmseq.serving.errors import RequestError


class Worker:
    """Runs calls one after the other in a daemon thread: a model that hangs does not keep the process alive.

    max_waiting: calls that may wait; one more is refused with `busy` instead of growing the delay.
    """

    def __init__(self, max_waiting: int):
        self._calls: queue.Queue[tuple[Future, Callable[..., Any], tuple] | None] = queue.Queue()
        self._max_waiting = max_waiting
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="mmseq-inference", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._calls.qsize()

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        """Raises: RequestError `busy`."""
        if self.waiting >= self._max_waiting:
            raise RequestError("busy", f"{self.waiting} requests are waiting already", fix="ask less often")
        future: Future = Future()
        self._calls.put((future, call, arguments))
        return future

    def stop(self, timeout_s: float) -> bool:
        """Finish what is queued; False when that took longer than `timeout_s`."""
        if self._thread is None:
            return True
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call, arguments = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(*arguments))
            except BaseException as error:  # whatever the model raises belongs to the caller, not to this thread
                future.set_exception(error)
