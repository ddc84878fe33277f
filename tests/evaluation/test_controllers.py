"""What drives in place of a policy comes from the robot's contract, not from one simulator's constants."""

from dataclasses import replace

import numpy as np
import pytest
from mmseq_client.rules import resting_action

from mmseq.embodiment import Axes, Gripper
from mmseq.errors import ConfigError
from mmseq.evaluation.controllers import OTHER_LAYOUT, make_controller
from mmseq.testing import tiny


def robot(form: str):
    axes = Axes(
        names=("x", "y", "left", "right"),
        units=("m",) * 4,
        low=(0.0, -1.0, 0.0, -1.0),
        high=(4.0, 1.0, 1.0, 0.0),
        minimum=(0.0, -2.0, 0.0, -1.0),
        maximum=(8.0, 2.0, 1.0, 0.0),
    )
    grippers = (Gripper(axis="left", open=1.0, closed=0.0), Gripper(axis="right", open=-1.0, closed=0.0))
    proprio = replace(tiny.axes("xz"), units=("m", "m"), minimum=(0.0, -9.0), maximum=(9.0, 9.0), low=(0.0, 0.0))
    return replace(tiny.embodiment(), action=axes, proprio=proprio, action_form=form, grippers=grippers)


class Line:
    """A simulator without physics: it succeeds at its third step. The expert says the seed and the step."""

    task, steps, succeeded = "line", 0, False

    def __init__(self, form: str, expert: bool = True):
        self._form, self._expert = form, expert
        self.reset(0)

    def contract(self):
        return robot(self._form)

    def reset(self, seed):
        self.seed, self.steps, self.succeeded = seed, 0, False

    def observe(self):
        return {"proprio": np.float32([3, 5])}

    def act(self, action):
        self.steps += 1
        self.succeeded = self.steps == 3
        return self.succeeded

    def expert(self):
        return (lambda: np.float32([self.seed, 0.1 + self.steps, 0, 0])) if self._expert else None


def test_a_robot_that_nobody_commanded_stands_still_with_its_grippers_open():
    for form, expected in (("delta", [0, 0, 1, -1]), ("velocity", [0, 0, 1, -1]), ("absolute", [3, 0, 1, -1])):
        np.testing.assert_array_equal(resting_action(robot(form).to_dict(), np.float32([3, 5])), expected)
    np.testing.assert_array_equal(resting_action(robot("absolute").to_dict(), None), [4, 0, 1, -1])
    far = resting_action(robot("absolute").to_dict(), np.float32([99, 0]))
    np.testing.assert_array_equal(far, [8, 0, 1, -1])


def controller(name, env, **changes):
    return make_controller(name, env, 10, np.random.default_rng(0), **{"bins": 3, "max_steps": 9, **changes})


def test_random_actions_fill_the_limits():
    act = controller("random", Line("delta"))
    drawn = np.stack([act() for _ in range(500)])
    axes = robot("delta").action
    assert (drawn >= axes.minimum).all()
    assert (drawn <= axes.maximum).all()
    assert (drawn.max(0) - drawn.min(0) > 0.9 * np.subtract(axes.maximum, axes.minimum)).all()
    assert drawn.dtype == np.float32


def test_hold_replay_and_the_expert_through_bins():
    env = Line("delta")
    np.testing.assert_array_equal(controller("hold", env)(), [0, 0, 1, -1])
    act = controller("replay", env)
    assert (env.seed, env.steps) == (10, 0)
    replayed = np.stack([act() for _ in range(4)])
    np.testing.assert_array_equal(replayed[:, 0], [10 + OTHER_LAYOUT] * 3 + [0])
    np.testing.assert_allclose(replayed[:3, 1], [0.1, 1.1, 2.1], rtol=1e-6)
    short = controller("replay", env, max_steps=1)
    assert [short()[0], short()[0]] == [10 + OTHER_LAYOUT, 0]
    env.reset(3)
    np.testing.assert_array_equal(controller("expert_tokens", env)(), [4, 0, 0, 0])  # of 0, 2, 4 and -1, 0, 1
    for name in ("replay", "expert_tokens"):
        with pytest.raises(ConfigError, match="no expert for 'line'"):
            controller(name, Line("delta", expert=False))
