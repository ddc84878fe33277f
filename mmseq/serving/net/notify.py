"""systemd's notifications: ready, alive, stopping. Without systemd, which sets NOTIFY_SOCKET, nothing is sent.

The protocol is a datagram of `NAME=value` lines to a unix socket, see sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping

log = logging.getLogger("mmseq.serving")

SEND_S = 1.0  # that a full socket is waited for
LEAST_WATCHDOG_S = 0.1
_POLL_S = 0.2


class Notifier:
    """Tells systemd READY=1 once `not_ready` gives None, WATCHDOG=1 twice in each WATCHDOG_USEC while `healthy`,
    and STOPPING=1 at the end; from a thread of its own.
    """

    def __init__(
        self,
        not_ready: Callable[[], str | None],
        healthy: Callable[[], bool],
        environment: Mapping[str, str] = os.environ,
    ):
        self._not_ready, self._healthy = not_ready, healthy
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec = environment.get("WATCHDOG_USEC", "")
        own = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = int(usec) if own and re.fullmatch("[0-9]+", usec) else 0
        self.watchdog_s = max(usec / 1e6, LEAST_WATCHDOG_S) if usec else None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Notifier:
        if self._address:
            self._thread = threading.Thread(target=self._run, name="mmseq-notify", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join(1.0)
            self.send("STOPPING=1\nSTATUS=answering what is under way")

    def send(self, state: str) -> None:
        """A server goes on without systemd, so a socket that is gone or full is only logged."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.settimeout(SEND_S)
                out.connect(self._address)
                out.sendall(state.encode())
        except OSError as error:
            log.warning("cannot notify systemd at %r: %s", self._address, error)

    def _run(self) -> None:
        said = None
        while (reason := self._not_ready()) is not None:
            if reason != said:
                self.send(f"STATUS={reason}")
                said = reason
            if self._ended.wait(_POLL_S):
                return
        self.send("READY=1\nSTATUS=serving")
        while self.watchdog_s is not None:
            if self._healthy():
                self.send("WATCHDOG=1")
            if self._ended.wait(self.watchdog_s / 2):
                return
