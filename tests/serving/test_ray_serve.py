"""Replicas on Ray Serve, for real: each robot stays on one of two, and a hold reaches both. Needs the extra `ray`."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from mmseq.testing import tiny

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
ROBOTS, STEPS = 8, 10


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    robots = tiny.write_episodes(folder / "robot", [tiny.episode(0)], (tiny.embodiment(),))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "serve/deploy/ray_serve.py", "--replicas", "2"]
    command += [f"replay={robots}:0", f"port={port}", "replay_horizon=8"]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        said = next((line for line in process.stdout if "replicas at" in line), "")
        assert said, (folder / "log.txt").read_text()[-3000:]
        yield port
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def held_by(clients, observation):
    """How many robots are answered `held`."""
    from mmseq_client import RefusedError

    count = 0
    for client in clients:
        try:
            client.infer(observation)
        except RefusedError as error:
            count += error.code == "held"
    return count


@pytest.mark.slow
def test_robots_stay_on_their_replica_and_a_hold_reaches_all(port, client_package):
    url = f"http://127.0.0.1:{port}"
    actions = tiny.episode(0)["action"]
    clients = [client_package.Client("127.0.0.1", port) for _ in range(ROBOTS)]
    try:
        observation = client_package.example_observation(tiny.embodiment().to_dict())
        for step in range(STEPS):  # the session on the other replica would not know the steps before
            for client in clients:
                reply = client.infer({**observation, "step": step})
                np.testing.assert_allclose(reply["actions"], actions[step : step + 8], atol=1e-6)
        seen = {}
        for _ in range(40):
            sessions = httpx.get(f"{url}/v1/status").json()["sessions"]
            seen[tuple(s["peer"] for s in sessions)] = [s["requests"] for s in sessions]
        assert len(seen) == 2, seen
        counts = [n for requests in seen.values() for n in requests]
        assert counts == [STEPS] * ROBOTS  # every request of a robot came to its one session
        ids = [httpx.post(f"{url}/v1/hold", json={"reason": reason}).json()["id"] for reason in ("a person", "a cable")]
        time.sleep(1)
        assert held_by(clients, observation) == ROBOTS
        assert httpx.delete(f"{url}/v1/hold?id={ids[0]}").status_code == 200
        time.sleep(1)
        assert held_by(clients, observation) == ROBOTS
        assert httpx.delete(f"{url}/v1/hold?id={ids[1]}").json()["holds"] == []
        time.sleep(1)
        assert held_by(clients, observation) == 0
        assert httpx.get(f"{url}/readyz").status_code == 200
    finally:
        for client in clients:
            client.close()


@pytest.mark.slow
def test_settings_that_cannot_be_served_are_told_at_once(tmp_path):
    for words, message in (([], "nothing to serve"), (["checkpoint=x", "host=0.0.0.0"], "there is no token")):
        done = subprocess.run(
            [sys.executable, ROOT / "serve/deploy/ray_serve.py", *words],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert message in done.stderr
