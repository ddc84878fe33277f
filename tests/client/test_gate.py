import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmseq_client import ActionGate, ContractError, UnsafeActionError, rest_action, zero_action
from mmseq_client.rules import Breach, inward

from mmseq.embodiment import Gripper
from mmseq.serving.errors import RequestError
from mmseq.serving.safety import GateConfig, SafetyGate
from mmseq.testing import tiny


@pytest.fixture(scope="module")
def contract(embodiment) -> dict:
    small = dataclasses.replace(
        embodiment, action=dataclasses.replace(embodiment.action, minimum=(-1,) * 4, maximum=(2,) * 4)
    )
    body = small.to_dict()
    body["action"]["max_step"] = [0.5, 0.5, 0.5, 2.0]
    return body


def chunk(steps: int = 4) -> np.ndarray:
    return np.zeros((steps, 4), np.float32)


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        (None, "shape"),
        ("0 0 0 0", "shape"),
        (np.zeros((4, 3), np.float32), "shape"),
        (np.zeros((3, 4), np.float32), "shape"),
        (np.zeros(4, np.float32), "shape"),
        (np.full((4, 4), "0"), "shape"),
        (np.full((4, 4), np.nan, np.float32), "not_finite"),
        (np.full((4, 4), 1e300), "not_finite"),
    ],
)
def test_what_is_no_chunk_is_withheld_in_every_configuration(contract, actions, reason):
    for configured in ("clamp", "refuse"):
        gate = ActionGate(contract, configured)
        with pytest.raises(UnsafeActionError, match=reason):
            gate.check_chunk(actions, 4)
        assert gate.counts[reason] == 1


def test_limits_are_clamped_or_refused_and_the_gripper_stays_between_open_and_closed(contract):
    actions = chunk()
    actions[1] = (3, -5, 0, 1.5)
    gate = ActionGate(contract)
    np.testing.assert_array_equal(gate.check_chunk(actions, 4)[1], [2, -1, 0, 1])
    assert gate.counts["clamped_range"] == 3
    with pytest.raises(UnsafeActionError, match=r"axis 'x' is 3 at step 1, outside -1\.\.2"):
        ActionGate(contract, "refuse").check_chunk(actions, 4)


def test_the_change_per_control_step_is_limited_from_the_action_before(contract):
    actions = np.ones((4, 4), np.float32)
    gate = ActionGate(contract)
    gate.limit_steps(actions, np.zeros(4, np.float32))
    np.testing.assert_allclose(actions[:, 0], [0.5, 1, 1, 1])
    np.testing.assert_allclose(actions[:, 3], 1)
    actions = np.ones((4, 4), np.float32)
    gate.limit_steps(actions, None)  # nothing was executed yet
    np.testing.assert_allclose(actions, 1)
    with pytest.raises(UnsafeActionError, match=r"moves from 0 to 1 at step 0; its max_step is 0\.5 m"):
        ActionGate(contract, "refuse").limit_steps(actions, np.zeros(4, np.float32))


def test_an_action_older_than_allowed_is_withheld(contract):
    gate = ActionGate(contract)
    for age in (0, 15):
        gate.check_action(chunk()[0], None, age_steps=age, max_age=16)
    for age in (16, -1):
        with pytest.raises(UnsafeActionError, match="stale"):
            gate.check_action(chunk()[0], None, age_steps=age, max_age=16)


def test_a_contract_without_actions_and_an_unknown_configuration_are_refused(contract):
    with pytest.raises(ContractError, match="no action axes"):
        ActionGate({"name": "eye"})
    with pytest.raises(ContractError, match="clamp or refuse"):
        ActionGate(contract, "ignore")


def test_what_the_server_lets_pass_is_not_withheld_here():
    """Both ends refuse; a gripper that overshoots a little, and steps of large numbers, pass both."""
    body = tiny.embodiment()
    far = {"minimum": (2000.0,) * 3 + (-2.0,), "maximum": (4000.0,) * 3 + (2.0,)}
    far |= {"low": (2000.0,) * 3 + (-1.0,), "high": (4000.0,) * 3 + (1.0,)}
    body = dataclasses.replace(body, action=dataclasses.replace(body.action, max_step=(0.1, 0.1, 0.1, 4.0), **far))
    server, client = (
        SafetyGate(GateConfig(out_of_range="refuse", gripper="refuse")),
        ActionGate(body.to_dict(), "refuse"),
    )
    random = np.random.default_rng(0)
    for _ in range(200):
        before = np.append(random.uniform(2100, 3900, 3), 0).astype(np.float32)
        actions = before + np.cumsum(random.uniform(-0.3, 0.3, (8, 4)), 0).astype(np.float32)
        actions[:, 3] = random.uniform(-1.1, 1.1, 8)
        passed, _ = server.check(actions, body, horizon=8, before=before)
        client.limit_steps(client.check_chunk(passed, 8), before)


