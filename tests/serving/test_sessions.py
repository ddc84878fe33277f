"""Many robots on one server: isolation, batches, the operator's hold, readiness, metrics, reloading."""

import re
import socket as sockets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from mmseq.errors import ServeError
from mmseq.serving import Chunking, GateConfig, ObservationRules, SchedulerConfig, Server, ServerConfig, codec
from support.wire import ask, dial, http

H = 8


class Echo:
    """Every action is the robot's own state, so that an answer that went astray is seen. It waits when told to."""

    def __init__(self, embodiment, *, many=True):
        self.embodiment, self.batches = embodiment, []
        self.entered, self.release = threading.Event(), threading.Event()
        if not many:
            self.infer_many = self.batch_key = None

    def contract(self):
        body = {self.embodiment.name: self.embodiment.to_dict()}
        return {"name": "echo", "embodiments": body, "tasks": {}, "horizon": H, "prefix": True}

    def answer(self, observation):
        if observation.get("prompt") == "refuse":
            raise ServeError("not this one")
        actions = np.tile(observation["observation.state"], (H, 1))
        prefix = observation.get("action_prefix")
        if prefix is not None:
            actions[: len(prefix)] = prefix
        return {"actions": actions, "prefixed": 0 if prefix is None else len(prefix)}

    def infer(self, observation):
        self.batches.append(1)
        if observation.get("prompt") == "wait":
            self.entered.set()
            assert self.release.wait(10)
        return self.answer(observation)

    def infer_many(self, observations):
        self.batches.append(len(observations))
        if any(o.get("prompt") == "break the batch" for o in observations):
            raise ValueError("one of them")
        results = []
        for o in observations:
            try:
                results.append(self.answer(o))
            except ServeError as error:
                results.append(error)
        return results

    def batch_key(self, observation):
        return observation["embodiment"]

    def predict(self, arrow, observation):
        return {"action": np.zeros((2, 4), np.float32)}


@pytest.fixture
def echo(embodiment):
    return Echo(embodiment)


def seen(observation, value, **more):
    return {**observation, "observation.state": np.full(4, value, np.float32), **more}


def queued(server, count):
    until = time.monotonic() + 5
    while http(server, "GET", "/v1/status").json()["waiting"] != count:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def crowd(start, echo, observation):
    """`crowd(prompts, **config)`: a server whose model is busy, and a waiting request per prompt."""
    opened = []

    def gather(prompts, **config):
        server = start(echo, **config)
        opened.extend(dial(server) for _ in range(len(prompts) + 1))
        for s in opened:
            s.recv()
        opened[0].send(codec.pack(seen(observation, 0, prompt="wait")))
        assert echo.entered.wait(5)
        for i, prompt in enumerate(prompts):
            opened[i + 1].send(codec.pack(seen(observation, (i + 1) / 16, prompt=prompt)))
            queued(server, i + 1)
        return server, opened

    yield gather
    echo.release.set()
    for s in opened:
        s.close()


