"""Opening and closing a connection: what is refused at once, what is waited for, and that nothing stays open."""

import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest
from mmseq_client import Chunking, Client, ClientError, ContractError, ControlLoop, RefusedError, codec
from websockets.sync.server import serve

from mmseq.episode import Episode
from mmseq.serving import ReplayPolicy, Server, ServerConfig


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with the certificates ours.pem and other.pem of 127.0.0.1, and their keys."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and is not there")
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ours", "other"):
        command = (
            f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -out {name}.pem -keyout {name}.key"
        )
        subprocess.run([*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True)
    return folder


def tls(certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "ours.pem", certificates / "ours.key")
    return context


@contextlib.contextmanager
def echo(embodiments=(), context=None):
    """A server that sends back what it is sent, and its port."""

    def session(connection):
        metadata = {"name": "echo", "horizon": 4, "embodiments": dict(embodiments)}
        connection.send(codec.pack(metadata))
        for frame in connection:
            connection.send(frame)

    with serve(session, "127.0.0.1", 0, ssl=context, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.socket.getsockname()[1]
        server.shutdown()


@contextlib.contextmanager
def silent(context=None):
    """An endpoint that accepts, and with TLS shakes hands, but never says a word. Yields its port."""
    kept = []

    def accept(listener):
        with contextlib.suppress(OSError):
            while True:
                kept.append(listener.accept()[0])
                if context is not None:
                    kept.append(context.wrap_socket(kept.pop(), server_side=True))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        for one in kept:
            one.close()


def test_it_speaks_tls_to_a_server_whose_certificate_it_trusts(certificates):
    trusted = str(certificates / "ours.pem")
    with echo(context=tls(certificates)) as port, Client("127.0.0.1", port, ca_file=trusted) as client:
        assert client.infer({"n": 1}) == {"n": 1}


@pytest.mark.parametrize(
    ("ca_file", "words"),
    [
        ("other.pem", "has a certificate that ca_file .*other.pem"),
        (None, "speaks TLS: give ca_file"),
        ("nope.pem", "ca_file .*nope.pem' cannot be read: .*No such file"),
        (".", "ca_file .* cannot be read: .*directory"),
        ("ours.key", "ca_file .*ours.key' cannot be read"),
    ],
)
def test_what_waiting_cannot_cure_is_said_at_once(certificates, ca_file, words):
    ca_file = ca_file and str(certificates / ca_file)
    with echo(context=tls(certificates)) as port:
        began = time.monotonic()
        with pytest.raises(ClientError, match=words):
            Client("127.0.0.1", port, ca_file=ca_file, connect_timeout_s=20)
        assert time.monotonic() - began < 5


def replayed(embodiment):
    rows = {"proprio": np.zeros((4, 3), np.float32), "action": np.zeros((4, 4), np.float32)}
    return ReplayPolicy(Episode.from_arrays("one", 50, rows, texts=["go"], embodiment="arm"), embodiment)


def test_tls_to_a_server_without_it_is_said_at_once(certificates, embodiment):
    policy = replayed(embodiment)
    words, trusted = "does not speak TLS: leave ca_file", str(certificates / "ours.pem")
    with Server(policy, ServerConfig(port=0, grace_s=0)) as server, pytest.raises(ClientError, match=words):
        Client("127.0.0.1", server.port, ca_file=trusted, connect_timeout_s=20)


@pytest.mark.parametrize("with_tls", [False, True])
def test_a_silent_endpoint_blocks_nobody(certificates, with_tls):
    context, ca_file = (tls(certificates), str(certificates / "ours.pem")) if with_tls else (None, None)
    failed = []

    def connect(port):
        with pytest.raises(ClientError, match="no server at") as caught:
            Client("127.0.0.1", port, ca_file=ca_file, connect_timeout_s=0.6)
        failed.append(caught.value)

    with silent(context) as port:
        thread = threading.Thread(target=connect, args=(port,), daemon=True)
        thread.start()
        thread.join(10)
        assert failed


def test_waiting_is_told_once(caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with caplog.at_level(logging.INFO, "mmseq_client"), pytest.raises(ClientError, match="no server at"):
        Client("127.0.0.1", port, connect_timeout_s=1.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"waiting for the server at 127.0.0.1:{port}: " in caplog.text


def test_closing_while_it_connects_leaves_nothing_open():
    slow = threading.Event()
    answered = []

    def session(connection):
        answered.append(connection)
        connection.send(codec.pack({"name": "slow", "horizon": 4, "embodiments": {}}))
        for frame in connection:
            connection.send(frame)

    def knock(connection, request):
        slow.wait(5)

    with serve(session, "127.0.0.1", 0, process_request=knock, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        slow.set()
        client = Client("127.0.0.1", server.socket.getsockname()[1])
        client.close()
        slow.clear()
        raised = []

        def connect():
            try:
                client.connect(5)
            except ClientError as error:
                raised.append(str(error))

        thread = threading.Thread(target=connect)
        thread.start()
        time.sleep(0.2)
        client.close()
        slow.set()
        thread.join(5)
        assert raised == ["it was closed while it connected"]
        assert client._socket is None
        assert client.infer({"n": 2}) == {"n": 2}  # it may be used again
        client.close()
        server.shutdown()


def test_a_loop_that_is_closed_while_it_reconnects_leaves_nothing_open(server, robot):
    went, connecting = threading.Event(), threading.Event()
    server.open = True

    def connect(timeout_s):
        connecting.set()
        went.wait(5)
        server.open = True

    server.connect, server.close = connect, lambda: setattr(server, "open", False)
    loop = ControlLoop(server, robot, Chunking("plain"))
    loop._connected = False
    loop.tick()
    assert connecting.wait(5)
    threading.Timer(0.1, went.set).start()
    loop.close()
    assert not server.open


def test_an_observation_that_cannot_be_sent_names_its_key_and_keeps_the_connection(embodiment, robot):
    see, events = robot.observe, []
    robot.observe = lambda: {**see(), "observation.state": np.array([None] * 3)}
    with echo({"arm": embodiment.to_dict()}) as port, Client("127.0.0.1", port) as client:
        with pytest.raises(RefusedError, match=r"wrong_type: 'observation.state': cannot send ndarray") as caught:
            client.infer(robot.observe())
        assert caught.value.key == "observation.state"
        opened = client._socket
        loop = ControlLoop(client, robot, on_event=lambda *event: events.append(event))
        loop.run(seconds=0.3)
        assert {kind for kind, _ in events} == {"hold", "refused"}
        assert client._socket is opened
        loop.close()


@pytest.mark.parametrize(
    "host", ["ws://127.0.0.1", "wss://localhost", "http://127.0.0.1:8477", "localhost:8477", "", "a/b"]
)
def test_a_host_is_no_url(host):
    with pytest.raises(ClientError, match="give the host alone and the port as a number, with ca_file for TLS"):
        Client(host)


def test_settings_that_cannot_be_are_refused_by_name(server, robot):
    for port in (0, 70000, "8000"):
        with pytest.raises(ClientError, match="the port as a number"):
            Client("127.0.0.1", port)
    with pytest.raises(ClientError, match="spaces or line breaks"):
        Client(token="s3cret\n")
    for value in (float("nan"), float("inf"), -1, "1"):
        with pytest.raises(ClientError, match="connect_timeout_s is"):
            Client(connect_timeout_s=value)
        for name in ("max_age_s", "timeout_s"):
            with pytest.raises(ClientError, match=f"{name} is {value!r}"):
                ControlLoop(server, robot, **{name: value})
    with pytest.raises(ContractError, match="max_step is 'a'"):
        ControlLoop(server, robot, max_step="a")
    robot.contract = lambda: None
    with pytest.raises(ContractError, match=r"contract\(\) gave NoneType"):
        ControlLoop(server, robot)


def test_a_loop_connects_again_over_a_link_that_is_slower_than_its_first_try(embodiment):
    """Each try that was too short doubles the next, so a slow link is not given up for ever."""
    with (
        Server(replayed(embodiment), ServerConfig(port=0, grace_s=0)) as server,
        slow_link(server.port, 0.4) as port,  # 0.8 s to shake hands
        Client("127.0.0.1", port) as client,
    ):
        client.close()
        tries = 0
        while client._socket is None:
            tries += 1
            assert tries <= 4
            with contextlib.suppress(ClientError):
                client.connect(0.0)
        assert tries > 1


def test_closing_does_not_wait_for_a_server_that_is_silent(embodiment):
    with Server(replayed(embodiment), ServerConfig(port=0, grace_s=0)) as server:
        client = Client("127.0.0.1", server.port)
    with socket.create_server(("127.0.0.1", server.port)):  # it takes connections and says nothing
        client.close()
        client._try_s = 60.0  # as after many breaks
        errors = []

        def connect():
            try:
                client.connect(0.0)
            except ClientError as error:
                errors.append(str(error))

        connecting = threading.Thread(target=connect)
        connecting.start()
        while client._opening is None:
            time.sleep(0.01)
        time.sleep(0.1)
        client.close()
        connecting.join(10)
        assert errors == ["it was closed while it connected"]


@pytest.mark.parametrize("hint", ["", ', "retry_after_ms": 0'])
def test_a_busy_server_that_does_not_say_when_is_asked_more_and_more_rarely(hint):
    asked, body = [], f'{{"error": {{"code": "busy", "message": "full"{hint}}}}}'.encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()

    def answer(listener):
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as peer:
                    asked.append(peer.recv(1 << 16))
                    peer.sendall(head + body)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        with pytest.raises(RefusedError, match="full"):
            Client("127.0.0.1", listener.getsockname()[1], connect_timeout_s=1.0)
    assert 2 <= len(asked) <= 6


def test_a_place_that_is_not_free_yet_is_waited_for(embodiment):
    with Server(replayed(embodiment), ServerConfig(port=0, grace_s=0, max_connections=1)) as server:
        first = Client("127.0.0.1", server.port)
        threading.Timer(0.5, first.close).start()
        with Client("127.0.0.1", server.port, connect_timeout_s=10):
            with pytest.raises(RefusedError, match="robots are connected") as caught:
                Client("127.0.0.1", server.port, connect_timeout_s=0.1)
            assert caught.value.code == "busy"


@contextlib.contextmanager
def slow_link(port, delay_s):
    """A proxy that hands on what comes, each piece `delay_s` later. Yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def hand_on(source, sink):
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                time.sleep(delay_s)
                sink.sendall(part)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", port))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=hand_on, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
