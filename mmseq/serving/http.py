"""uvicorn's HTTP with one difference: a connection that sends no whole request is closed.

Anybody who reaches the port can open connections, without a token, and each holds a file descriptor. uvicorn waits
for the head of a request without end. It is h11 also where httptools is installed: h11 bounds the size of that head.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0  # a connection without a request under way lives between one and two of them


class HttpProtocol(H11Protocol):
    """One connection, until it becomes a websocket."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again()

    def _look_again(self) -> None:
        self._look = self.loop.call_later(HEAD_S, self._close_if_silent, self._idle_after())

    def _idle_after(self) -> tuple[Any] | None:
        """The last request, or None in its place when there was none; not a tuple while one is under way."""
        return (self.cycle,) if self.cycle is None or self.cycle.response_complete else None

    def _close_if_silent(self, before: tuple[Any] | None) -> None:
        if self.transport.get_protocol() is not self:  # a websocket by now
            return
        if before is not None and before == self._idle_after():
            self.transport.close()
        else:
            self._look_again()

    def handle_websocket_upgrade(self, event: Any) -> None:
        super().handle_websocket_upgrade(event)
        upgraded = self.transport.get_protocol()
        if upgraded.conn.handshake_exc is not None and not upgraded.handshake_initiated:  # type: ignore[union-attr]
            upgraded.refuse_head()  # type: ignore[union-attr]

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)
