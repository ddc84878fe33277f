"""uvicorn's websocket with one difference: large messages are received in place.

An observation is half a megabyte of pixels. The library appends each piece that the socket gives to a buffer, cuts the
message out of it and unmasks that into another; here the pieces go where the message will be, and are unmasked there.
That is half of a round trip with three cameras (`mmseq bench serve`). Every other frame, and every frame that is not
as it should be, goes to the library untouched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

LARGE = 16_384  # bytes from which a frame is worth it
IN_PLACE = 4 << 20  # and up to which: the room is taken before the bytes have come
SCRATCH = 65_536
_WHOLE_BINARY = 0x82  # the first byte of a message in one frame
_MASKED = 0x80


class WebSocketProtocol(WebSocketsSansIOProtocol, asyncio.BufferedProtocol):
    """One connection. `scope["mmseq.connection"]` of the application is this object.

    on_lost: called once when the connection is gone, also while the application awaits something else.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.on_lost: Callable[[], None] | None = None
        self._scratch = bytearray(SCRATCH)
        self._head = b""  # of a frame whose header is not complete yet
        self._passing = 0  # bytes of a frame that the library still gets
        self._body: bytearray | None = None
        self._filled = 0
        self._mask = b""

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if self.handshake_initiated and not self.handshake_complete:
            self.scope["mmseq.connection"] = self  # type: ignore[typeddict-unknown-key]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._body = None
        if self.on_lost is not None:
            self.on_lost()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._body is not None:
            return memoryview(self._body)[self._filled :]
        return memoryview(self._scratch)

    def buffer_updated(self, nbytes: int) -> None:
        if self._body is None:
            self._split(bytes(memoryview(self._scratch)[:nbytes]))
            return
        self._filled += nbytes
        if self._filled == len(self._body):
            self._deliver()

    def _split(self, data: bytes) -> None:
        """Give `data` frame by frame to where it belongs."""
        data, self._head = self._head + data, b""
        at = 0
        while at < len(data):
            if self._passing:
                part = data[at : at + self._passing]
                self._passing -= len(part)
                at += len(part)
                self.data_received(part)
                continue
            header = _header(data, at)
            if header is None:
                self._head = data[at:]
                return
            size, length = header
            if not self._receives(data[at], data[at + 1], length):
                self._passing = size + length
                continue
            self._mask = data[at + size - 4 : at + size]
            part = data[at + size : at + size + length]
            at += size + len(part)
            self._body, self._filled = bytearray(length), len(part)
            self._body[: len(part)] = part
            if self._filled == length:
                self._deliver()

    def _receives(self, first: int, second: int, length: int) -> bool:
        return (
            first == _WHOLE_BINARY
            and bool(second & _MASKED)
            and LARGE <= length <= min(self.config.ws_max_size or 0, IN_PLACE)
            and self.handshake_complete
            and not self.close_sent
            and not self.frames  # a message in several frames is under way
            and self.conn.state is State.OPEN
        )

    def _deliver(self) -> None:
        body, self._body = self._body, None
        assert body is not None
        values, mask = np.frombuffer(body, np.uint8), np.frombuffer(self._mask, np.uint8)
        whole = len(values) // 4 * 4
        words = values[:whole].view(np.uint32)
        words ^= mask.view(np.uint32)
        values[whole:] ^= mask[: len(values) - whole]
        self.curr_msg_data_type, self.frames = "bytes", [body]  # type: ignore[list-item]
        self.send_receive_event_to_app()


def _header(data: bytes, at: int) -> tuple[int, int] | None:
    """Sizes in bytes of a frame's header and of what it announces; None when the header is cut off."""
    if len(data) < at + 2:
        return None
    length, extended = data[at + 1] & 0x7F, 0
    if length >= 126:
        extended = 2 if length == 126 else 8
    size = 2 + extended + (4 if data[at + 1] & _MASKED else 0)
    if len(data) < at + size:
        return None
    return size, int.from_bytes(data[at + 2 : at + 2 + extended], "big") if extended else length
