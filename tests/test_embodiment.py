"""The contract of a robot: complete, fingerprinted, and enforced value by value."""

import dataclasses
import json

import numpy as np
import pytest

from mmseq.embodiment import Axes, Embodiment, Gripper
from mmseq.errors import EmbodimentError, EpisodeError, FingerprintError
from mmseq.testing import tiny


def test_it_survives_the_disk(tmp_path):
    robot = tiny.embodiment()
    robot.save(tmp_path / "arm.json")
    again = Embodiment.load(tmp_path / "arm.json")
    assert again == robot
    assert again.fingerprint == robot.fingerprint


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rate_hz": 10.0}, "rate_hz: 20.0 against 10.0"),
        ({"action_form": "absolute"}, "action_form: delta against absolute"),
        ({"grippers": (Gripper(axis="g", open=1.0, closed=-1.0),)}, "gripper.closed: 1.0 against -1.0"),
        ({"proprio": None}, "proprio"),
    ],
)
def test_a_mismatch_names_the_field(change, named):
    robot = tiny.embodiment()
    other = dataclasses.replace(robot, **change)
    assert other.fingerprint != robot.fingerprint
    with pytest.raises(FingerprintError, match="between the model and the robot") as caught:
        robot.require_same(other, mine="the model", theirs="the robot")
    assert named in str(caught.value)


def test_statistics_come_from_the_values():
    values = np.linspace(-1, 1, 101)[:, None] * [1.0, 2.0]
    found = Axes.from_values(values, ["a", "b"], ["m", "rad"], margin=0.1)
    np.testing.assert_allclose(found.low, [-1.0, -2.0], rtol=1e-5)
    np.testing.assert_allclose(found.high, [1.0, 2.0], rtol=1e-5)
    np.testing.assert_allclose(found.minimum, [-1.2, -2.4], rtol=1e-5)
    found.check(values, what="action", where="here")
    for none in (np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 2))):
        with pytest.raises(EpisodeError, match="shape"):
            Axes.from_values(none)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.full((3, 3), np.nan), "axis 'x' is nan at step 0"),
        (np.array([[0, 0, 0], [0, 0, np.inf]]), "axis 'z' is inf at step 1"),
        (np.array([[0, 0, 0], [0, 1.5, 0]]), "axis 'y' is 1.5 at step 1, outside"),
        (np.zeros((3, 2)), r"shape \(3, 2\), expected \(steps, 3\)"),
        (np.array([["a", "b", "c"]]), "expected numbers"),
    ],
)
def test_a_bad_value_is_named_with_axis_and_step(values, says):
    with pytest.raises(EpisodeError, match=says):
        tiny.axes("xyz").check(values, what="action", where="episode 'e'")


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "../arm"},
        {"name": 3},
        {"rate_hz": 0},
        {"rate_hz": -1},
        {"rate_hz": float("nan")},
        {"rate_hz": float("inf")},
        {"action": None},  # of which one axis is the gripper
        {"action_form": "torque"},
        {"grippers": (Gripper(axis="thumb", open=0, closed=1),)},
        {"grippers": (Gripper(axis="g", open=3, closed=4),)},
        {"grippers": (Gripper(axis="g", open=-1, closed=1e39),)},
    ],
)
def test_an_incomplete_contract_is_refused(change):
    with pytest.raises(EmbodimentError):
        dataclasses.replace(tiny.embodiment(), **change)


@pytest.mark.parametrize(
    "change",
    [{"low": (0.0,)}, {"high": (float("inf"),) * 3}, {"low": (2.0,) * 3}, {"units": ()}, {"maximum": (-2.0,) * 3}],
)
def test_axes_that_contradict_themselves_are_refused(change):
    with pytest.raises(EmbodimentError):
        dataclasses.replace(tiny.axes("xyz"), **change)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "a"}', '{"name": "a", "rate_hz": 5, "wheels": 4}', '"a"'])
