"""What an operator reads: the log, and answers of routes that are none."""

import logging
import os
from dataclasses import replace

import pytest
from websockets.exceptions import InvalidStatus

from mmseq.errors import ConfigError
from mmseq.serving import Server, ServerConfig, codec
from mmseq.serving.launch import ServeSettings, _tell
from mmseq.serving.model_policy import ModelPolicy, checkpoint_id
from mmseq.testing import tiny
from support.wire import ask, dial, http


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="mmseq.serving")
    return lambda: caplog.text


def test_who_came_and_who_was_refused(start, policy, observation, log):
    server = start(policy, token="t")
    for _ in range(3):
        with pytest.raises(InvalidStatus):
            dial(server, token="wrong")
    with dial(server, token="t") as s:
        s.recv()
        ask(s, observation)
    server.stop()
    said = log()
    assert said.count("refused 127.0.0.1:") == 1  # a robot tries again and again
    assert "unauthorized: the token is missing or wrong" in said
    assert "without completing handshake" not in said
    for line in ("ready after", "robot connected: 127.0.0.1:", "(arm), 1 requests", "stopping: 0 requests"):
        assert line in said


def test_what_is_reloaded_and_what_is_not(policy, log):
    class Named(type(policy)):
        def contract(self):
            return {**super().contract(), "checkpoint": self.weights}

    policy.__class__, policy.weights = Named, "one"
    following = Named(policy.episode, policy.embodiment, horizon=8)
    following.weights = "two"
    with Server(policy, ServerConfig(port=0), load=lambda: following) as server:
        assert http(server, "GET", "/v1/contract").json()["checkpoint"] == "one"
        http(server, "POST", "/v1/reload")
        assert http(server, "GET", "/v1/contract").json()["checkpoint"] == "two"
        with dial(server) as s:
            assert codec.unpack(s.recv())["checkpoint"] == "two"
        following.embodiment = replace(policy.embodiment, rate_hz=50)
        http(server, "POST", "/v1/reload")
    assert "checkpoint two" in log()
    assert "nothing was reloaded: the new policy has another contract: arm.rate_hz: 20 against 50" in log()


def test_what_is_served(policy, log):
    _tell(policy, ServeSettings(replay="x", host="0.0.0.0", passes=99))
    for words in (
        "replay of pick-3",
        "action[8]; horizon 8; arm at 20 Hz",
        "passes is 99",
        "anybody who reaches 0.0.0.0",
    ):
        assert words in log()


def test_an_arrow_that_was_not_trained_is_named(log):
    model = tiny.model()
    model.tasks = {"policy": "text, image, proprio -> action[4]"}
    ModelPolicy(model, arrow="text,image,proprio->action[4]")
    assert "was not trained" not in log()
    ModelPolicy(model, arrow="text, image, proprio -> action[8]")
    assert "was trained on policy (text, image, proprio -> action[4])" in log()
    with pytest.raises(ConfigError, match=r"no task 'polcy'.*policy"):
        ModelPolicy(model, arrow="polcy")


def test_a_checkpoint_is_known_by_its_files(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(8))
    first = checkpoint_id(tmp_path)
    assert checkpoint_id(tmp_path) == first
    os.utime(weights, ns=(1, 1))
    assert checkpoint_id(tmp_path) != first


def test_routes_that_are_none_answer_as_the_others_do(start, policy):
    server = start(policy)
    for method, path, status, code in (("GET", "/nope", 404, "not_found"), ("PUT", "/v1/hold", 405, "not_allowed")):
        reply = http(server, method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_limits_of_no_axes_are_refused():
    with pytest.raises(ConfigError, match="max_dims"):
        codec.Limits(max_dims=-1)
