"""Shifts change what is drawn and nothing else; play is a function of its seed and covers the scene."""

import numpy as np
import pytest

pytest.importorskip("metaworld")

from mmseq.errors import ConfigError
from mmseq.simulation.metaworld import MetaWorldEnv
from mmseq.simulation.play import record_play
from mmseq.simulation.shifts import SHIFTS

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (5, 4))


def filmed(seed: int = 3, **options) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and states of a few steps."""
    env = MetaWorldEnv("drawer-close", **options)
    env.begin(seed)
    pictures, states = [], []
    for action in ACTIONS:
        env.act(action)
        pictures.append(env.render())
        states.append(env.proprio())
    env.close()
    return np.stack(pictures), np.stack(states)


@pytest.fixture(scope="module")
def plain():
    return filmed()


@pytest.mark.parametrize("shift", [name for name in SHIFTS if name != "plain"])
def test_a_shift_changes_the_picture_and_not_what_happens(plain, shift):
    pictures, states = filmed(shift=shift)
    np.testing.assert_array_equal(states, plain[1])
    assert np.abs(pictures.astype(int) - plain[0]).mean() > 1
    again, _ = filmed(shift=shift)
    np.testing.assert_array_equal(again, pictures)
    others, _ = filmed(seed=4, shift=shift)
    bare, _ = filmed(seed=4)
    first, second = (a.astype(int) - b for a, b in ((pictures, plain[0]), (others, bare)))
    assert np.abs(first - second).mean() > 0.5  # another episode is shifted otherwise


def test_the_plain_shift_is_none(plain):
    np.testing.assert_array_equal(filmed(shift="plain")[0], plain[0])


def test_a_hand_floats_where_a_person_has_an_arm():
    hand, states = filmed(body="hand", camera="front")
    person, same = filmed(body="human", camera="front")
    np.testing.assert_array_equal(states, same)
    sleeve = lambda pictures: ((pictures[..., 2].astype(int) - pictures[..., 0]) > 40).sum()
    assert sleeve(person) > 20 * max(1, sleeve(hand))


def test_unknown_shifts_and_bodies_are_named():
    with pytest.raises(ConfigError, match="'lights': did you mean 'light'"):
        MetaWorldEnv("drawer-close", shift="lights")
    with pytest.raises(ConfigError, match="'human' or 'hand'"):
        MetaWorldEnv("drawer-close", body="dog")


def test_play_is_the_same_for_any_number_of_workers_and_goes_everywhere():
    once = list(record_play(["window-open", "dial-turn"], 6, steps=25, seed=5, workers=1))
    again = list(record_play(["window-open", "dial-turn"], 6, steps=25, seed=5, workers=2))
    for a, b in zip(once, again, strict=True):
        assert (a.task, a.seed, len(a)) == (b.task, b.seed, 25)
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.action, b.action)
    assert {e.success for e in once} == {None}
    reached = np.concatenate([e.proprio for e in once])
    assert (np.ptp(reached[:, :3], axis=0) > (0.3, 0.2, 0.12)).all()
    assert len({e.seed for e in once}) == len(once)
    actions = np.concatenate([e.action for e in once])
    assert set(actions[:, 3]) == {-1.0, 1.0}
    assert np.abs(actions).max() <= 1
    other = next(iter(record_play(["window-open"], 1, steps=25, seed=6, workers=1)))
    assert not np.array_equal(other.action, once[0].action)
    episode = once[0].to_episode()
    assert (episode.success, episode.plans) == (None, [])
