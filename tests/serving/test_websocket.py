"""Frames as they may come: large ones in place, all others as the library reads them."""

import os
import socket as sockets
import struct
import time

import numpy as np
import pytest

from mmseq.serving import codec
from mmseq.serving.websocket import LARGE, WebSocketProtocol, _header
from mmseq.testing.wire import ask, dial, http


@pytest.fixture
def server(start, policy):
    return start(policy)


def with_size(observation, size):
    """The observation as a message of at least `size` bytes."""
    return codec.pack({**observation, "options": {"step": 3, "more": np.arange(size, dtype=np.uint8)}})


def frame(data, *, opcode=2, fin=True, masked=True, first=0):
    mask = os.urandom(4) if masked else b""
    n = len(data)
    length = bytes([n]) if n < 126 else b"\x7e" + struct.pack("!H", n) if n < 65536 else b"\x7f" + struct.pack("!Q", n)
    if masked:
        data = bytes(np.frombuffer(data, np.uint8) ^ np.resize(np.frombuffer(mask, np.uint8), n)) if n else b""
    return (
        bytes([(0x80 if fin else 0) | opcode | first, length[0] | (0x80 if masked else 0)]) + length[1:] + mask + data
    )


class Raw:
    """A websocket by hand, so that every byte is ours."""

    def __init__(self, server):
        self.socket = sockets.create_connection(("127.0.0.1", server.port))
        self.socket.settimeout(10)
        lines = ["GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
        lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", ""]
        self.socket.sendall("\r\n".join(lines).encode())
        self.data = b""
        while b"\r\n\r\n" not in self.data:
            self.data += self.socket.recv(65536)
        self.data = self.data.partition(b"\r\n\r\n")[2]
        self.receive()

    def receive(self):
        """(opcode, payload) of the next frame; (8, b"") when the connection has ended."""
        while True:
            header = _header(self.data, 0)
            if header is not None and len(self.data) >= sum(header):
                size, length = header
                found = self.data[0] & 15, self.data[size : size + length]
                self.data = self.data[size + length :]
                return found
            more = self.socket.recv(65536)
            if not more:
                return 8, b""
            self.data += more

    def reply(self):
        opcode, data = self.receive()
        assert opcode == 2, data
        return codec.unpack(data)["step"]


@pytest.fixture
def raw(server):
    made = Raw(server)
    yield made
    made.socket.close()


@pytest.mark.parametrize("size", [0, LARGE - 2000, LARGE, 70_000, 1_000_003])
def test_every_size_arrives_whole(server, observation, size, policy):
    with dial(server) as s:
        s.recv()
        for _ in range(3):
            reply = ask(s, with_size(observation, size))
            np.testing.assert_array_equal(reply["actions"], policy.chunk(3, 8))


def test_large_frames_take_the_short_way(server, observation, monkeypatch):
    delivered = []
    deliver = WebSocketProtocol._deliver
    monkeypatch.setattr(WebSocketProtocol, "_deliver", lambda self: (delivered.append(1), deliver(self)))
    with dial(server) as s:
        s.recv()
        for size in (0, 30_000, 0, 1_000_003):
            ask(s, with_size(observation, size))
    assert len(delivered) == 2


def test_frames_in_pieces_of_any_size(raw, observation):
    data = frame(with_size(observation, 30_000))
    for piece in (1, 7, 13):
        for at in range(0, 39, piece):  # the header and a little more
            raw.socket.sendall(data[at : at + piece])
            time.sleep(0.001)
        raw.socket.sendall(data[at + piece :])
        assert raw.reply() == 3


def test_several_frames_at_once_with_pings_between(raw, observation):
    small, large = with_size(observation, 0), with_size(observation, 40_000)
    frames = [frame(small), frame(b"ping", opcode=9), frame(large), frame(b"", opcode=9), frame(large), frame(small)]
    raw.socket.sendall(b"".join(frames))
    found = [raw.receive() for _ in range(6)]
    assert [data for opcode, data in found if opcode == 10] == [b"ping", b""]
    assert [codec.unpack(data)["step"] for opcode, data in found if opcode == 2] == [3] * 4


def test_a_message_in_several_frames(raw, observation):
    data = with_size(observation, 100_000)
    parts = [data[:20_000], data[20_000:60_000], data[60_000:]]
    raw.socket.sendall(frame(parts[0], fin=False) + frame(b"", opcode=9))
    raw.socket.sendall(frame(parts[1], opcode=0, fin=False) + frame(parts[2], opcode=0))
    assert raw.receive()[0] == 10
    assert raw.reply() == 3


@pytest.mark.parametrize(
    "bad",
    [
        frame(b"\0" * 30_000, masked=False),
        frame(b"\0" * 30_000, first=0x40),
        frame(b"\0" * 30_000, opcode=3),
        frame(b"\0" * 30_000, opcode=0),
        frame(b"\0" * 200, opcode=9),
        b"\x82\xff" + struct.pack("!Q", 1 << 40) + b"mask",
        b"\x82\xff" + struct.pack("!Q", 1 << 63) + b"mask",
        frame(b"\0" * 20_000, fin=False) + frame(b"\0" * 20_000),
        frame(b"\0" * 30_000, opcode=1),
    ],
    ids=["unmasked", "reserved bit", "opcode", "continuation", "long ping", "too big", "huge", "interrupted", "text"],
)
def test_what_is_no_websocket_ends_the_connection_or_is_refused(server, raw, observation, bad):
    raw.socket.sendall(bad)
    opcode, data = raw.receive()
    assert opcode == 8 or b"malformed" in data
    with dial(server) as s:
        s.recv()
        assert ask(s, with_size(observation, 30_000))["step"] == 3
    assert http(server, "GET", "/healthz").status_code == 200
