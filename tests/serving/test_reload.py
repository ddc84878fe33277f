"""Loading once more what is served: nothing waits for it, and it happens once at a time."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from mmseq.serving import ReplayPolicy, Server, ServerConfig
from mmseq.serving.launch import ServeSettings, launch
from mmseq.testing import tiny
from support.wire import http


@pytest.fixture
def loading(episode, embodiment):
    """A server whose second policy is loaded until `release` is set; `loads` counts."""
    make = lambda: ReplayPolicy(episode, embodiment, horizon=8)

    def load():
        server.loads += 1
        assert server.release.wait(20)
        return make()

    server = Server(make(), ServerConfig(port=0, grace_s=5), load=load)
    server.loads, server.release = 0, threading.Event()  # type: ignore[attr-defined]
    with server:
        yield server
        server.release.set()  # type: ignore[attr-defined]


def posted(server):
    """A reload that somebody waits for, in a thread; its reply is what `result` has then."""
    found: list = []
    thread = threading.Thread(target=lambda: found.append(http(server, "POST", "/v1/reload", timeout=20)))
    thread.start()
    until = time.monotonic() + 5
    while not server.loads:
        assert time.monotonic() < until
        time.sleep(0.01)
    return thread, found


def test_one_at_a_time_and_requests_do_not_wait(loading):
    thread, found = posted(loading)
    for _ in range(40):  # more than an executor has threads
        reply = http(loading, "POST", "/v1/reload", timeout=5)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "busy")
    large = {"content": b" " * (2 << 20), "headers": {"Content-Type": "application/json"}}  # decoded in a thread
    assert http(loading, "POST", "/v1/predict", timeout=5, **large).json()["error"]["code"] == "malformed"
    loading.release.set()
    thread.join(5)
    assert (found[0].json()["reloads"], loading.loads) == (1, 1)
    assert http(loading, "POST", "/v1/reload", timeout=5).json()["reloads"] == 2


def test_what_was_served_is_freed(tmp_path):
    """By `launch`, and without the garbage collector: what was there at first is frozen."""
    model = tiny.model()
    model.tasks = {"policy": "text, image, proprio -> action[4]"}
    model.save_pretrained(tmp_path)
    policies, found = [], []

    def drive(server):
        def reload():
            try:
                for _ in range(3):
                    policies.append(weakref.ref(server.service.policy.model))
                    found.append(http(server, "POST", "/v1/reload", timeout=20).json().get("reloads"))
                found.append([policy() is None for policy in policies])
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=reload).start()

    gc.disable()
    try:
        assert launch(ServeSettings(checkpoint=str(tmp_path), port=0, grace_s=1), on_ready=drive)
    finally:
        gc.enable()
    assert found == [1, 2, 3, [True] * 3]


def test_a_server_stops_without_waiting_for_it(loading):
    thread, found = posted(loading)
    begun = time.monotonic()
    loading.stop()
    assert time.monotonic() - begun < 2
    thread.join(5)
    assert found[0].json()["error"]["code"] == "stopping"
    loading.release.set()


def test_sigterm_ends_the_process_while_sighup_loads(tmp_path):
    program = """
import threading
import numpy as np
from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import Episode
from mmseq.serving import ReplayPolicy, ServerConfig, serve
values = np.linspace(0, 1, 20, dtype=np.float32)[:, None]
robot = Embodiment(name="r", rate_hz=10, action=Axes.from_values(values))
policy = ReplayPolicy(Episode.from_arrays("e", 10, {"action": values}), robot)
def load():
    print("loading", flush=True)
    threading.Event().wait()
ended = serve(policy, ServerConfig(port=0), load=load, on_ready=lambda server: print("ready", flush=True))
print("done", ended, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True, env=environment)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=8)
        assert (process.returncode, out) == (0, "done False\n"), errors
    finally:
        process.kill()
        process.wait()
