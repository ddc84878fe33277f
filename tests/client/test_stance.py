"""Where a robot stands that executes nothing: its last command while it only sags, its state where it was moved."""

import dataclasses

import numpy as np
import pytest
from mmseq_client import ActionGate, Stance

from mmseq.serving.safety import GateConfig, SafetyGate
from mmseq.testing import tiny

LAST = np.float32([0.5, 0.5, 0.5, 1.0])


def body(form: str = "absolute", names: tuple[str, ...] = ("x", "y", "z")):
    robot = tiny.embodiment()
    axes = dataclasses.replace(robot.action, max_step=(0.05,) * 4)
    proprio = dataclasses.replace(robot.proprio, names=names)
    return dataclasses.replace(robot, action=axes, proprio=proprio, action_form=form)


def stance(robot) -> Stance:
    return Stance(ActionGate(robot.to_dict()))


def seen(*state: float) -> dict:
    return {"observation.state": np.float32(state)}


def test_both_ends_see_the_same():
    robot = body(names=("y", "x", "other"))
    ours = stance(robot)
    for state in ([0.2, -0.3, 0.5], [9, -9, 0]):
        theirs = SafetyGate(GateConfig()).observed(np.float32(state), robot)
        np.testing.assert_array_equal(ours.stands(seen(*state), None), theirs)
        assert np.isnan(theirs).tolist() == [False, False, True, True]


@pytest.mark.parametrize("wrong", [[1, 2], "here", None, [[1, 2, 3]]])
def test_a_state_that_is_none_is_told_once(wrong, caplog):
    ours = stance(body())
    for _ in range(3):
        assert np.isnan(ours.stands({"observation.state": wrong}, None)).all()
        np.testing.assert_array_equal(ours.stands({"observation.state": wrong}, LAST), LAST)
    assert caplog.text.count("max_step does not limit the first action") == 1


def test_robots_without_a_place_are_where_they_were_commanded():
    for form in ("delta", "velocity"):
        assert np.isnan(stance(body(form)).stands(seen(0, 0, 0), None)).all()
        np.testing.assert_array_equal(stance(body(form)).stands(seen(0, 0, 0), LAST), LAST)


def test_an_arm_that_sags_is_where_it_was_commanded_and_one_that_was_moved_is_where_it_is():
    ours = stance(body())
    ours.moves(seen(0.5, 0.2, 0.5), LAST)  # y sags by 0.3
    np.testing.assert_array_equal(ours.stands(seen(0.5, 0.2, 0.5), LAST), LAST)
    np.testing.assert_array_equal(ours.stands(seen(0.46, 0.16, 0.54), LAST), LAST)
    moved = ours.stands(seen(0.4, 0.1, 0.5), LAST)
    np.testing.assert_allclose(moved, [0.4, 0.1, 0.5, 1.0])  # the gripper stays
    ours.moves(seen(0.5, 0.5, -0.9), LAST)  # no torque: its commands ran away
    np.testing.assert_allclose(ours.stands(seen(0.5, 0.5, -0.9), LAST), [0.5, 0.5, -0.9, 1.0])
