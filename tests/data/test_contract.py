"""What a dataset does not say is asked for, and answers are held to the dataset."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from mmseq.data.contract import complete, open_questions, questionnaire, read_answers
from mmseq.embodiment import Embodiment, Gripper
from mmseq.errors import EmbodimentError
from mmseq.testing import tiny

ROBOT = replace(
    tiny.embodiment(),
    name="unknown",
    grippers=(),
    action=replace(tiny.axes("xyg"), names=("x", "y", "gripper.pos")),
)
ANSWERS = {
    "name": "arm",
    "gripper": {"axis": "gripper.pos", "open": 1, "closed": -1},
    "proprio": {"units": "m"},
    "action": {"units": {"x": "m", "y": "m", "gripper.pos": "share"}, "limits": {"x": [-2, 2]}},
}


def test_everything_unknown_is_asked_for_at_once():
    questions = "; ".join(open_questions(ROBOT, {}))
    for part in ("name of the robot", "units of proprio", "units of action", "which value of gripper.pos is open"):
        assert part in questions


def test_answers_complete_the_contract():
    robot = complete(ROBOT, ANSWERS, where="robot.yaml")
    assert isinstance(robot, Embodiment)
    assert robot.name == "arm"
    assert robot.action.units == ("m", "m", "share")
    assert (robot.action.minimum[0], robot.action.maximum[0]) == (-2.0, 2.0)
    assert robot.grippers == (Gripper(axis="gripper.pos", open=1.0, closed=-1.0),)


def test_the_form_names_every_axis_and_becomes_valid_once_it_is_completed(tmp_path):
    form = tmp_path / "embodiment.yaml"
    form.write_text(questionnaire(ROBOT))
    assert set(yaml.safe_load(form.read_text())["action"]["units"]) == set(ROBOT.action.names)
    with pytest.raises(EmbodimentError, match=r"is '\?\?\?'"):
        complete(ROBOT, read_answers(form), where=str(form))
    text = form.read_text().replace("name: ???", "name: arm").replace("open: ???", "open: 1")
    form.write_text(text.replace("closed: ???", "closed: 0").replace(": ???", ": m"))
    assert complete(ROBOT, read_answers(form), where=str(form)).grippers[0].closed == 0
    text = form.read_text()
    at = text.index("# max_step:")
    form.write_text(text[:at] + text[at:].replace("# ", "", 1).replace("  #   ", "    "))
    spans = np.subtract(ROBOT.action.high, ROBOT.action.low)
    np.testing.assert_allclose(complete(ROBOT, read_answers(form), where="form").action.max_step, spans / 10, rtol=0.01)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gripper": {"axis": "gripper.po", "open": 1, "closed": 0}}, "did you mean 'gripper.pos'"),
        ({"gripper": {"axis": "gripper.pos", "open": 1, "closed": 1}}, "are both 1"),
        ({"gripper": {"axis": "gripper.pos", "open": "wide", "closed": 1}}, "gripper.open is 'wide'"),
        ({"gripper": "left"}, "Write {axis: NAME"),
        ({"gripper": [{"axis": "gripper.pos", "open": 1, "closed": 0}] * 2}, "an axis is a gripper twice"),
        ({"gripper": [{"axis": "gripper.pos", "open": 1, "closed": 0}, {"axis": "x"}]}, "gripper is {'axis': 'x'}"),
        ({"action_form": "relative"}, "Use one of absolute, delta, velocity"),
        ({"action": {"units": {"x": "m"}}}, "the units of action y, gripper.pos"),
        ({"action": {"units": {"z": "m"}}}, "action.units names 'z'"),
        ({"action": {"units": {"x": 3}}}, "action.units.x is 3"),
        ({"action": {"units": "m", "limits": {"x": [0, 0.1]}}}, "Check the unit of the limits"),
        ({"action": {"units": "m", "limits": {"x": 1}}}, r"Write \[minimum, maximum\]"),
        ({"action": {"units": "m", "max_step": {"x": "far"}}}, "action.max_step.x is 'far'"),
        ({"action": {"units": "m", "max_step": {"z": 1}}}, "action.max_step names 'z'"),
        ({"action": {"units": "m", "max_step": 0}}, "max_step is 0"),
    ],
)
def test_answers_that_do_not_fit_are_named(change, says):
    with pytest.raises(EmbodimentError, match=says.replace("{", r"\{")):
        complete(ROBOT, {**ANSWERS, **change}, where="robot.yaml")


def test_a_largest_step_for_some_axes_leaves_the_others_free():
    given = {**ANSWERS, "action": {"units": "m", "max_step": {"x": 0.25}}}
    action = complete(ROBOT, given, where="robot.yaml").action
    spans = [high - low for low, high in zip(action.minimum, action.maximum)]
    assert action.max_step == (0.25, *spans[1:])
    assert complete(ROBOT, ANSWERS, where="robot.yaml").action.max_step is None


@pytest.mark.parametrize("text", ["gripr: 1", "- 1", "action: {unit: m}", "action: [m]", "a: [", "\x00"])
def test_files_that_are_no_contract_are_refused(tmp_path, text):
    (tmp_path / "robot.yaml").write_text(text)
    with pytest.raises(EmbodimentError):
        read_answers(tmp_path / "robot.yaml")


def test_stated_limits_decide_which_values_are_real():
    values = np.linspace(-1, 1, 1000)[:, None].repeat(3, 1)
    values[[7, 8], 0], values[9, 1] = 1e4, 6.0  # it stays for two steps, so the statistics take it for a motion
    robot = replace(ROBOT, action=replace(ROBOT.action, high=(1e4, 1.0, 1.0), maximum=(2e4, 1.2, 1.2)))
    answers = {**ANSWERS, "action": {"units": "m", "limits": {"x": [-2, 2], "y": [-2, 8]}}}
    action = complete(robot, answers, where="robot.yaml", values={"action": values}).action
    assert (action.low, action.high) == ((-1.0,) * 3, (1.0, 6.0, 1.0))
    assert (action.minimum[:2], action.maximum[:2]) == ((-2.0, -2.0), (2.0, 8.0))
    answers["action"]["limits"] = {"x": [-0.95, 2]}
    complete(robot, answers, where="robot.yaml", values={"action": values})
    answers["action"]["limits"] = {"x": [-0.75, 2]}
    with pytest.raises(EmbodimentError, match="Check the unit"):
        complete(robot, answers, where="robot.yaml", values={"action": values})
    with pytest.raises(EmbodimentError, match=r"the data reach from -1 to 10000\. Check the unit"):
        complete(robot, {**ANSWERS, "action": {"units": "m", "limits": {"x": [-2, 2]}}}, where="robot.yaml")


def two_arms(names=("left_x", "left_gripper", "rightGripper")) -> Embodiment:
    return replace(ROBOT, action=replace(tiny.axes("xyg"), names=names))


def test_each_gripper_of_several_is_asked_for_and_stated(tmp_path):
    robot = two_arms()
    assert any("which value of left_gripper and of rightGripper is open" in q for q in open_questions(robot, {}))
    text = questionnaire(robot).replace("name: ???", "name: two").replace("open: ???", "open: 1")
    (tmp_path / "form.yaml").write_text(text.replace("closed: ???", "closed: 0").replace(": ???", ": m"))
    found = complete(robot, read_answers(tmp_path / "form.yaml"), where="form")
    assert found.grippers == tuple(Gripper(axis=a, open=1.0, closed=0.0) for a in ("left_gripper", "rightGripper"))
    assert complete(robot, {**ANSWERS, "action": {"units": "m"}, "gripper": None}, where="form").grippers == ()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *((n, True) for n in ("gripper", "gripper.pos", "left_gripper", "RightGripper", "jaw", "left_hand", "GRIPPER")),
        *((n, False) for n in ("kLeftHandThumbBend", "hand_joint_1", "gripper_x", "gripper.yaw", "jawbone", "elbow")),
    ],
)
def test_what_is_asked_for_as_a_gripper_opens_and_closes(name, is_one):
    asked = [q for q in open_questions(two_arms(("a", "b", name)), {}) if "gripper" in q.partition(" (gripper;")[1]]
    assert bool(asked) == is_one
