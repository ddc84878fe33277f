"""Retargeting: what a robot would have been told, from where its hand went."""

import numpy as np
import pytest

from mmseq.errors import DataError
from mmseq.labelling.retargeting import Retargeting
from mmseq.testing import tiny


def recorded(seed: int, length: int = 60):
    """An arm whose state follows its commands with a lag, and a gripper that is open or closed."""
    rng = np.random.default_rng(seed)
    episode, action = tiny.episode(seed, length), rng.uniform(-0.8, 0.8, (length, 4)).astype(np.float32)
    action[:, 3] = np.where(np.arange(length) // 7 % 2, 1.0, -1.0)
    set_point = 0.02 * np.cumsum(action[:, :2], axis=0)
    state = np.zeros((length, 3), np.float32)
    for t in range(1, length):
        state[t, :2] = state[t - 1, :2] + 0.6 * (set_point[t - 1] - state[t - 1, :2])
        state[t, 2] = action[t - 1, 3]
    for name, values in (("action", action), ("proprio", state)):
        episode.streams[name].values = values
    return episode


@pytest.fixture(scope="module")
def fitted():
    return Retargeting.fit([recorded(seed) for seed in range(8)], tiny.embodiment())


def test_actions_follow_from_where_the_hand_was(fitted):
    held = recorded(99)
    found = fitted.actions(held["proprio"])[3:-4]
    true = held["action"][3:-4]
    for axis in (0, 1):
        assert np.corrcoef(found[:, axis], true[:, axis])[0, 1] > 0.95
    np.testing.assert_array_equal(found[:, 3], true[:, 3])  # a switch is one of its two values
    assert fitted.switches == {3: (-1.0, 1.0)}


def test_actions_stay_within_the_contract(fitted):
    wild = 100 * np.random.default_rng(0).normal(size=(20, 3))
    found = fitted.actions(wild)
    axes = tiny.embodiment().action
    assert (found >= np.float32(axes.minimum)).all()
    assert (found <= np.float32(axes.maximum)).all()


def test_an_episode_of_poses_becomes_one_with_actions(fitted):
    held = recorded(98)
    poses = {name: stream for name, stream in held.streams.items() if name != "action"}
    became = fitted.retargeted(type(held)(id="p", rate_hz=held.rate_hz, streams=poses, embodiment=held.embodiment))
    assert set(became.streams) == set(held.streams)
    np.testing.assert_array_equal(became["action"], fitted.actions(held["proprio"]))
    np.testing.assert_array_equal(became.streams["action"].times, held.streams["proprio"].times)
    assert "action" not in poses
    assert len(fitted.actions(held["proprio"][:1])) == 1


def test_without_actions_nothing_is_fitted():
    episode = recorded(0)
    del episode.streams["action"]
    with pytest.raises(DataError, match="no episode"):
        Retargeting.fit([episode], tiny.embodiment())