class TestIsolation:
    def test_each_robot_gets_its_own_answers(self, start, echo, observation):
        server = start(echo, chunking=Chunking(mode="realtime", execute=2))

        def drive(robot):
            with dial(server) as s:
                s.recv()
                for step in range(25):
                    value = (robot * 25 + step) / 512
                    reply = ask(s, seen(observation, value, step=step, sent_at=value, delay=0))
                    assert (reply["step"], reply["sent_at"]) == (step, value)
                    np.testing.assert_array_equal(reply["actions"], np.full((H, 4), value, np.float32))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(drive, range(16)))
        assert sum(echo.batches) == 16 * 25
        assert http(server, "GET", "/v1/status").json()["sessions"] == []

    def test_waiting_robots_share_a_model_call(self, crowd, echo):
        _, robots = crowd(["go"] * 5, scheduling=SchedulerConfig(max_batch=4))
        echo.release.set()
        for i, s in enumerate(robots):
            reply = codec.unpack(s.recv(timeout=5))
            assert reply["actions"][0, 0] == np.float32(i / 16)
            assert reply["server_timing"]["batch"] == (4 if 1 <= i <= 4 else 1)
        assert echo.batches == [1, 4, 1]

    def test_one_that_fails_does_not_take_the_batch_with_it(self, crowd, echo):
        _, robots = crowd(["go", "refuse", "go"])
        echo.release.set()
        answers = [s.recv(timeout=5) for s in robots]
        assert [isinstance(a, bytes) for a in answers] == [True, True, False, True]
        assert "not this one" in answers[2]

    def test_a_batch_that_breaks_is_answered_one_by_one(self, crowd, echo):
        _, robots = crowd(["go", "break the batch", "go"])
        echo.release.set()
        assert all(isinstance(s.recv(timeout=5), bytes) for s in robots)
        assert echo.batches == [1, 3, 1, 1, 1]

    def test_a_policy_without_batches_answers_one_by_one(self, start, embodiment, observation):
        echo = Echo(embodiment, many=False)
        with dial(start(echo)) as s:
            s.recv()
            assert ask(s, seen(observation, 0.5))["server_timing"]["batch"] == 1

    def test_the_request_of_a_robot_that_left_is_not_computed(self, crowd, echo):
        server, robots = crowd(["go", "go"])
        robots[1].socket.close()
        queued(server, 1)
        echo.release.set()
        assert codec.unpack(robots[2].recv(timeout=5))["actions"][0, 0] == 2 / 16
        assert echo.batches == [1, 1]

    def test_robots_that_do_not_read_or_send_half_a_message_harm_nobody(self, start, echo, observation):
        server = start(echo)
        half = dial(server)
        half.recv()
        half.socket.sendall(b"\x82\xff" + (1 << 20).to_bytes(8, "big") + b"mask" + b"\0" * 1000)  # the rest never comes
        deaf = sockets.create_connection(("127.0.0.1", server.port))
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
        with dial(server) as s:
            s.recv()
            for _ in range(50):
                assert "actions" in ask(s, seen(observation, 0.1))
        deaf.close()
        half.socket.close()

    def test_a_deadline_that_passes_is_told(self, crowd, echo, observation):
        server, _ = crowd([])
        with dial(server) as s:
            s.recv()
            assert ask(s, seen(observation, 0, deadline_ms=20.0))["code"] == "late"

    def test_busy_says_when_to_come_back(self, crowd, observation):
        server, _ = crowd(["go"], scheduling=SchedulerConfig(max_waiting=1))
        with dial(server) as s:
            s.recv()
            error = ask(s, seen(observation, 0))
        assert error["code"] == "busy"
        assert error["retry_after_ms"] > 0
        reply = http(server, "POST", "/v1/predict", json={"arrow": "-> action[2]", "observation": {}})
        assert (reply.status_code, int(reply.headers["retry-after"]) >= 1) == (503, True)


class TestHold:
    def test_a_hold_stops_what_waits_and_what_is_computed(self, crowd, echo, observation):
        server, robots = crowd(["go"])
        reply = http(server, "POST", "/v1/hold", json={"reason": "a person in the cell"})
        begun = {"id": reply.json()["id"], "reason": "a person in the cell"}
        assert reply.json() == {"held": True, **begun, "holds": [begun], "sessions": 2}
        assert '"held"' in robots[1].recv(timeout=5)
        assert '"held"' in robots[0].recv(timeout=5)  # while the model still computes
        echo.release.set()
        error = ask(robots[0], seen(observation, 0))
        assert (error["code"], error["reason"]) == ("held", "a person in the cell")
        predicted = http(server, "POST", "/v1/predict", json={"arrow": "-> action[2]", "observation": {}})
        assert predicted.status_code == 423
        assert http(server, "GET", "/v1/status").json()["held"] == "a person in the cell"
        assert http(server, "DELETE", "/v1/hold").json() == {"held": False, "holds": [], "sessions": 2}
        assert "actions" in ask(robots[0], seen(observation, 0))

    def test_what_was_asked_before_a_hold_is_not_answered_after_it(self, crowd, echo):
        server, robots = crowd([])
        http(server, "POST", "/v1/hold")
        http(server, "DELETE", "/v1/hold")
        echo.release.set()
        assert '"held"' in robots[0].recv(timeout=5)

    def test_a_hold_forgets_what_robots_were_about_to_do(self, start, echo, observation):
        server = start(echo, chunking=Chunking(mode="realtime", execute=4))
        with dial(server) as s:
            s.recv()
            ask(s, seen(observation, 0.1, step=0))
            assert ask(s, seen(observation, 0.2, step=4, delay=2))["prefixed"] == 2
            http(server, "POST", "/v1/hold")
            http(server, "DELETE", "/v1/hold")
            assert ask(s, seen(observation, 0.3, step=8, delay=2))["prefixed"] == 0

    def test_a_hold_needs_the_token(self, start, echo):
        server = start(echo, token="t")
        assert http(server, "POST", "/v1/hold").status_code == 401
        assert http(server, "DELETE", "/v1/hold").status_code == 401
        headers = {"Authorization": "Api-Key t"}
        assert http(server, "GET", "/v1/status", headers=headers).json()["held"] is None


