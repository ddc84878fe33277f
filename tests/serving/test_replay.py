import dataclasses
import time

import numpy as np
import pytest

from mmseq.episode import Episode
from mmseq.errors import ServeError
from mmseq.serving import Chunking, Contract, ReplayPolicy
from mmseq.serving.errors import RequestError
from support.wire import ask, dial, http


def test_chunks_follow_each_other_by_execute(policy, episode):
    for step in (0, 4, 8):
        np.testing.assert_array_equal(policy.infer({})["actions"], episode["action"][step : step + 8])
    np.testing.assert_array_equal(policy.infer({"options": {"step": 2}})["actions"], episode["action"][2:10])


def test_after_the_end_an_absolute_robot_holds_and_others_stop(policy, episode, embodiment):
    np.testing.assert_array_equal(policy.chunk(38, 4)[2:], np.tile(episode["action"][-1], (2, 1)))
    for form in ("delta", "velocity"):
        rest = ReplayPolicy(episode, dataclasses.replace(embodiment, action_form=form)).chunk(1000, 4)
        assert not rest[:, :3].any()
        assert (rest[:, 3] == episode["action"][-1, 3]).all()  # what it holds does not drop
    assert [policy.infer({"step": step})["episode_over"] for step in (39, 40, 41, 0)] == [False, True, True, False]


def test_a_robot_goes_on_where_it_says_that_it_is(start, policy, episode, observation):
    server, action = start(policy, chunking=Chunking(execute=8)), episode["action"]
    at = lambda s, step, **more: ask(s, {**observation, "step": step, **more}).get("actions")
    with dial(server) as s:
        s.recv()
        np.testing.assert_array_equal(at(s, 60, executed=0, reset=True), action[:8])  # held before the first answer
        np.testing.assert_array_equal(at(s, 64, executed=4), action[4:12])
        http(server, "POST", "/v1/hold")
        assert at(s, 67, executed=7) is None
        http(server, "DELETE", "/v1/hold")
        np.testing.assert_array_equal(at(s, 110, executed=7), action[7:15])
        with dial(server) as another:  # of the same machine, and further
            another.recv()
            np.testing.assert_array_equal(at(another, 111, executed=30), action[30:38])
        np.testing.assert_array_equal(at(s, 114, executed=11), action[11:19])
    with dial(server) as s:  # a broken connection, told as the client tells it
        s.recv()
        np.testing.assert_array_equal(at(s, 200, executed=15, reset=True), action[15:23])
        np.testing.assert_array_equal(at(s, 202, executed=0, reset=True), action[:8])  # an episode begins
        np.testing.assert_array_equal(at(s, 206), policy.chunk(206, 8))  # nothing else is known


def test_another_episode_is_another_policy(policy, episode, embodiment):
    other = ReplayPolicy(Episode.from_arrays("down", 20, {"action": -episode["action"]}), embodiment, horizon=8)
    again = ReplayPolicy(episode, embodiment, horizon=8)
    assert policy.contract()["fingerprint"] == again.contract()["fingerprint"] != other.contract()["fingerprint"]


@pytest.mark.parametrize("step", [-1, 1 << 54, 2.0, True, None])
def test_a_step_that_no_episode_has_is_refused(policy, step):
    with pytest.raises(RequestError, match=r"options\.step is"):
        policy.infer({"options": {"step": step}})
    for arrow in (f"image -> image@+{1 << 70}", f"image -> action[{1 << 70}]"):
        with pytest.raises(RequestError, match="cannot replay"):
            policy.predict(arrow, {})


def test_a_client_without_steps_goes_on_too(start, policy, episode, observation):
    server, action = start(policy, chunking=Chunking(execute=8)), episode["action"]
    with dial(server) as s:
        s.recv()
        np.testing.assert_array_equal(ask(s, observation)["actions"], action[:8])
        http(server, "POST", "/v1/hold")
        assert ask(s, observation)["code"] == "held"
        http(server, "DELETE", "/v1/hold")
        np.testing.assert_array_equal(ask(s, observation)["actions"], action[8:16])
        time.sleep(0.5)  # a chunk is 0.4 s
        np.testing.assert_array_equal(ask(s, observation)["actions"], action[16:24])
        np.testing.assert_array_equal(ask(s, {**observation, "reset": True})["actions"], action[:8])


def test_predict_gives_the_recorded_streams(policy, episode):
    found = policy.predict("image -> action[4], image.front@+8, text, video[2]", {"options": {"step": 1}})
    np.testing.assert_array_equal(found["action"], episode["action"][1:5])
    np.testing.assert_array_equal(found["image.wrist"], episode["image.wrist"][2:4])
    assert found["text"] == "pick up the cup"
    assert policy.predict("policy", {})["action"].shape == (8, 4)
    assert policy.predict("-> image.front@end", {})["image.front"].shape == (16, 24, 3)
    with pytest.raises(ServeError, match="latent"):
        policy.predict("image -> latent", {})
    with pytest.raises(ServeError, match="polcy"):
        policy.predict("polcy", {})


@pytest.mark.parametrize(
    ("change", "words"),
    [({"horizon": 0}, "horizon"), ({"embodiments": {}}, "embodiment"), ({"embodiments": {"a": {}}}, "not valid")],
)
def test_a_broken_contract_is_refused_at_the_start(policy, change, words):
    class Broken(ReplayPolicy):
        def contract(self):
            return {**super().contract(), **change}

    policy.__class__ = Broken
    with pytest.raises(ServeError, match=words):
        Contract.from_policy(policy)
