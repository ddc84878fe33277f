import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mmseq.errors import ServeError
from mmseq.serving import GateConfig, ReplayPolicy, Server, ServerConfig, codec
from mmseq.serving.codec import Limits
from mmseq.serving.scheduler import SchedulerConfig
from support.wire import ask, dial, http


class Scripted(ReplayPolicy):
    """A replay that does something else when the prompt says so."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.entered, self.release = threading.Event(), threading.Event()

    def infer(self, observation):
        result = super().infer(observation)
        match observation.get("prompt"):
            case "wait":
                self.entered.set()
                assert self.release.wait(10)
            case "crash":
                raise ValueError("secret path /home/me")
            case "exit":
                raise SystemExit(3)
            case "refuse":
                raise ServeError("the model cannot do that")
            case "nan":
                result["actions"][0, 0] = np.nan
            case "far":
                result["actions"] += 100
            case "none":
                return None
            case "unsendable":
                result["extra"] = object()
        return result


@pytest.fixture
def scripted(episode, embodiment) -> Scripted:
    return Scripted(episode, embodiment, horizon=8, execute=4)


class TestWebsocket:
    def test_the_contract_comes_first_then_a_reply_per_observation(self, start, policy, observation, episode):
        with dial(start(policy)) as socket:
            metadata = codec.unpack(socket.recv())
            assert metadata["horizon"] == 8
            assert metadata["fingerprints"] == {"arm": policy.embodiment.fingerprint}
            assert metadata["image_keys"] == ["observation.images.front", "observation.images.wrist"]
            for step in (0, 4, 8):
                reply = ask(socket, observation)
                assert (reply["actions"].dtype, reply["actions"].shape) == (np.float32, (8, 4))
                np.testing.assert_array_equal(reply["actions"], episode["action"][step : step + 8])
                assert reply["policy_timing"]["infer_ms"] >= 0
                assert ("prev_total_ms" in reply["server_timing"]) == (step > 0)

    def test_a_refused_request_keeps_the_connection(self, start, policy, observation):
        server = start(policy)
        with dial(server) as socket:
            socket.recv()
            for bad, code in [
                (b"\xc1", "malformed"),
                (b"", "malformed"),
                ("text", "malformed"),
                ([1, 2], "malformed"),
                ({}, "missing_key"),
                ({**observation, "observation.state": np.zeros(3)}, "wrong_shape"),
                ({**observation, "embodiment_fingerprint": "0"}, "fingerprint"),
                ({**observation, "options": {"step": -1}}, "out_of_range"),
            ]:
                assert ask(socket, bad)["code"] == code
            assert "actions" in ask(socket, observation)
        assert http(server, "GET", "/v1/status").json()["errors"]["malformed"] == 4

    def test_the_chunk_begins_with_the_committed_actions(self, start, policy, observation):
        prefix = np.full((3, 4), 0.25, np.float32)
        with dial(start(policy)) as socket:
            socket.recv()
            np.testing.assert_array_equal(ask(socket, {**observation, "action_prefix": prefix})["actions"][:3], prefix)

    def test_policy_errors_say_no_more_than_their_kind(self, start, scripted, observation):
        server = start(scripted)
        for prompt, code in [
            ("crash", "policy_failed"),
            ("exit", "policy_failed"),
            ("none", "policy_failed"),
            ("unsendable", "policy_failed"),
        ]:
            with dial(server) as socket:
                socket.recv()
                error = ask(socket, {**observation, "prompt": prompt})
                assert error["code"] == code
                assert "secret" not in error["message"]
                assert "Traceback" not in error["message"]
                with pytest.raises(ConnectionClosed):
                    ask(socket, observation)
        with dial(server) as socket:
            socket.recv()
            assert ask(socket, {**observation, "prompt": "refuse"})["message"] == "the model cannot do that"
            assert ask(socket, {**observation, "prompt": "nan"})["code"] == "unsafe_action"
            assert "actions" in ask(socket, observation)

    def test_a_bug_of_ours_is_told_without_its_details(self, start, policy, observation, monkeypatch):
        server = start(policy)
        monkeypatch.setattr(server.service.gate, "check", lambda *_, **__: 1 / 0)
        with dial(server) as socket:
            socket.recv()
            error = ask(socket, observation)
        assert (error["code"], "division" in error["message"]) == ("internal", False)
        reply = http(server, "POST", "/v1/predict", json={"arrow": "-> action[2]", "observation": {}})
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")

    def test_actions_beyond_the_limits_are_clamped_or_refused(self, start, scripted, observation):
        far = {**observation, "prompt": "far"}
        with dial(start(scripted)) as socket:
            socket.recv()
            reply = ask(socket, far)
            assert reply["actions"].max() == 2
            assert reply["safety"]["clamped"] == 32
            assert reply["safety"]["axes"]["x"] == {"limit": 8}
        server = start(scripted, gate=GateConfig(out_of_range="refuse"))
        with dial(server) as socket:
            socket.recv()
            assert ask(socket, far)["code"] == "unsafe_action"
        assert http(server, "GET", "/v1/status").json()["safety"]["chunks_refused"] == 1

    def test_a_message_over_the_limit_closes_with_1009(self, start, policy):
        with dial(start(policy, limits=Limits(max_message_bytes=10_000))) as socket:
            socket.recv()
            socket.send(b"\0" * 20_000)
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(timeout=10)
            assert caught.value.rcvd.code == 1009

    def test_clients_that_vanish_leave_the_server_well(self, start, policy, observation):
        server = start(policy)
        for _ in range(5):
            socket = dial(server)
            socket.send(codec.pack(observation))
            socket.socket.close()
        with dial(server) as socket:
            socket.recv()
            assert "actions" in ask(socket, observation)


class TestToken:
    def test_without_the_token_401(self, start, policy):
        server = start(policy, token="s3cret")
        for token in (None, "wrong", "s3cret "[:5]):
            with pytest.raises(InvalidStatus) as caught:
                dial(server, token)
            assert caught.value.response.status_code == 401
            headers = {"Authorization": f"Api-Key {token}"} if token else {}
            for method, path in (("GET", "/v1/contract"), ("GET", "/v1/status"), ("POST", "/v1/predict")):
                assert http(server, method, path, headers=headers).status_code == 401
        assert http(server, "GET", "/healthz").status_code == 200

    def test_with_the_token(self, start, policy, observation):
        server = start(policy, token="s3cret")
        with dial(server, "s3cret") as socket:
            socket.recv()
            assert "actions" in ask(socket, observation)
        assert "s3cret" not in repr(server.config)

    def test_web_pages_are_refused_when_there_is_no_token(self, start, policy):
        server = start(policy)
        with pytest.raises(InvalidStatus) as caught:
            dial(server, Origin="http://evil.example")
        assert caught.value.response.status_code == 403
        assert http(server, "GET", "/v1/contract", headers={"Origin": "http://evil.example"}).status_code == 403

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "robot.local", ""])
    def test_a_public_host_needs_a_token(self, host):
        with pytest.raises(ServeError, match="no token"):
            ServerConfig(host=host)
        assert ServerConfig(host=host, token="t").host == host


class TestHTTP:
    def test_health_answers_while_the_model_is_busy(self, start, scripted, observation):
        server = start(scripted)
        with dial(server) as socket:
            socket.recv()
            socket.send(codec.pack({**observation, "prompt": "wait"}))
            assert scripted.entered.wait(5)
            assert http(server, "GET", "/healthz", timeout=2).text == "OK\n"
            scripted.release.set()
            assert isinstance(socket.recv(timeout=5), bytes)

    def test_contract(self, start, policy, embodiment):
        body = http(start(policy), "GET", "/v1/contract").json()
        assert body["embodiments"]["arm"] == embodiment.to_dict()
        assert body["tasks"] == {"policy": "text, image, proprio -> action[8]"}

    @pytest.mark.parametrize("kind", ["application/json", "application/msgpack", "application/x-msgpack"])
    def test_predict(self, start, policy, observation, episode, kind):
        encode, decode = (codec.to_json, codec.from_json) if "json" in kind else (codec.pack, codec.unpack)
        body = {"arrow": "text, image -> action[4], image.front@+8, progress", "observation": observation}
        reply = http(start(policy), "POST", "/v1/predict", content=encode(body), headers={"Content-Type": kind})
        assert (reply.status_code, reply.headers["content-type"]) == (200, kind)
        prediction = decode(reply.content)["prediction"]
        np.testing.assert_array_equal(prediction["action"], episode["action"][:4])
        np.testing.assert_array_equal(prediction["image.front"], episode["image.front"][8])
        assert prediction["progress"] == 0

    @pytest.mark.parametrize(
        ("content", "kind", "status", "code"),
        [
            (b"{", "application/json", 400, "malformed"),
            (b"{}", "application/json", 400, "malformed"),
            (b"[]", "application/json", 400, "malformed"),
            (b"\xc1", "application/msgpack", 400, "malformed"),
            (b'{"arrow": "a -> b", "observation": {}}', "text/plain", 415, "unsupported"),
            (b'{"arrow": "a -> b", "observation": {}, "more": 1}', "application/json", 400, "malformed"),
            (b'{"arrow": "a -> b", "observation": {}}', "application/json", 400, "refused"),
            (
                b'{"arrow": "-> text", "observation": {"observation.state": [0, 0, 99, 0]}}',
                "application/json",
                400,
                "out_of_range",
            ),
            (b"\0" * 300_000, "application/msgpack", 413, "too_large"),
        ],
    )
    def test_predict_refusals(self, start, policy, content, kind, status, code):
        server = start(policy, limits=Limits(max_message_bytes=200_000))
        reply = http(server, "POST", "/v1/predict", content=content, headers={"Content-Type": kind})
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)

    def test_unknown_addresses_and_methods(self, start, policy):
        server = start(policy)
        assert http(server, "GET", "/v2/contract").status_code == 404
        assert http(server, "GET", "/v1/predict").status_code == 405


class TestLife:
    def test_a_port_in_use_is_named(self, start, policy):
        port = start(policy).port
        with pytest.raises(ServeError, match=rf"port {port} on 127.0.0.1 is in use\. Stop the process"):
            Server(policy, ServerConfig(port=port)).start()

    def test_an_unknown_host_is_named(self, policy):
        with pytest.raises(ServeError, match=r"cannot serve on"):
            Server(policy, ServerConfig(host="203.0.113.7", token="t", port=0)).start()

    def test_stopping_answers_what_is_under_way(self, start, scripted, observation):
        server = start(scripted)
        with dial(server) as socket, dial(server) as idle:
            socket.recv(), idle.recv()
            socket.send(codec.pack({**observation, "prompt": "wait"}))
            assert scripted.entered.wait(5)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            time.sleep(0.05)
            scripted.release.set()
            assert "actions" in codec.unpack(socket.recv(timeout=5))
            with pytest.raises(ConnectionClosed):
                idle.recv(timeout=5)
            stopping.join(10)
        assert not server.alive
        server.stop()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmseq-")]

    def test_too_many_waiting_requests_are_refused(self, start, scripted, observation):
        server = start(scripted, scheduling=SchedulerConfig(max_waiting=1))
        sockets = [dial(server) for _ in range(3)]
        try:
            for socket in sockets:
                socket.recv()
            sockets[0].send(codec.pack({**observation, "prompt": "wait"}))
            assert scripted.entered.wait(5)
            sockets[1].send(codec.pack(observation))
            while not http(server, "GET", "/v1/status").json()["waiting"]:
                time.sleep(0.01)
            assert ask(sockets[2], observation)["code"] == "busy"
            scripted.release.set()
            assert isinstance(sockets[1].recv(timeout=5), bytes)
        finally:
            scripted.release.set()
            for socket in sockets:
                socket.close()

    def test_signals_end_serve_cleanly(self, tmp_path):
        program = """
