"""uvicorn's websocket with one difference: large messages are received in place.

An observation is half a megabyte of pixels. The library appends each piece that the socket gives to a buffer, cuts the
message out of it and unmasks that into another; here the pieces go where the message will be, and are unmasked there.
That is half of a round trip with three cameras (`mmseq bench serve`). Every other frame, and every frame that is not
as it should be, goes to the library untouched.

One connection must not take the others' time or memory: frames are handled a few in a turn of the loop, none while a
message waits for the application, and memory grows with what has come, not with what was announced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

LARGE = 16_384  # bytes from which a frame is worth it
IN_PLACE = 4 << 20  # and up to which
SCRATCH = 65_536
FRAMES = 16  # handled in one turn of the loop
CONTROLS = 100  # pings, pongs and closes that are accepted in a second
ABORT_S = 2.0  # within which a client reads why its connection ends
_WHOLE_BINARY = 0x82  # the first byte of a message in one frame
_MASKED = 0x80
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class WebSocketProtocol(WebSocketsSansIOProtocol, asyncio.BufferedProtocol):
    """One connection. `scope["mmseq.connection"]` of the application is this object.

    on_lost: called once when the connection is gone, also while the application awaits something else.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.on_lost: Callable[[], None] | None = None
        self._scratch = bytearray(SCRATCH)
        self._rest = b""  # what has come and is not handled yet
        self._turn = False  # whether it is handled in the next turn of the loop
        self._passing = 0  # bytes of a frame that the library still gets
        self._body: bytearray | None = None  # room for a part of the frame, in the end for all of it
        self._filled, self._length = 0, 0
        self._usual = SCRATCH  # bytes for which room is taken at once: this client has sent as many before
        self._mask = b""
        self._second, self._controls = 0.0, 0

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if self.handshake_initiated and not self.handshake_complete:
            self.scope["mmseq.connection"] = self  # type: ignore[typeddict-unknown-key]

    def refuse_head(self) -> None:
        """Answer a head that is no websocket's, or too long for one; uvicorn would neither answer nor close."""
        self.transport.write(b"".join(self.conn.data_to_send()) or BAD_REQUEST)
        self.transport.close()
        self.handshake_complete = self.close_sent = True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._body, self._rest = None, b""
        if self.on_lost is not None:
            self.on_lost()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._body is not None:
            return memoryview(self._body)[self._filled :]
        return memoryview(self._scratch)

    def buffer_updated(self, nbytes: int) -> None:
        if self._body is None:
            self._rest += bytes(memoryview(self._scratch)[:nbytes])
            self._split()
            return
        self._filled += nbytes
        if self._filled == self._length:
            self._deliver()
        elif self._filled == len(self._body):
            self._body = _grown(self._body, min(2 * self._filled, self._length))

    async def receive(self) -> Any:
        message = await super().receive()
        if self._rest and not self._turn:
            self._split()
        return message

    def _go_on(self) -> None:
        self._turn = False
        self._split()
        if not self._turn and not self.read_paused:
            self.transport.resume_reading()

    def _split(self) -> None:
        """Give what has come frame by frame to where it belongs, as far as it is its turn."""
        data, self._rest = self._rest, b""
        at = handled = 0
        while at < len(data):
            if self.read_paused or handled == FRAMES:
                self._rest = data[at:]
                self.transport.pause_reading()
                if not self.read_paused and not self._turn:  # else `receive` goes on
                    self._turn = True
                    self.loop.call_soon(self._go_on)
                return
            if self._passing:
                part = data[at : at + self._passing]
                self._passing -= len(part)
                at += len(part)
                self.data_received(part)
                continue
            header = _header(data, at)
            if header is None:
                self._rest = data[at:]
                return
            handled += 1
            if data[at] & 8 and self._floods():
                return
            size, length = header
            if not self._receives(data[at], data[at + 1], length):
                self._passing = size + length
                continue
            self._mask = data[at + size - 4 : at + size]
            part = data[at + size : at + size + length]
            at += size + len(part)
            self._body = _grown(part, min(length, max(self._usual, 2 * len(part))))
            self._filled, self._length = len(part), length
            if self._filled == length:
                self._deliver()

    def _floods(self) -> bool:
        """Count a control frame; whether there are too many, in which case the connection has been closed."""
        now = self.loop.time()
        if now - self._second > 1:
            self._second, self._controls = now, 0
        self._controls += 1
        if self._controls <= CONTROLS:
            return False
        if self.conn.state is State.OPEN:
            self.conn.fail(1008, f"more than {CONTROLS} pings in a second")
            self.handle_parser_exception()
        else:
            self.transport.abort()
        return True

    def _abort_soon(self) -> None:
        """The connection is closed, but its peer may neither read what it is told nor close."""
        self.loop.call_later(ABORT_S, self.transport.abort)

    def handle_parser_exception(self) -> None:
        super().handle_parser_exception()
        self._abort_soon()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._abort_soon()

    def handle_close(self, event: Any) -> None:
        super().handle_close(event)
        self._abort_soon()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.close":
            self._abort_soon()

    def handle_text(self, event: Any) -> None:
        self._begin("text", event)

    def handle_bytes(self, event: Any) -> None:
        self._begin("bytes", event)

    def _begin(self, kind: Any, event: Any) -> None:
        self.curr_msg_data_type = kind
        self.frames = [event.data if event.fin else bytearray(event.data)]  # type: ignore[list-item]
        if event.fin:
            self.send_receive_event_to_app()

    def handle_cont(self, event: Any) -> None:
        """Joined as they come: a fragment of two bytes is an object of a hundred."""
        self.frames[0] += event.data
        if event.fin:
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                self.frames[0].decode()
            except UnicodeDecodeError:
                self.frames = []
                self.conn.fail(1007, "the text is not UTF-8")
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

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
        self._usual = self._length + self._length // 4  # the next may be a little longer
        values, mask = np.frombuffer(body, np.uint8), np.frombuffer(self._mask, np.uint8)
        whole = len(values) // 4 * 4
        words = values[:whole].view(np.uint32)
        words ^= mask.view(np.uint32)
        values[whole:] ^= mask[: len(values) - whole]
        self.curr_msg_data_type, self.frames = "bytes", [body]  # type: ignore[list-item]
        self.send_receive_event_to_app()


def _grown(part: bytes | bytearray, room: int) -> bytearray:
    """Room for `room` bytes that begins with `part`."""
    grown = bytearray(room)
    grown[: len(part)] = part
    return grown


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
