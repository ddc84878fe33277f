"""The simulated robot: seeded, rendered upright, and silent about what a robot cannot know."""

import os

import numpy as np
import pytest

from mmseq.errors import ConfigError

pytest.importorskip("metaworld")

from mmseq.simulation.base import quantise
from mmseq.simulation.experts import DEMO_TASKS, TASKS, VIDEO_TASKS, replay, run_expert, task_language
from mmseq.simulation.gl import choose_gl
from mmseq.simulation.metaworld import MetaWorldEnv


@pytest.fixture(scope="module")
def env():
    with MetaWorldEnv("button-press-topdown", seed=0) as env:
        yield env


def test_an_observation_is_an_image_and_four_numbers(env):
    env.reset(0)
    observation = env.observe()
    assert set(observation) == {"image.front", "proprio"}
    assert observation["image.front"].shape == (64, 64, 3)
    assert observation["image.front"].dtype == np.uint8
    assert observation["proprio"].shape == (4,)
    assert observation["proprio"].dtype == np.float32
    assert 0 <= observation["proprio"][3] <= 1


def test_a_seed_is_an_episode_whatever_ran_before(env):
    action = np.array([0.3, 1.0, -0.5, 1.0])

    def run(seed: int) -> list[np.ndarray]:
        env.reset(seed)
        frames = [env.render()]
        for _ in range(4):
            env.act(action)
            frames.append(env.render())
        return [*frames, env.proprio()]

    first = run(3)
    other = run(4)
    for a, b in zip(first, run(3)):
        np.testing.assert_array_equal(a, b)
    assert np.abs(first[0].astype(int) - other[0]).max() > 50


def test_proprio_does_not_tell_where_the_object_is(env):
    starts = []
    for seed in range(4):
        env.reset(seed)
        starts.append(env.proprio())
    np.testing.assert_allclose(starts, [starts[0]] * 4, atol=1e-3)


def test_images_are_upright_and_not_mirrored(env):
    """The button is red and stands on its box; raising the hand moves it up, moving it along +x to the right."""
    env.reset(0)
    image = env.render().astype(int)
    red = np.argwhere((image[..., 0] > 150) & (image[..., 1] < 60))
    yellow = np.argwhere((image[..., 0] > 150) & (image[..., 1] > 110) & (image[..., 2] < 60))
    assert red[:, 0].mean() < yellow[:, 0].mean()

    def hand(direction) -> np.ndarray:
        env.reset(0)
        for _ in range(6):
            env.act(direction)
        pixels = env.render().astype(int)
        return np.argwhere((pixels[..., 2] > 180) & (pixels[..., 0] < 90)).mean(0)  # the cyan finger pad

    ahead, up, right = hand([0, 0.6, 0, -1]), hand([0, 0.6, 0.6, -1]), hand([0.6, 0.6, 0, -1])
    assert up[0] < ahead[0] - 3
    assert right[1] > ahead[1] + 3


def test_the_goal_is_not_in_the_image():
    """In `reach` everything stays where it is but the goal, which Meta-World marks and we do not show."""
    with MetaWorldEnv("reach", seed=0) as env:

        def move_goal(shift) -> np.ndarray:
            env._env._target_pos = env._env._target_pos + np.array(shift)
            env._env._set_pos_site("goal", env._env._target_pos)
            return env.render()

        image = env.render()
        np.testing.assert_array_equal(move_goal((0.1, 0.0, 0.1)), image)
        env._options.sitegroup[:] = 1
        shown = env.render()
        assert (shown != image).any()
        assert (move_goal((-0.1, -0.1, -0.1)) != shown).any()


def test_the_other_camera_and_body_show_something_else():
    with MetaWorldEnv("drawer-open", seed=0, camera="human", body="human", size=32) as env:
        image = env.render().astype(int)
    assert image.shape == (32, 32, 3)
    skin = (image[..., 0] > 180) & (np.abs(image[..., 1] - 150) < 40) & (image[..., 2] < 160)
    robot_red = (image[..., 0] > 100) & (image[..., 1] < 40) & (image[..., 2] < 40)
    assert skin.sum() > 5
    assert robot_red.sum() == 0


def test_the_expert_succeeds_through_64_bins(env):
    for seed in (11, 12):
        actions = run_expert(env, seed, bins=64)
        assert env.succeeded
        assert replay(env, seed, actions)
        levels = (np.stack(actions) + 1) / 2 * 63
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
    assert quantise(np.array([-1.0, 1.0])).tolist() == [-1.0, 1.0]


def test_wrong_names_and_actions_are_refused(env):
    with pytest.raises(ConfigError, match="did you mean 'door-open'"):
        MetaWorldEnv("door-opem")
    with pytest.raises(ConfigError, match="divisor of 80"):
        MetaWorldEnv("door-open", rate_hz=30)
    with pytest.raises(ConfigError, match="human"):
        MetaWorldEnv("door-open", camera="humen")
    with pytest.raises(ConfigError, match="4 finite numbers"):
        env.act([0.0, np.nan, 0.0, 0.0])
    with pytest.raises(ConfigError, match="did you mean"):
        task_language("door-opem")


def test_every_task_has_words():
    assert len(TASKS) >= 12
    assert len(DEMO_TASKS) == 6
    assert not set(DEMO_TASKS) & set(VIDEO_TASKS)
    sentences = [text for language in TASKS.values() for text in language.instructions]
    assert len(sentences) == len(set(sentences))
    for language in TASKS.values():
        assert len(language.instructions) >= 4
        assert ", then " in language.plan


def test_the_gl_library_is_chosen_only_when_it_is_not_given(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    choose_gl()
    assert os.environ["MUJOCO_GL"] == "osmesa"
