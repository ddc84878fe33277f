"""systemd is told over its own socket: ready, alive, stopping."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from mmseq.serving.net import notify
from mmseq.serving.net.notify import Notifier
from mmseq.testing import tiny

ROOT = Path(__file__).parents[3]


class Listener:
    """systemd's end of the socket."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.seen = []

    def until(self, wanted, timeout_s=10.0):
        """Read until a datagram has the line `wanted`; its time."""
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            self.socket.settimeout(left)
            self.seen.append(self.socket.recv(4096).decode().splitlines())
            if wanted in self.seen[-1]:
                return time.monotonic()
        raise AssertionError(f"no {wanted}: {self.seen}")

    def drain(self, seconds):
        """What arrives within `seconds`."""
        end, found = time.monotonic() + seconds, []
        while (left := end - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                found.append(self.socket.recv(4096).decode())
            except TimeoutError:
                break
        return found


@pytest.fixture(params=["path", "abstract"])
def listener(request, tmp_path):
    name = str(tmp_path / "notify") if request.param == "path" else f"\0mmseq-test-{os.getpid()}"
    made = Listener(name)
    made.environment = {"NOTIFY_SOCKET": name.replace("\0", "@"), "WATCHDOG_USEC": "400000"}
    yield made
    made.socket.close()


def test_ready_when_warm_alive_while_healthy_and_stopping_at_the_end(listener):
    reason, healthy = ["warming up"], [True]
    with Notifier(lambda: reason[0], lambda: healthy[0], listener.environment):
        listener.until("STATUS=warming up")
        assert not any("READY" in said for said in listener.drain(0.5))
        reason[0] = None
        listener.until("READY=1")
        told = [listener.until("WATCHDOG=1") for _ in range(6)]
        assert min(b - a for a, b in pairwise(told)) < 0.4  # a busy machine may keep some of them waiting
        healthy[0] = False
        listener.drain(0.3)
        assert listener.drain(0.8) == []
        healthy[0] = True
        listener.until("WATCHDOG=1")
    listener.until("STOPPING=1")


def test_without_systemd_nothing_runs_and_a_dead_socket_harms_nobody(tmp_path):
    with Notifier(lambda: None, lambda: True, {}) as notifier:
        assert notifier._thread is None
    dead = {"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
    with Notifier(lambda: None, lambda: True, dead) as notifier:
        assert notifier.watchdog_s is None  # meant for another process


@pytest.mark.parametrize("usec", ["0", "-1", "²", "1e6", ""])
def test_a_watchdog_that_is_no_interval_is_none(usec):
    assert Notifier(lambda: None, lambda: True, {"WATCHDOG_USEC": usec}).watchdog_s is None


def test_a_watchdog_is_told_ten_times_a_second_at_most(listener):
    with Notifier(lambda: None, lambda: True, {**listener.environment, "WATCHDOG_USEC": "1"}):
        assert len(listener.drain(0.5)) < 15


def test_a_full_socket_does_not_keep_the_process(listener, monkeypatch):
    monkeypatch.setattr(notify, "SEND_S", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.setblocking(False)
        out.connect(listener.socket.getsockname())
        with suppress(BlockingIOError):
            while True:
                out.send(b"x")
    begun = time.monotonic()
    with Notifier(lambda: None, lambda: True, listener.environment):
        time.sleep(0.05)
    assert time.monotonic() - begun < 2


def test_a_server_whose_network_thread_hangs_is_not_healthy(start, policy):
    server = start(policy)
    assert server.healthy()
    assert server._loop is not None
    server._loop.call_soon_threadsafe(time.sleep, 1.0)
    assert not server.healthy(0.2)
    time.sleep(1.0)
    assert server.healthy()


def test_mmseq_serve_tells_systemd(tmp_path):
    listener = Listener(str(tmp_path / "notify"))
    tiny.write_episodes(tmp_path / "robot", [tiny.episode(0)], (tiny.embodiment(),))
    environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-m", "mmseq", "serve", "--replay", f"{tmp_path / 'robot'}:0", "--port", "0"]
    with open(tmp_path / "log.txt", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        listener.until("READY=1", 60)
        listener.until("WATCHDOG=1")
        listener.until("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        listener.until("STOPPING=1")
        assert process.wait(20) == 0, (tmp_path / "log.txt").read_text()
    finally:
        process.kill()
        process.wait()
