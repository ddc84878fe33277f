"""What one connection may take of the others' time and of memory."""

import logging
import socket
import struct
import time
import tracemalloc

import pytest

from mmseq.errors import ServeError
from mmseq.serving import ServerConfig, codec
from mmseq.serving.net.websocket import CONTROLS, FRAMES, IN_PLACE, WebSocketProtocol
from support.wire import UPGRADE, Raw, ask, dial, frame


@pytest.fixture
def server(start, policy):
    return start(policy)


@pytest.fixture
def raw(server):
    made = Raw(server)
    yield made
    made.socket.close()


def closed_with(raw):
    """The close code; None when the connection was reset, as unread bytes make it."""
    try:
        while (found := raw.receive())[0] != 8:
            pass
    except OSError:
        return None
    return struct.unpack("!H", found[1][:2])[0] if found[1] else None


def traced(server, growth, until):
    """Bytes that are allocated after `growth()` and were not before, once `until()` is true."""
    tracemalloc.start()
    try:
        growth()
        deadline = time.monotonic() + 10
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def connections(server):
    return [each for each in server._uvicorn.server_state.connections if isinstance(each, WebSocketProtocol)]


def test_memory_follows_what_has_come_not_what_was_announced(server):
    robots = [Raw(server) for _ in range(10)]
    announced = frame(bytes(IN_PLACE))[:20]
    taken = traced(
        server,
        lambda: [robot.socket.sendall(announced) for robot in robots],
        lambda: all(each._body is not None for each in connections(server)),
    )
    assert taken < 10 * 200_000
    for robot in robots:
        robot.socket.close()


def test_fragments_are_joined_as_they_come(server, raw):
    count = 20_000
    fragments = frame(b"ab", fin=False) + frame(b"ab", opcode=0, fin=False) * (count - 1)
    arrived = lambda: connections(server)[0].frames and len(connections(server)[0].frames[0]) == 2 * count
    assert traced(server, lambda: raw.socket.sendall(fragments), arrived) < 1_000_000
    raw.socket.sendall(frame(b"", opcode=0))
    opcode, data = raw.receive()
    assert (opcode, b"malformed" in data) == (1, True)


def test_few_frames_are_handled_in_a_turn_of_the_loop(server, raw, monkeypatch):
    turn, handled = [0], {}

    def tick():
        turn[0] += 1
        server._loop.call_soon(tick)

    def count(self, event, before=WebSocketProtocol.handle_cont):
        handled[turn[0]] = handled.get(turn[0], 0) + 1
        before(self, event)

    monkeypatch.setattr(WebSocketProtocol, "handle_cont", count)
    server._loop.call_soon_threadsafe(tick)
    raw.socket.sendall(frame(b"", fin=False) + frame(b"", opcode=0, fin=False) * 3000 + frame(b"", opcode=0))
    assert b"malformed" in raw.receive()[1]
    assert sum(handled.values()) == 3001
    assert max(handled.values()) <= FRAMES


def test_one_message_waits_for_the_application(server, raw, monkeypatch):
    waiting = []

    def count(self, before=WebSocketProtocol.send_receive_event_to_app):
        before(self)
        waiting.append(self.queue.qsize())

    monkeypatch.setattr(WebSocketProtocol, "send_receive_event_to_app", count)
    for opcode in (1, 2):
        raw.socket.sendall(frame(b"x", opcode=opcode) * 500)
        for _ in range(500):
            assert b"malformed" in raw.receive()[1]
    assert (len(waiting), max(waiting)) == (1000, 1)


@pytest.mark.parametrize("opcode", [9, 10], ids=["ping", "pong"])
def test_a_flood_of_pings_ends_the_connection(server, raw, observation, opcode):
    raw.socket.sendall(frame(b"", opcode=opcode) * CONTROLS)
    raw.socket.sendall(frame(codec.pack(observation)))
    while (found := raw.receive())[0] == 10:
        pass
    assert "actions" in codec.unpack(found[1])
    raw.socket.sendall(frame(b"", opcode=opcode) * 50 * CONTROLS)
    assert closed_with(raw) in (1008, None)
    with dial(server) as robot:
        robot.recv()
        assert "actions" in ask(robot, observation)


def test_text_that_is_none_is_not_logged(server, raw, caplog):
    with caplog.at_level(logging.INFO):
        raw.socket.sendall(frame(b"\xff\xfe", opcode=1))
        assert closed_with(raw) == 1007
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (UPGRADE + b"X: " + b"x" * 9000, "431"),
        (UPGRADE + b"".join(b"X%d: x\r\n" % i for i in range(200))[:-2], "431"),
        (UPGRADE.replace(b"GET", b"POST") + b"X: x", "400 405"),  # the library says which
    ],
    ids=["long header", "many headers", "POST"],
)
def test_a_head_that_no_websocket_has_is_answered(server, raw, head, status):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(65536).split()[1].decode() in status
        while connection.recv(65536):
            pass
    server.stop()
    assert closed_with(raw) == 1012


def test_a_token_that_no_head_can_carry_is_refused():
    assert ServerConfig(token="x" * 4096).token
    with pytest.raises(ServeError, match="4097"):
        ServerConfig(token="x" * 4097)