class TestChunking:
    def test_openpi_clients_get_realtime_chunks_without_knowing(self, start, echo, observation):
        server = start(echo, chunking=Chunking(mode="realtime", execute=4))
        with dial(server) as s:
            contract = codec.unpack(s.recv())
            assert contract["chunking"] == {"mode": "realtime", "execute": 4, "decay": 0.01}
            assert contract["hold"] == {"arm": "position"}
            first = ask(s, seen(observation, 0.1))
            second = ask(s, seen(observation, 0.2))  # the server has measured how long it takes: one step of 50 ms
            assert second["prefixed"] == 1
            np.testing.assert_array_equal(second["actions"][0], first["actions"][4])
            np.testing.assert_array_equal(second["actions"][1:], np.full((7, 4), 0.2, np.float32))

    def test_a_client_that_chunks_itself_asks_for_plain(self, start, echo, observation):
        with dial(start(echo, chunking=Chunking(mode="ensemble"))) as s:
            s.recv()
            ask(s, seen(observation, 0.1, step=0))
            mixed = ask(s, seen(observation, 0.3, step=1))["actions"]
            assert 0.1 < mixed[0, 0] < 0.3
            assert mixed[7, 0] == np.float32(0.3)
            plain = ask(s, seen(observation, 0.5, step=2, chunking="plain"))["actions"]
            np.testing.assert_array_equal(plain, np.full((H, 4), 0.5, np.float32))

    def test_a_step_backwards_is_refused(self, start, echo, observation):
        with dial(start(echo)) as s:
            s.recv()
            ask(s, seen(observation, 0, step=5))
            assert ask(s, seen(observation, 0, step=4))["key"] == "step"
            assert "actions" in ask(s, seen(observation, 0, step=0, reset=True))

    def test_the_gate_knows_what_the_session_was_sent(self, start, embodiment, observation):
        steady = replace(embodiment, action=replace(embodiment.action, max_step=(0.1,) * 4))
        server = start(Echo(steady), gate=GateConfig(too_fast="clamp"))
        with dial(server) as s:
            assert codec.unpack(s.recv())["embodiments"]["arm"]["action"]["max_step"] == [0.1] * 4
            ask(s, seen(observation, 0, step=0))
            reply = ask(s, seen(observation, 0.35, step=4))
            np.testing.assert_allclose(reply["actions"][:, 0], [0.1, 0.2, 0.3, *[0.35] * 5], atol=1e-6)
            assert reply["safety"] == {"clamped": 12, "axes": {n: {"rate": 3} for n in ("x", "y", "z", "gripper")}}
        assert http(server, "GET", "/v1/status").json()["safety"]["by_axis"]["arm"]["y"] == {"rate": 3}
        assert (
            'mmseq_safety_values_total{axis="y",embodiment="arm",rule="rate"} 3.0'
            in http(server, "GET", "/metrics").text
        )


