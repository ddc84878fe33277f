"""Simulators behind one protocol, and Meta-World as an environment of Gymnasium."""

import numpy as np
import pytest

from mmseq import plugins
from mmseq.errors import ConfigError
from mmseq.simulation.base import open_simulator, quantise, to_wire

pytest.importorskip("metaworld")


def test_gymnasium_finds_nothing_wrong_with_meta_world():
    from gymnasium.utils.env_checker import check_env

    env = open_simulator("metaworld", "drawer-close", seed=3, size=32)
    check_env(env)
    observation, _ = env.reset(seed=3)
    assert observation["image.front"].shape == (32, 32, 3)
    expert, rewards, ended = env.expert(), [], False
    while not ended:
        observation, reward, ended, truncated, info = env.step(expert())
        rewards.append(reward)
        assert len(rewards) < 90
    assert (sum(rewards), reward, truncated, info["success"]) == (1, 1, False, True)
    assert env.steps == len(rewards)
    env.reset()
    first = env.seed
    env.reset()
    assert first != env.seed
    env.close()


def test_the_contract_is_of_what_is_observed():
    env = open_simulator(
        "metaworld", "reach" if "reach" in plugins.find("simulators", "metaworld").tasks() else "door-open"
    )
    robot = env.contract()
    assert [f"image.{camera.name}" for camera in robot.cameras] == [k for k in env.observe() if k.startswith("image")]
    assert env.observation_space["proprio"].shape == (len(robot.proprio),)
    np.testing.assert_array_equal(env.action_space.low, robot.action.minimum)
    assert env.instructions[0]
    env.close()


def test_another_simulator_is_a_plug_in(monkeypatch):
    monkeypatch.setitem(plugins._registered["simulators"], "mine", lambda task, size=1: (task, size))
    assert open_simulator("mine", "push", size=3) == ("push", 3)
    with pytest.raises(ConfigError, match="no 'metawurld' among the simulators: did you mean 'metaworld'"):
        open_simulator("metawurld", "push")


def test_an_observation_goes_out_under_the_contracts_names():
    seen = {"image.front": np.zeros(1), "image.wrist": np.ones(1), "proprio": np.zeros(2), "force": np.zeros(3)}
    keys = lambda cameras: sorted(key.removeprefix("observation.") for key in to_wire(seen, cameras))
    assert keys(["wrist", "front"]) == ["force", "images.front", "images.wrist", "state"]
    assert keys(["cam0", "cam1"]) == ["force", "images.cam0", "images.cam1", "state"]
    assert to_wire(seen, ["wrist", "front"])["observation.images.wrist"] == 1
    assert to_wire(seen, ["cam0", "cam1"])["observation.images.cam1"] == 1


def test_bins_lie_between_the_limits_of_each_axis():
    found = quantise(np.array([0.2, 9.0, -3.0]), 3, [0, 0, -1], [1, 10, 1])
    np.testing.assert_array_equal(found, [0, 10, -1])
    np.testing.assert_array_equal(quantise(np.array([0.3, 1.0]), 3, [0, 1], [1, 1]), [0.5, 1])
    assert found.dtype == np.float32
