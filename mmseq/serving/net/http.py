"""uvicorn's HTTP with one difference: a connection that sends no whole request, or reads no answer, is closed.

Anybody who reaches the port can open connections, without a token, and each holds a file descriptor. uvicorn waits
for the head of a request, and for answers to be read, without end. It is h11 also where httptools is installed: h11
bounds the size of that head.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0  # a connection without a request under way, or that reads nothing, lives between one and two of them


class HttpProtocol(H11Protocol):
    """One connection, until it becomes a websocket."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again()

    def _look_again(self) -> None:
        self._look = self.loop.call_later(HEAD_S, self._close_if_silent, self._stands_at())

    def _stands_at(self) -> tuple[Any, int] | None:
        """The last request, if any, and the bytes of answers that the peer leaves; None while one is answered."""
        waits = self.cycle is None or self.cycle.response_complete or self.flow.write_paused
        return (self.cycle, self.transport.get_write_buffer_size()) if waits else None

    def _close_if_silent(self, before: tuple[Any, int] | None) -> None:
        if self.transport.get_protocol() is not self:  # a websocket by now
            return
        if before is None or before != self._stands_at():
            self._look_again()
        elif before[1]:
            self.transport.abort()  # `close` would wait until all is read
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Of a request that turns out to be none while it is answered, one of the two answers is sent."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True
        super().send_400_response(msg)

    def handle_websocket_upgrade(self, event: Any) -> None:
        super().handle_websocket_upgrade(event)
        upgraded = self.transport.get_protocol()
        if upgraded.conn.handshake_exc is not None and not upgraded.handshake_initiated:  # type: ignore[union-attr]
            upgraded.refuse_head()  # type: ignore[union-attr]

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)
