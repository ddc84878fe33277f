"""Retargeting: what a robot would have been told, from where its hand went."""

from dataclasses import replace

import numpy as np
import pytest

from mmseq.errors import DataError, EpisodeError
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


def test_a_hand_becomes_the_robot_that_moves_as_it_did(fitted):
    hand = recorded(97)
    del hand.streams["action"]
    assert fitted.retargeted(replace(hand, embodiment=None)).embodiment == tiny.embodiment().name


def of(seed: int, **changed):
    """A recorded episode with streams left out or changed, or another rate or name."""
    episode = recorded(seed, changed.pop("length", 60))
    for name in changed.pop("without", ()):
        del episode.streams[name]
    if "at" in changed:
        name, value = changed.pop("at")
        episode.streams[name].values[5, 1] = value
    return replace(episode, **changed)


def test_nothing_is_fitted_to_what_does_not_fit():
    robot = tiny.embodiment()
    for lacking in ("action", "proprio"):
        with pytest.raises(DataError, match="no episode of 'arm'"):
            Retargeting.fit([of(0, without=[lacking])], robot)
    for contract in (replace(robot, proprio=None), tiny.embodiment("another")):
        with pytest.raises(DataError, match="no episode"):
            Retargeting.fit([recorded(0)], contract)
    with pytest.raises(DataError, match="10 steps of 'arm' are too few to fit 22 numbers"):
        Retargeting.fit([of(0, length=10)], robot)
    with pytest.raises(DataError, match=r"10 steps per second.*20.*--rate-hz 20"):
        Retargeting.fit([recorded(1), of(0, rate_hz=10.0)], robot)
    for name, axis in (("proprio", "y"), ("action", "y")):
        for value in (np.nan, 7.0):
            with pytest.raises(EpisodeError, match=f"'tiny-0': {name} axis '{axis}' is .* at step 5"):
                Retargeting.fit([recorded(1), of(0, at=(name, value))], robot)


def test_others_episodes_do_not_change_what_is_fitted(fitted):
    others = [of(20, embodiment="another"), of(21, without=["action"])]
    again = Retargeting.fit([*(recorded(seed) for seed in range(8)), *others], tiny.embodiment())
    np.testing.assert_array_equal(again.weights, fitted.weights)


def test_an_axis_that_never_moves_is_no_hindrance():
    still = [recorded(seed) for seed in range(8)]
    for episode in still:
        episode["proprio"][:, 2] = 0.25
    found = Retargeting.fit(still, tiny.embodiment())
    held = recorded(99)
    held["proprio"][:, 2] = 0.25
    assert np.corrcoef(found.actions(held["proprio"])[3:-4, 0], held["action"][3:-4, 0])[0, 1] > 0.95


def test_states_that_say_nothing_are_refused(fitted):
    for wrong in (np.zeros((5, 4)), np.zeros(3), np.zeros((0, 3))):
        with pytest.raises(DataError, match="states have shape"):
            fitted.actions(wrong)
    states = recorded(0)["proprio"]
    states[[7, 9], 1] = np.nan
    with pytest.raises(DataError, match="not finite at step 7, and at 2 of 60"):
        fitted.actions(states)
    with pytest.raises(DataError, match="10 steps per second"):
        fitted.retargeted(of(0, rate_hz=10.0))
    with pytest.raises(EpisodeError, match="no stream 'proprio'"):
        fitted.retargeted(of(0, without=["proprio"]))