import numpy as np
from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import Episode
from mmseq.serving import ReplayPolicy, ServerConfig, serve
values = np.linspace(0, 1, 20, dtype=np.float32)[:, None]
episode = Episode.from_arrays("e", 10, {"action": values})
policy = ReplayPolicy(episode, Embodiment(name="r", rate_hz=10, action=Axes.from_values(values)))
serve(policy, ServerConfig(port=0), on_ready=lambda server: print(server.port, flush=True))
print("done", flush=True)
"""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        started = [
            (
                number,
                subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True, env=environment),
            )
            for number in (signal.SIGTERM, signal.SIGINT)
        ]
        for number, process in started:
            try:
                assert int(process.stdout.readline()) > 0
                process.send_signal(number)
                out, errors = process.communicate(timeout=15)
                assert (process.returncode, out, errors) == (0, "done\n", "")
            finally:
                process.kill()


def test_a_policy_that_cannot_warm_up_ends_serve():
    program = """
import numpy as np
from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import Episode
from mmseq.errors import ServeError
from mmseq.serving import ReplayPolicy, ServerConfig, serve
class Broken(ReplayPolicy):
    def warm_up(self):
        raise ValueError("no compiler")
values = np.linspace(0, 1, 20, dtype=np.float32)[:, None]
episode = Episode.from_arrays("e", 10, {"action": values})
try:
    serve(Broken(episode, Embodiment(name="r", rate_hz=10, action=Axes.from_values(values))), ServerConfig(port=0))
except ServeError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=15, check=False
    )
    assert done.stdout.startswith("the policy failed to warm up: no compiler")
    assert done.stderr.count("Traceback") == 1


def test_importing_serving_needs_no_web_framework():
    code = "import sys, mmseq.serving; print({'fastapi', 'starlette', 'uvicorn', 'torch'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout
        == "set()\n"
    )