def test_a_robot_may_be_allowed_less_than_its_contract(contract):
    gate = ActionGate(contract, max_step=0.1)
    actions = np.ones((4, 4), np.float32)
    gate.limit_steps(actions, np.zeros(4, np.float32))
    np.testing.assert_allclose(actions[0], 0.1)
    np.testing.assert_allclose(ActionGate(contract, max_step=[9, 0.2, 9, 9]).rules.max_step, [0.5, 0.2, 0.5, 2.0])
    for wrong in (0, float("nan"), [1, 2]):
        with pytest.raises(ContractError, match="max_step is"):
            ActionGate(contract, max_step=wrong)


def test_what_is_not_known_of_where_a_robot_stands_is_not_limited(contract):
    actions = np.ones((2, 4), np.float32)
    ActionGate(contract).limit_steps(actions, np.float32([np.nan, 0, np.nan, np.nan]))
    np.testing.assert_allclose(actions, [[1, 0.5, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize("configured", ["clamp", "refuse"])
def test_an_arm_far_outside_of_its_limits_is_not_sent_anywhere_by_either_end(configured):
    body = tiny.embodiment()
    limited = dataclasses.replace(body.action, max_step=(0.05,) * 4)
    body = dataclasses.replace(body, action=limited, action_form="absolute")
    server, client = SafetyGate(GateConfig(out_of_range=configured)), ActionGate(body.to_dict(), configured)
    for state, words in (([1.04, 0, 0], None), ([1.06, 0, 0], "'x' stands at 1.06"), ([0, 0, -9], "'z' stands at -9")):
        chunk = np.zeros((8, 4), np.float32)
        chunk[:, 0] = np.clip(state[0], -1, 1)
        before = server.observed(np.float32(state), body)
        if words is None:
            assert server.check(chunk, body, horizon=8, before=before)[0][0, 0] == 1
            client.limit_steps(chunk, before, clamp=True)
            assert chunk[0, 0] == 1
            continue
        with pytest.raises(RequestError, match=words + ".*move it back by hand"):
            server.check(chunk, body, horizon=8, before=before)
        with pytest.raises(UnsafeActionError, match=words):
            client.limit_steps(chunk, before, clamp=True)


def two_arms(form: str = "delta", **change) -> dict:
    names = ("x", "left_gripper", "y", "right_gripper")
    robot = dataclasses.replace(tiny.embodiment(), action_form=form, grippers=())
    action = dataclasses.replace(robot.action, names=names)
    grippers = (Gripper(axis="left_gripper", open=1.0, closed=0.0), Gripper(axis="right_gripper", open=-1, closed=0.5))
    return dataclasses.replace(robot, action=action, grippers=grippers, **change).to_dict()


def test_every_gripper_stays_where_it_was_and_between_open_and_closed():
    body, last = two_arms(), np.float32([0.3, 1, 0.3, -0.5])
    np.testing.assert_array_equal(zero_action(body, last), [0, 1, 0, -0.5])
    np.testing.assert_array_equal(zero_action(body, None), [0, 0, 0, 0])
    np.testing.assert_array_equal(rest_action(body, last), [0, 1, 0, -0.5])
    np.testing.assert_array_equal(rest_action(two_arms("absolute"), last), last)
    gate = ActionGate(body)
    checked = gate.check_chunk(np.float32([[0, -1, 0, -1], [0, 0.5, 0, 1], [0, -0.05, 0, 0.6]]), 3)
    np.testing.assert_array_equal(checked[:, [1, 3]], [[0, -1], [0.5, 0.5], [0, 0.5]])
    assert gate.counts["clamped_range"] == 2  # what overshoots by less than a tenth is not counted
    for value, passes in ((0.64, True), (0.66, False)):  # a tenth of 1.5 beyond 0.5
        refusing, chunk = ActionGate(body, "refuse"), np.float32([[0, 0, 0, value]])
        if passes:
            assert refusing.check_chunk(chunk, 1)[0, 3] == 0.5
            continue
        with pytest.raises(
            UnsafeActionError, match=r"gripper 'right_gripper' is 0.66 at step 0; open is -1 and closed"
        ):
            refusing.check_chunk(chunk, 1)
    with pytest.raises(ContractError, match="'thumb' is not among"):
        ActionGate({**body, "gripper": {"axis": "thumb", "open": 1, "closed": 0}})


@pytest.mark.parametrize(("beyond", "passes"), [(0.0, True), (0.9, True), (1.1, False)])
@pytest.mark.parametrize("side", [-1, 1])
def test_what_counts_as_rounding_at_a_limit(contract, beyond, passes, side):
    """1e-4 of the range, here 3; and of an axis that hardly moves, of a tenth of its size."""
    tight = {**contract["action"], "minimum": [-1, 500, -1, -1], "maximum": [2, 500, 2, 2]}
    for axis, body, slack in ((0, contract, 3e-4), (1, {**contract, "action": tight}, 5e-3)):
        low, high = (body["action"][end][axis] for end in ("minimum", "maximum"))
        limit = high if side > 0 else low
        actions = chunk(1)
        actions[0, 1] = body["action"]["minimum"][1]
        actions[0, axis] = limit + side * beyond * slack
        refusing, clamping = ActionGate(body, "refuse"), ActionGate(body)
        assert clamping.check_chunk(actions, 1)[0, axis] == limit
        assert clamping.counts["clamped_range"] == (not passes)
        if passes:
            refusing.check_chunk(actions, 1)
            continue
        with pytest.raises(UnsafeActionError, match="out_of_range"):
            refusing.check_chunk(actions, 1)
        assert refusing.counts["out_of_range"] == 1


@pytest.mark.parametrize(("step", "passes"), [(0.5, True), (0.50004, True), (0.5001, False), (-0.5001, False)])
def test_what_counts_as_rounding_of_a_step(contract, step, passes):
    gate, actions = ActionGate(contract, "refuse"), np.zeros((2, 4), np.float32)
    actions[1, 0] = step
    if passes:
        gate.limit_steps(actions, None)
        return
    with pytest.raises(UnsafeActionError, match=r"max_step\): action axis 'x' moves .* at step 1"):
        gate.limit_steps(actions, None)


def test_a_chunk_of_any_length_is_well_formed_where_none_is_asked_for(contract):
    rules = ActionGate(contract).rules
    assert rules.well_formed(np.zeros((3, 4), np.int64), None).dtype == np.float32
    for wrong in (np.zeros(4), np.zeros((3, 5)), np.zeros(())):
        with pytest.raises(Breach, match=r"expected float32 \(n, 4\)"):
            rules.well_formed(wrong, None)


def test_limits_that_are_none_are_refused(contract):
    for low, high in (([3, -1, -1, -1], [2] * 4), ([-1] * 4, [2, 2, 2, float("inf")]), ([-1e39] * 4, [2] * 4)):
        with pytest.raises(ContractError, match="the limits of"):
            ActionGate({**contract, "action": {**contract["action"], "minimum": low, "maximum": high}})


def test_limits_are_rounded_inward():
    low, high = inward([0.1, -0.1, 0.3, 1.0], [0.7, 0.7, 0.3, 2.0])
    assert (low.astype(np.float64) >= [0.1, -0.1, 0.0, 1.0]).all()
    assert (high.astype(np.float64) <= [0.7, 0.7, 1.0, 2.0]).all()
    np.testing.assert_allclose(low, [0.1, -0.1, 0.3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(high, [0.7, 0.7, 0.3, 2.0], rtol=1e-6)
    assert (low[2], low[3], high[3]) == (np.float32(0.3), 1, 2)
    below, only = np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))
    low, high = inward([float(below) + 1e-9], [float(only)])
    assert low == high == only  # the one number between them, not the nearest to the lower


@given(st.floats(-1e38, 1e38), st.floats(0, 1e38))
def test_float32_limits_are_within_the_stated_ones(least, width):
    most = least + width
    low, high = inward([least], [most])
    assert low.dtype == high.dtype == np.float32
    assert low <= high
    nearest = np.float32(least)
    if float(nearest) == least or float(np.nextafter(nearest, np.float32(np.inf))) <= most:
        assert least <= float(low[0]) <= float(high[0]) <= most
