"""Connections that say nothing, say it slowly, or leave before their answer."""

import json
import resource
import select
import socket
import threading
import time
from urllib.request import Request, urlopen

import pytest
from mmseq_client.repeats import Repeats
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from mmseq.serving import ReplayPolicy, Server, ServerConfig, codec
from mmseq.serving.net import app, http, sockets

BODY = codec.pack({"arrow": "image -> action[2]", "observation": {}})
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: robot\r\n\r\n"


class Slow(ReplayPolicy):
    """A replay whose predictions wait until they may go on."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.entered, self.release = threading.Event(), threading.Event()

    def predict(self, arrow, observation):
        self.entered.set()
        assert self.release.wait(10)
        return super().predict(arrow, observation)


@pytest.fixture
def slow(episode, embodiment):
    policy = Slow(episode, embodiment, horizon=8, execute=4)
    yield policy
    policy.release.set()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(http, "HEAD_S", 0.15)
    monkeypatch.setattr(app, "BODY_S", 0.3)


def dial(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


@pytest.mark.parametrize("sent", [b"", b"G", REQUEST[:-2]])
def test_a_connection_without_a_request_is_closed(start, policy, quick, sent):
    server = start(policy)
    with dial(server) as connection:
        connection.sendall(sent)
        assert until_closed(connection) == b""


def test_a_head_that_trickles_is_closed(start, policy, quick):
    server, begun = start(policy), time.monotonic()
    with dial(server) as connection:
        connection.settimeout(0.02)
        closed = False
        while not closed and time.monotonic() - begun < 5:
            try:
                connection.sendall(b"G")
                closed = connection.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:  # reset
                closed = True
    assert closed


def test_a_connection_that_had_an_answer_may_not_trickle_either(start, policy, quick):
    server = start(policy)
    with dial(server) as connection:
        connection.sendall(REQUEST)
        received = b""
        while not received.endswith(b"\r\nOK\n"):
            received += connection.recv(65536)
        connection.sendall(b"GET ")
        assert until_closed(connection) == b""


def test_a_connection_lives_on_for_a_while_after_a_long_answer(start, slow, monkeypatch):
    monkeypatch.setattr(http, "HEAD_S", 0.4)
    server = start(slow)
    with dial(server) as connection:
        connection.sendall(post(BODY))
        assert slow.entered.wait(5)
        time.sleep(1.5 * http.HEAD_S)  # looked at once while it was under way; the next look comes soon after
        slow.release.set()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        time.sleep(0.6 * http.HEAD_S)
        connection.sendall(REQUEST)
        received = b""
        while not received.endswith(b"\r\nOK\n"):
            part = connection.recv(65536)
            assert part, received
            received += part


def test_an_endless_head_is_refused(start, policy):
    server = start(policy)
    with dial(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 70_000)
        assert until_closed(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("at_once", [1, 50], ids=["all answered", "under way"])
def test_a_connection_that_reads_no_answers_is_closed(start, policy, quick, at_once):
    server = start(policy)
    with dial(server) as connection:
        read_nothing(server, connection, at_once)
        wait_until(lambda: not server._uvicorn.server_state.connections)


def test_a_connection_that_reads_no_answers_is_no_news_when_the_server_stops(policy, caplog):
    server = Server(policy, ServerConfig(port=0, grace_s=0)).start()
    with dial(server) as connection:
        read_nothing(server, connection, 50)
        server.stop()
    assert not [record for record in caplog.records if record.exc_info]


def read_nothing(server, connection: socket.socket, at_once: int) -> None:
    """Ask for answers until they pile up in the server, which has one connection."""
    requests = at_once * REQUEST.replace(b"/healthz", b"/openapi.json")
    connection.sendall(requests)
    wait_until(lambda: server._uvicorn.server_state.connections)
    (held,) = server._uvicorn.server_state.connections
    held.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    while not left(held):
        connection.sendall(requests)
        time.sleep(0.005)
    assert server._uvicorn.server_state.connections


def test_a_slow_reader_gets_all_of_a_long_answer(start, episode, embodiment, quick):
    class Long(ReplayPolicy):
        def predict(self, arrow, observation):
            return {"text": "x" * 20_000_000}

    server = start(Long(episode, embodiment, horizon=8))
    received = 0
    with dial(server) as connection:
        connection.sendall(post(BODY))
        begun = time.monotonic()
        while time.monotonic() - begun < 6 * http.HEAD_S:
            received += len(connection.recv(300_000))
            time.sleep(0.02)
        (held,) = server._uvicorn.server_state.connections
        assert left(held)  # it has been looked at while there was more to read
        while received < 20_000_000:
            part = connection.recv(1 << 20)
            assert part, received
            received += len(part)


def left(connection) -> int:
    return connection.transport.get_write_buffer_size()


@pytest.mark.parametrize("late", [False, True])
def test_a_body_that_is_no_http_is_refused_once(start, policy, caplog, late):
    server = start(policy)
    for path in (b"/healthz", b"/v1/status"):
        with dial(server) as connection:
            head, body = b"GET %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % path, b"zz\r\n"
            if late:
                connection.sendall(head)
                assert connection.recv(1 << 20).startswith(b"HTTP/1.1 200 ")
            connection.sendall(body if late else head + body)
            received = until_closed(connection)
        assert received.startswith(b"HTTP/1.1 400 ") or late
        assert received.count(b"HTTP/1.1 ") == (not late)
    server.stop()
    assert not [record for record in caplog.records if record.exc_info]


def test_what_strangers_make_it_say_is_said_now_and_then(start, policy, caplog, monkeypatch):
    monkeypatch.setattr(app, "_told", Repeats())
    server = start(policy)
    upgrade = REQUEST[:-2] + b"Connection: upgrade\r\nUpgrade: x\r\n\r\n"

    def both() -> list[int]:
        for sent in (b"G\r\n\r\n", upgrade, upgrade):
            with dial(server) as connection:
                connection.sendall(sent)
                assert connection.recv(65536)
        return [sum(record.getMessage() == text for record in caplog.records) for text in app._STRANGERS]

    assert both() == both() == [1, 1]
    monkeypatch.setattr(app._told, "every_s", 0.0)
    assert both() == [2, 3]


def test_a_prediction_is_told_that_the_server_stops(slow, caplog):
    server = Server(slow, ServerConfig(port=0, grace_s=0)).start()
    with dial(server) as connection:
        connection.sendall(post(BODY))
        assert slow.entered.wait(5)
        server.stop()
        assert not server.ended
        reply = until_closed(connection)
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "stopping"
    assert not [record for record in caplog.records if record.exc_info]


def test_a_request_under_way_and_a_quiet_robot_are_left_alone(start, slow, observation, quick):
    server = start(slow)
    with connect(f"ws://127.0.0.1:{server.port}", compression=None, proxy=None) as robot, dial(server) as connection:
        robot.recv()
        connection.sendall(post(BODY))
        assert slow.entered.wait(5)
        time.sleep(4 * http.HEAD_S)
        slow.release.set()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        robot.send(codec.pack(observation))
        assert "actions" in codec.unpack(robot.recv(timeout=5))


def test_a_body_that_does_not_come_is_refused(start, policy, quick):
    server = start(policy)
    with dial(server) as connection:
        connection.sendall(post(BODY)[:-1])
        reply = until_closed(connection)
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "incomplete"


def test_large_bodies_have_room_together_and_an_operator_is_heard_without(start, policy, caplog):
    size = 300_000
    server = start(policy, limits=codec.Limits(max_message_bytes=size))
    sent = post(bytes(size))[:-1]
    slow = [dial(server) for _ in range(app.BODIES + 1)]
    try:
        for connection in slow:
            connection.sendall(sent)
        (refused,) = select.select(slow, [], [], 5)[0]
        reply = b""
        while not reply.endswith(b"}}"):
            part = refused.recv(65536)
            assert part, reply
            reply += part
        assert (reply.startswith(b"HTTP/1.1 503 "), b'"busy"' in reply) == (True, True)
        with urlopen(f"{server.url}/v1/hold", b"{}", timeout=5) as reply:
            assert json.load(reply)["held"]
        with urlopen(Request(f"{server.url}/v1/hold", method="DELETE"), timeout=5):
            pass
        slow.remove(refused)
        slow.pop().close()
        slow[0].sendall(sent[-1:])  # there is room again
        assert slow[0].recv(65536).startswith(b"HTTP/1.1 400 ")
        server.stop()  # while bodies are under way
        assert not [record for record in caplog.records if record.exc_info]
    finally:
        for connection in slow:
            connection.close()


def test_robots_fill_their_connections_and_an_operator_still_comes_in(start, policy):
    server = start(policy, max_connections=2)
    address = f"ws://127.0.0.1:{server.port}"
    with connect(address, proxy=None) as first, connect(address, proxy=None) as second:
        first.recv(), second.recv()
        with pytest.raises(InvalidStatus, match="503") as caught:
            connect(address, proxy=None)
        error = json.loads(caught.value.response.body)["error"]
        assert (error["code"], "max_connections" in error["message"]) == ("busy", True)
        with urlopen(f"{server.url}/v1/hold", b"{}", timeout=5) as reply:
            assert json.load(reply)["sessions"] == 2
        assert len(status(server)["sessions"]) == 2
    wait_for(server, sessions=[])
    with connect(address, proxy=None) as third:
        assert third.recv()


def test_a_peer_does_not_say_where_it_is(start, policy):
    server = start(policy)
    forged = {"X-Forwarded-For": "10.1.2.3"}
    with connect(f"ws://127.0.0.1:{server.port}", proxy=None, additional_headers=forged) as robot:
        robot.recv()
        assert status(server)["sessions"][0]["peer"].startswith("127.0.0.1:")


def test_an_answer_nobody_waits_for_leaves_the_queue(start, slow):
    server = start(slow)
    with dial(server) as first:
        first.sendall(post(BODY))
        assert slow.entered.wait(5)
        with dial(server) as second:
            second.sendall(post(BODY))
            wait_for(server, waiting=1, in_flight=2)
        wait_for(server, waiting=0, in_flight=1)
    wait_for(server, waiting=0, in_flight=0)
    assert status(server)["errors"] == {}


def test_a_server_takes_the_files_that_it_may(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        monkeypatch.setattr(sockets, "FILES", soft)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft // 2, hard))
        sockets.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
        sockets.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def post(body: bytes) -> bytes:
    return (
        b"POST /v1/predict HTTP/1.1\r\nHost: robot\r\nContent-Type: application/msgpack\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def status(server) -> dict:
    with urlopen(f"{server.url}/v1/status", timeout=5) as reply:
        return json.load(reply)


def wait_for(server, **wanted) -> None:
    wait_until(lambda: {key: status(server)[key] for key in wanted} == wanted)


def wait_until(done) -> None:
    deadline = time.monotonic() + 5
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