class TestOperation:
    def test_metrics_say_what_happened(self, start, echo, observation):
        server = start(echo)
        with dial(server) as s:
            s.recv()
            for _ in range(3):
                ask(s, seen(observation, 0))
            ask(s, {})
            text = http(server, "GET", "/metrics").text
        for line in (
            'mmseq_requests_total{call="infer"} 4.0',
            'mmseq_errors_total{code="missing_key"} 1.0',
            "mmseq_request_seconds_count 3.0",
            "mmseq_sessions 1.0",
            "mmseq_held 0.0",
            "mmseq_ready 1.0",
        ):
            assert line in text, text

    def test_ready_only_when_warm_not_stuck_and_not_stopping(self, start, crowd, embodiment):
        class Cold(Echo):
            def warm_up(self):
                self.release.wait(10)

        cold = Cold(embodiment)
        server = start(cold)
        reply = http(server, "GET", "/readyz")
        assert (reply.status_code, reply.text) == (503, "warming up\n")
        cold.release.set()
        until = time.monotonic() + 5
        while http(server, "GET", "/readyz").status_code != 200:
            assert time.monotonic() < until
        stuck, _ = crowd([], stuck_s=0.05)
        time.sleep(0.1)
        reply = http(stuck, "GET", "/readyz")
        assert (reply.status_code, "has been busy" in reply.text) == (503, True)
        assert http(stuck, "GET", "/healthz").status_code == 200
        server.service.stopping = True
        assert http(server, "GET", "/readyz").text == "stopping\n"

    def test_the_page_and_the_document_name_every_route(self, start, echo):
        server = start(echo, token="t")
        assert http(server, "GET", "/docs").status_code == 401
        headers = {"Authorization": "Api-Key t"}
        document = http(server, "GET", "/openapi.json", headers=headers).json()
        page = http(server, "GET", "/docs", headers=headers)
        assert page.headers["content-type"].startswith("text/html")
        assert document["openapi"] == "3.1.0"
        for path, methods in document["paths"].items():
            assert path in page.text
            for method in methods:
                found = http(server, method.upper(), path, headers=headers)
                assert found.status_code not in (404, 405), (method, path)
        assert "observation.images.front" in re.sub(r"\s", "", page.text)

    def test_a_reload_changes_the_policy_and_keeps_the_sessions(self, embodiment, observation):
        class Next(Echo):
            def answer(self, observation):
                return {"actions": np.full((H, 4), 0.75, np.float32)}

        config = ServerConfig(port=0)
        with Server(Echo(embodiment), config, load=lambda: Next(embodiment)) as server, dial(server) as s:
            s.recv()
            assert ask(s, seen(observation, 0.1))["actions"][0, 0] == np.float32(0.1)
            assert http(server, "POST", "/v1/reload").json() == {"reloads": 1, "sessions": 1}
            assert ask(s, seen(observation, 0.1))["actions"][0, 0] == 0.75

    def test_a_reload_of_another_contract_is_refused(self, embodiment, observation):
        other = Echo(replace(embodiment, rate_hz=50))
        with Server(Echo(embodiment), ServerConfig(port=0), load=lambda: other) as server, dial(server) as s:
            s.recv()
            reply = http(server, "POST", "/v1/reload")
            assert (reply.status_code, "arm.rate_hz: 20 against 50" in reply.text) == (400, True)
            assert ask(s, seen(observation, 0.1))["actions"][0, 0] == np.float32(0.1)

    def test_nothing_to_reload(self, start, echo):
        assert http(start(echo), "POST", "/v1/reload").status_code == 415

    def test_an_idle_connection_ends_with_the_server(self, start, echo):
        server = start(echo)
        with dial(server) as s:
            s.recv()
            server.stop()
            with pytest.raises(ConnectionClosed):
                s.recv(timeout=5)
        with pytest.raises(httpx.ConnectError):
            http(server, "GET", "/healthz")


def test_an_outlier_does_not_stay_in_the_mean_of_an_ensemble(start, echo, observation):
    refusing, lax = GateConfig(out_of_range="refuse"), ObservationRules(state_range="ignore")
    server = start(echo, chunking=Chunking(mode="ensemble"), gate=refusing, observation=lax)
    with dial(server) as s:
        s.recv()
        assert "actions" in ask(s, seen(observation, 0.1, step=0))
        assert ask(s, seen(observation, 1e6, step=1))["code"] == "unsafe_action"
        np.testing.assert_allclose(ask(s, seen(observation, 0.1, step=2))["actions"], 0.1, rtol=1e-5)


def test_a_gripper_is_never_averaged(start, echo, observation):
    server = start(echo, chunking=Chunking(mode="ensemble"))
    with dial(server) as s:
        s.recv()
        ask(s, seen(observation, -1, step=0))
        actions = ask(s, seen(observation, 1, step=1))["actions"]
    assert abs(actions[0, 0]) < 0.1
    assert actions[0, 3] == 1
    assert server.service.gate.counts.chunks == 2  # checked before and after it was averaged, it is one chunk


def test_after_a_pause_nothing_of_the_old_motion_is_committed(start, echo, observation):
    server = start(echo, chunking=Chunking(mode="realtime", execute=4))
    with dial(server) as s:
        s.recv()
        ask(s, seen(observation, 0.1))
        time.sleep(0.5)  # a chunk is 0.4 s
        assert ask(s, seen(observation, 0.3))["prefixed"] == 0


@pytest.mark.parametrize("length", [2001, 1_000_000])
def test_a_long_arrow_holds_up_nobody(start, echo, length):
    server = start(echo)
    reply = http(server, "POST", "/v1/predict", json={"arrow": "(" * length, "observation": {}})
    assert reply.status_code == 413
    assert len(reply.content) < 1000


def test_each_robot_has_its_own_place_in_a_replay(start, policy, observation):
    server = start(policy, chunking=Chunking(execute=4))
    with dial(server) as a, dial(server) as b:
        first = [s.recv() and ask(s, observation)["actions"] for s in (a, b)]
        second = [ask(s, observation)["actions"] for s in (a, b)]
    np.testing.assert_array_equal(first[0], first[1])
    np.testing.assert_array_equal(second[0], second[1])
    np.testing.assert_array_equal(second[0][:4], first[0][4:])
