"""Frames as they may come: large ones in place, all others as the library reads them."""

import socket
import struct
import time

import numpy as np
import pytest

from mmseq.serving import codec
from mmseq.serving.net import websocket
from mmseq.serving.net.websocket import LARGE, WebSocketProtocol
from support.wire import Raw, ask, dial, frame, http


@pytest.fixture
def server(start, policy):
    return start(policy)


def with_size(observation, size):
    """The observation as a message of at least `size` bytes."""
    return codec.pack({**observation, "options": {"step": 3, "more": np.arange(size, dtype=np.uint8)}})


@pytest.fixture
def raw(server):
    made = Raw(server)
    yield made
    made.socket.close()


@pytest.mark.parametrize("closed_by", ["server", "client"])
def test_a_connection_that_is_closed_ends(start, policy, observation, monkeypatch, closed_by):
    monkeypatch.setattr(websocket, "ABORT_S", 0.1)
    monkeypatch.setattr(policy, "infer", lambda observation: {})
    server = start(policy)
    raw = Raw(server)
    if closed_by == "server":
        raw.socket.sendall(frame(codec.pack(observation)))
        assert b"policy_failed" in raw.receive()[1]
        assert raw.receive()[0] == 8
    else:
        (held,) = server._uvicorn.server_state.connections
        held.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        monkeypatch.setattr(websocket, "CONTROLS", 1 << 30)
        while held.transport.get_write_buffer_size() < 65_536:  # it does not read the pongs
            raw.socket.sendall(50 * frame(bytes(125), opcode=9))
            time.sleep(0.005)
        raw.socket.sendall(frame(b"", opcode=8))
    until = time.monotonic() + 5
    while server._uvicorn.server_state.connections:
        assert time.monotonic() < until
        time.sleep(0.01)
    raw.socket.close()


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
        assert codec.unpack(raw.receive()[1])["step"] == 3


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
    assert codec.unpack(raw.receive()[1])["step"] == 3


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