def test_a_broken_file_is_an_embodiment_error(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(EmbodimentError):
        Embodiment.load(tmp_path / "bad.json")
    with pytest.raises(EmbodimentError, match="cannot read"):
        Embodiment.load(tmp_path / "absent.json")


def test_the_dictionary_is_plain_json():
    data = tiny.embodiment().to_dict()
    assert json.loads(json.dumps(data)) == data


def test_the_largest_step_is_part_of_the_contract_only_where_it_is_stated(tmp_path):
    robot = tiny.embodiment()
    assert robot.fingerprint == "4d838162f1a236b4"  # as before there was a max_step
    assert "max_step" not in robot.to_dict()["action"]
    slow = dataclasses.replace(robot, action=dataclasses.replace(robot.action, max_step=[0.5] * len(robot.action)))
    assert slow.fingerprint != robot.fingerprint
    slow.save(tmp_path / "slow.json")
    assert Embodiment.load(tmp_path / "slow.json") == slow
    for steps in ([0.5], [0.5, 0, 1, 1], [float("inf")] * 4):
        with pytest.raises(EmbodimentError, match="max_step"):
            dataclasses.replace(robot.action, max_step=steps)


@pytest.mark.parametrize("name", ["low", "high", "minimum", "maximum", "max_step"])
def test_numbers_that_float32_has_not_are_refused(name):
    with pytest.raises(EmbodimentError, match=name):
        dataclasses.replace(tiny.axes("x"), **{name: (1e39,)})


def test_one_gripper_is_written_as_one_and_several_as_a_list():
    robot, names = tiny.embodiment(), ("x", "y", "z", "g")
    two = (*robot.grippers, Gripper(axis="z", open=0.0, closed=1.0))
    for grippers, written in (((), None), (robot.grippers, {"axis": "g", "open": -1.0, "closed": 1.0})):
        one = dataclasses.replace(robot, grippers=grippers)
        assert one.to_dict()["gripper"] == written
        assert "grippers" not in one.to_dict()
        assert Embodiment.from_dict(one.to_dict()) == one
        assert Embodiment.from_dict(one.to_dict() | {"gripper": [] if written is None else [written]}) == one
    both = dataclasses.replace(robot, grippers=two)
    assert [g["axis"] for g in both.to_dict()["gripper"]] == ["g", "z"]
    assert Embodiment.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    assert both.fingerprint != robot.fingerprint
    assert both.differences(robot)[0].startswith("gripper: [{")
    assert both.action.names == names


@pytest.mark.parametrize(("least", "passes"), [(-0.89, False), (-0.91, True), (-0.71, False)])
def test_a_gripper_may_lie_a_tenth_beyond_its_axis(least, passes):
    robot = tiny.embodiment()
    axes = dataclasses.replace(robot.action, minimum=(-1.5, -1.5, -1.5, least), low=(-0.5,) * 4)
    grippers = (Gripper(axis="g", open=-1.0, closed=0.0),)
    if passes:
        assert dataclasses.replace(robot, action=axes, grippers=grippers).grippers == grippers
        return
    with pytest.raises(EmbodimentError, match="the gripper's open is -1, axis 'g' is limited to"):
        dataclasses.replace(robot, action=axes, grippers=grippers)


def test_a_gripper_may_lie_exactly_a_tenth_beyond_its_axis():
    robot = tiny.embodiment()
    axes = dataclasses.replace(robot.action, minimum=(1.0,) * 4, maximum=(9.0,) * 4, low=(1.0,) * 4, high=(9.0,) * 4)
    grippers = (Gripper(axis="g", open=0.0, closed=10.0),)
    assert dataclasses.replace(robot, action=axes, grippers=grippers).grippers == grippers


@pytest.mark.parametrize("ends", [{"open": float("nan")}, {"closed": float("nan")}, {"closed": float("inf")}])
def test_a_gripper_has_two_finite_ends(ends):
    gripper = Gripper(**{"axis": "g", "open": -1.0, "closed": 1.0} | ends)
    with pytest.raises(EmbodimentError, match="open and closed must be finite"):
        dataclasses.replace(tiny.embodiment(), grippers=(gripper,))


def test_the_largest_number_of_float32_is_one():
    most = float(np.finfo(np.float32).max)
    for name in ("high", "maximum", "max_step"):
        assert getattr(dataclasses.replace(tiny.axes("x"), **{name: (most,)}), name) == (most,)


def test_an_axis_is_one_gripper():
    robot = tiny.embodiment()
    with pytest.raises(EmbodimentError, match="an axis is a gripper twice"):
        dataclasses.replace(robot, grippers=robot.grippers * 2)


@pytest.mark.parametrize("key", ["gripper", "grippers"])
def test_both_spellings_of_a_gripper_are_read(key):
    data = tiny.embodiment().to_dict()
    one = data.pop("gripper")
    assert Embodiment.from_dict({**data, key: [one]}).grippers == tiny.embodiment().grippers
    with pytest.raises(EmbodimentError, match="both gripper and grippers"):
        Embodiment.from_dict({**data, "gripper": one, "grippers": [one]})


@pytest.mark.parametrize("name", ["mask", "camera_0", "past", "vision", "structure", "streams", "state", "policy"])
def test_a_further_stream_takes_no_name_that_means_something_else(name):
    with pytest.raises(EmbodimentError, match="is no free name of a stream"):
        tiny.embodiment().with_vectors({name: tiny.axes("ab")})


@pytest.mark.parametrize("name", ["proprio", "action", "text", "image", "latent", "2nd", "a-b", "a.b", "", "imag"])
def test_a_further_stream_has_a_name_of_its_own(name):
    with pytest.raises(EmbodimentError, match="the further stream"):
        dataclasses.replace(tiny.embodiment(), streams={name: tiny.axes("ab")})


@pytest.mark.parametrize("name", ["force", "motion", "_tactile2"])
def test_a_further_stream_may_be_called(name):
    assert list(tiny.embodiment().with_vectors({name: tiny.axes("ab")}).streams) == [name]


@pytest.mark.parametrize("name", ["front", "front_image"])
def test_a_further_stream_is_not_called_as_a_camera(name):
    with pytest.raises(EmbodimentError, match="is no free name of a stream"):
        tiny.embodiment(cameras=("front",)).with_vectors({name: tiny.axes("ab")})


def test_an_axis_may_have_one_value():
    still = Axes(names=("x",), units=("m",), low=(1.0,), high=(1.0,), minimum=(1.0,), maximum=(1.0,))
    np.testing.assert_array_equal(still.check(np.ones((2, 1)), what="state", where="here"), np.ones((2, 1)))


def test_the_limits_themselves_are_within_them():
    axes = tiny.embodiment().action
    ends = np.array([axes.minimum, axes.maximum])
    np.testing.assert_allclose(axes.check(ends, what="action", where="here"), ends)
    with pytest.raises(EpisodeError, match="outside"):
        axes.check(ends * 1.001, what="action", where="here")
