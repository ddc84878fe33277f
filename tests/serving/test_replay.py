import dataclasses

import numpy as np
import pytest

from mmseq.errors import ServeError
from mmseq.serving import Contract, ReplayPolicy


def test_chunks_follow_each_other_by_execute(policy, episode):
    for step in (0, 4, 8):
        np.testing.assert_array_equal(policy.infer({})["actions"], episode["action"][step : step + 8])
    np.testing.assert_array_equal(policy.infer({"options": {"step": 2}})["actions"], episode["action"][2:10])


def test_after_the_end_an_absolute_robot_holds_and_others_stop(policy, episode, embodiment):
    np.testing.assert_array_equal(policy.chunk(38, 4)[2:], np.tile(episode["action"][-1], (2, 1)))
    delta = ReplayPolicy(episode, dataclasses.replace(embodiment, action_form="delta"))
    assert not delta.chunk(1000, 4).any()


def test_predict_gives_the_recorded_streams(policy, episode):
    found = policy.predict("image -> action[4], image.front@+8, text, video[2]", {"options": {"step": 1}})
    np.testing.assert_array_equal(found["action"], episode["action"][1:5])
    np.testing.assert_array_equal(found["image.wrist"], episode["image.wrist"][1:3])
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
