from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseq.embodiment import Gripper
from mmseq.errors import ConfigError
from mmseq.serving import Chunking, GateConfig, RequestError
from mmseq.serving.observation import check_vectors
from mmseq.serving.safety import SafetyGate
from mmseq.testing import tiny
from support.wire import ask, dial, http

ARM = tiny.embodiment()


@pytest.fixture(scope="module", autouse=True)
def client(client_package):
    return client_package


def gate_of_the_client(embodiment):
    from mmseq_client import ActionGate

    return ActionGate(embodiment.to_dict())


def chunk(value=0.0) -> np.ndarray:
    return np.full((8, 4), value, np.float32)


def test_clamp_limits_and_counts(embodiment):
    gate, actions = SafetyGate(GateConfig()), chunk()
    actions[2, 1], actions[7, 3] = 5, -9
    checked, clamped = gate.check(actions, embodiment, horizon=8)
    assert (checked[2, 1], checked[7, 3]) == (2, -1)  # the gripper's limits are open and closed
    assert clamped == {"clamped": 2, "axes": {"y": {"limit": 1}, "gripper": {"limit": 1, "gripper": 1}}}
    assert actions[2, 1] == 5  # the policy's own array is left alone
    gate.check(chunk(), embodiment, horizon=8)
    assert (gate.counts.chunks, gate.counts.chunks_clamped, gate.counts.values_clamped) == (2, 1, 2)


def test_refuse_names_axis_and_step(embodiment):
    gate, actions = SafetyGate(GateConfig(out_of_range="refuse")), chunk()
    actions[3, 2] = 2.5
    with pytest.raises(RequestError, match=r"axis 'z' is 2.5 at step 3, outside -2..2 m") as caught:
        gate.check(actions, embodiment, horizon=8)
    assert caught.value.code == "unsafe_action"
    assert gate.counts.chunks_refused == 1
    assert gate.check(chunk(2.00001), embodiment, horizon=8)[0].max() == 2  # rounding is not a breach


@pytest.mark.parametrize("mode", ["clamp", "refuse"])
@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (chunk(np.nan), "axis 'x' is nan"),
        (chunk(np.inf), "inf"),
        (np.full((8, 4), 1e300), "inf"),
        (chunk()[:7], r"\(7, 4\), expected float32 \(8, 4\)"),
        (chunk()[:, :3], r"\(8, 3\)"),
        (chunk()[0], r"\(4,\)"),
        (chunk().tolist(), "list"),
        (chunk().astype(object), "ndarray"),
    ],
)
def test_nothing_broken_passes(embodiment, mode, actions, words):
    with pytest.raises(RequestError, match=words):
        SafetyGate(GateConfig(out_of_range=mode)).check(actions, embodiment, horizon=8)


def test_the_chunk_begins_with_exactly_the_prefix(embodiment):
    prefix = np.full((3, 4), 0.123, np.float32)
    checked, _ = SafetyGate(GateConfig()).check(chunk(), embodiment, horizon=8, prefix=prefix)
    np.testing.assert_array_equal(checked[:3], prefix)
    np.testing.assert_array_equal(checked[3:], 0)


def steady(embodiment, step=0.5):
    return replace(embodiment, action=replace(embodiment.action, max_step=(step,) * 4))


def test_a_jump_is_slowed_down_step_by_step(embodiment):
    gate, actions = SafetyGate(GateConfig(gripper="ignore")), chunk()
    actions[2:, 0] = 1.2
    checked, told = gate.check(actions, steady(embodiment), horizon=8)
    np.testing.assert_allclose(checked[:, 0], [0, 0, 0.5, 1, 1.2, 1.2, 1.2, 1.2], atol=1e-6)
    assert told == {"clamped": 2, "axes": {"x": {"rate": 2}}}
    assert gate.counts.by_axis["arm", "x", "rate"] == 2
    assert np.abs(np.diff(checked, axis=0)).max() <= 0.5 + 1e-6


def test_the_first_action_follows_the_one_before_it_or_the_prefix(embodiment):
    gate, body = SafetyGate(GateConfig()), steady(embodiment)
    before = np.array([1, 0, 0, 0], np.float32)
    checked, _ = gate.check(chunk(), body, horizon=8, before=before)
    np.testing.assert_allclose(checked[:3, 0], [0.5, 0, 0])
    prefix = np.array([[2, 0, 0, 0], [1.8, 0, 0, 0]], np.float32)
    checked, _ = gate.check(chunk(), body, horizon=8, prefix=prefix, before=before)
    np.testing.assert_allclose(checked[:6, 0], [2, 1.8, 1.3, 0.8, 0.3, 0], atol=1e-6)  # what is committed stays


def test_a_jump_is_refused_with_its_axis_where_configured(embodiment):
    gate, actions = SafetyGate(GateConfig(too_fast="refuse")), chunk()
    actions[4:, 1] = 0.75
    with pytest.raises(RequestError, match=r"axis 'y' moves from 0 to 0.75 at step 4; its max_step is 0.5 m"):
        gate.check(actions, steady(embodiment), horizon=8)
    assert gate.status()["by_axis"] == {"arm": {"y": {"rate": 1}}}
    assert gate.check(actions, embodiment, horizon=8)[1] == {}  # a contract that says nothing limits nothing


def test_a_gripper_that_means_something_else(embodiment):
    actions = chunk()
    actions[5, 3] = 1.5  # open is 1
    checked, told = SafetyGate(GateConfig()).check(actions, embodiment, horizon=8)
    assert (checked[5, 3], told["axes"]) == (1, {"gripper": {"gripper": 1}})
    with pytest.raises(RequestError, match=r"gripper 'gripper' is 1.5 at step 5; open is 1 and closed -1"):
        SafetyGate(GateConfig(gripper="refuse")).check(actions, embodiment, horizon=8)
    assert SafetyGate(GateConfig(gripper="ignore")).check(actions, embodiment, horizon=8)[1] == {}
    actions[5, 3] = 1.1  # what data overshoot
    assert SafetyGate(GateConfig(gripper="refuse")).check(actions, embodiment, horizon=8)[1] == {}


def test_an_answer_that_is_too_old(embodiment):
    gate = SafetyGate(GateConfig(max_age_ms=100))
    gate.stale(100)
    with pytest.raises(RequestError, match="took 101 ms") as caught:
        gate.stale(101)
    assert (caught.value.code, gate.counts.chunks_stale) == ("late", 1)
    SafetyGate(GateConfig()).stale(1e9)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"tolerance": 0.0, "max_age_ms": 0.0}, True),
        ({"tolerance": 0.1, "max_age_ms": 1e9}, True),
        ({"tolerance": -0.01}, False),
        ({"tolerance": 0.11}, False),
        ({"max_age_ms": -1.0}, False),
        ({"max_age_ms": float("inf")}, False),
        ({"max_age_ms": float("nan")}, False),
    ],
)
def test_a_gate_is_configured_with_what_can_be(options, passes):
    if passes:
        assert vars(GateConfig(**options)).items() >= options.items()
        return
    with pytest.raises(ConfigError, match=f"gate.{next(iter(options))} is"):
        GateConfig(**options)


def test_a_contract_that_is_served_anew_brings_its_own_limits(embodiment):
    gate, wider = SafetyGate(GateConfig()), replace(embodiment.action, maximum=(9,) * 4)
    for body, most in ((embodiment, 2), (replace(embodiment, action=wider), 5), (embodiment, 2)):
        assert gate.check(chunk(5), body, horizon=8)[0][0, 0] == most


def limited(embodiment, least, most, step=None):
    axes = replace(embodiment.action, minimum=(least,) * 4, maximum=(most,) * 4)
    return replace(embodiment, action=axes if step is None else replace(axes, max_step=(step,) * 4), grippers=())


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(1e-9, 1e6), st.integers(0, 1 << 30))
def test_no_number_leaves_the_limits_by_any_rounding(least, width, step, seed):
    values = np.random.default_rng(seed).normal(0, 1, (8, 4)) * 10.0 ** np.random.default_rng(seed).integers(-9, 9)
    contract = limited(ARM, least, least + width, step)
    ours, theirs = SafetyGate(GateConfig()), gate_of_the_client(contract)
    checked, _ = ours.check(values, contract, horizon=8)
    there = theirs.check_chunk(values, 8)
    theirs.limit_steps(there, None)
    nearest = np.float32(least)
    between = [n for n in (nearest, np.nextafter(nearest, np.float32(np.inf))) if least <= float(n) <= least + width]
    for actions in (checked, there):
        exact = actions.astype(np.float64)
        if between:  # else float32 has no number within the limits
            assert least <= exact.min() <= exact.max() <= least + width
        assert (np.abs(np.diff(exact, axis=0)) <= step * (1 + 1e-4) + 2.5e-7 * np.abs(exact).max()).all()


def test_a_gripper_is_within_its_axis_also_where_open_and_closed_are_not(embodiment):
    axes = replace(embodiment.action, minimum=(-2, -2, -2, -0.95), maximum=(2, 2, 2, 0.95))
    checked, _ = SafetyGate(GateConfig()).check(chunk(9), replace(embodiment, action=axes), horizon=8)
    assert checked[:, 3].max() <= 0.95


def test_an_absolute_robot_begins_from_where_it_stands(start, embodiment, observation):
    proprio = replace(embodiment.proprio, names=("y", "x", "other", "gripper"))
    body = replace(steady(embodiment, 0.01), proprio=proprio)

    class Policy:
        sign = 1

        def contract(self):
            return {"name": "p", "embodiments": {"arm": body.to_dict()}, "tasks": {}, "horizon": 8}

        def infer(self, observation):
            return {"actions": np.full((8, 4), 0.9 * self.sign, np.float32)}

    policy = Policy()
    server = start(policy, chunking=Chunking(execute=8))
    state = np.float32([0.2, -0.3, 0.5, 1])

    def first(s, **more):
        return ask(s, {**observation, "observation.state": state, **more})["actions"][0]

    with dial(server) as s:
        s.recv()
        np.testing.assert_allclose(first(s), [-0.29, 0.21, 0.9, 0.9], atol=1e-6)  # z and a gripper's place say nothing
        policy.sign = -1
        assert first(s)[2] == np.float32(0.89)  # from what was sent
        http(server, "POST", "/v1/hold")
        http(server, "DELETE", "/v1/hold")
        np.testing.assert_allclose(first(s)[:2], [-0.31, 0.19], atol=1e-6)
        np.testing.assert_allclose(first(s, step=100)[:2], [-0.31, 0.19], atol=1e-6)
        np.testing.assert_allclose(first(s, step=200)[:2], [-0.31, 0.19], atol=1e-6)  # a pause
        np.testing.assert_allclose(first(s, step=400, chunking="plain"), -0.9)  # it has a gate of its own
    with dial(server) as s:
        s.recv()
        np.testing.assert_allclose(first(s)[:2], [-0.31, 0.19], atol=1e-6)
    delta = replace(body, action_form="delta")
    assert SafetyGate(GateConfig()).observed(state, delta) is None


def test_an_action_prefix_is_within_the_limits(embodiment):
    narrow = limited(embodiment, -1e-6, 1e-6)
    prefix = check_vectors(np.full((2, 4), 1e-5, np.float32), narrow.action, key="action_prefix", ndim=2)
    assert np.abs(prefix.astype(np.float64)).max() <= 1e-6


def said(value: float, axis: int = 1) -> list[float]:
    state = [0.0] * 4
    state[axis] = value
    return state


@pytest.mark.parametrize(("beyond", "passes"), [(0.0, True), (0.9, True), (1.1, False), (2000, False)])
@pytest.mark.parametrize("side", [-1, 1])
def test_what_counts_as_rounding_of_a_state_that_a_robot_reports(embodiment, beyond, passes, side):
    """1e-4 of the range, here 4, as of an action."""
    value = side * (2 + 4e-4 * beyond)
    check = lambda: check_vectors(said(value), embodiment.proprio, key="observation.state", ndim=1)
    if passes:
        assert check()[1] == side * 2
        return
    with pytest.raises(RequestError, match=r"'observation\.state' axis 'y' is") as caught:
        check()
    assert caught.value.code == "out_of_range"
    actions = chunk()
    actions[0, 1] = value
    with pytest.raises(RequestError, match="axis 'y'"):
        SafetyGate(GateConfig(out_of_range="refuse")).check(actions, embodiment, horizon=8)


def test_how_much_counts_as_rounding_may_be_configured(embodiment):
    actions = chunk()
    actions[0, 0], actions[0, 1] = 2.03, 2.05  # of a range of 4
    gate = SafetyGate(GateConfig(tolerance=0.01))
    assert gate.check(actions, embodiment, horizon=8)[1] == {"clamped": 1, "axes": {"y": {"limit": 1}}}
    exact = SafetyGate(GateConfig(tolerance=0))
    actions[0, 0] = np.nextafter(np.float32(2), np.float32(3))
    assert exact.check(actions, embodiment, horizon=8)[1]["clamped"] == 2


def test_both_grippers_are_held_to_what_they_mean(embodiment):
    two = (Gripper(axis="y", open=0, closed=1), Gripper(axis="gripper", open=1, closed=-1))
    body, actions = replace(embodiment, grippers=two), chunk()
    actions[2, 1], actions[3, 1], actions[4, 3] = -0.05, 1.5, -1.3
    checked, told = SafetyGate(GateConfig()).check(actions, body, horizon=8)
    assert (checked[2, 1], checked[3, 1], checked[4, 3]) == (0, 1, -1)
    assert told == {"clamped": 2, "axes": {"y": {"gripper": 1}, "gripper": {"gripper": 1}}}
    left, told = SafetyGate(GateConfig(gripper="ignore")).check(actions, body, horizon=8)
    assert (told, left[3, 1]) == ({}, 1.5)
    gate = SafetyGate(GateConfig(gripper="refuse"))
    with pytest.raises(RequestError, match=r"gripper 'y' is 1.5 at step 3; open is 0 and closed 1"):
        gate.check(actions, body, horizon=8)
    assert gate.status()["by_axis"] == {"arm": {"y": {"gripper": 1}}}
    absolute = replace(body, action_form="absolute")
    np.testing.assert_array_equal(gate.observed(np.float32([1, 2, 3, 4]), absolute), [1, np.nan, 3, np.nan])
    assert gate.observed(np.float32([1, 2, 3]), absolute) is None


def test_where_it_stands_limits_and_does_not_refuse(embodiment):
    gate, body = SafetyGate(GateConfig(too_fast="refuse")), steady(embodiment)
    stands = np.float32([-1, np.nan, 0, 0])
    checked, told = gate.check(chunk(), body, horizon=8, before=stands, stood=True)
    np.testing.assert_allclose(checked[:3, 0], [-0.5, 0, 0])
    assert told == {"clamped": 1, "axes": {"x": {"rate": 1}}}
    with pytest.raises(RequestError, match=r"axis 'x' moves from -1 to 0 at step 0"):
        gate.check(chunk(), body, horizon=8, before=stands)
    assert (gate.counts.chunks, gate.counts.chunks_refused) == (2, 1)
    prefix = np.zeros((2, 4), np.float32)
    actions = chunk()
    actions[2:, 0] = 0.6
    with pytest.raises(RequestError, match=r"moves from 0 to 0.6 at step 2"):
        gate.check(actions, body, horizon=8, prefix=prefix)


@pytest.mark.parametrize("side", [-1, 1])
def test_what_lies_exactly_at_the_end_of_the_slack_passes(embodiment, side):
    actions = chunk()
    actions[0, 0] = side * 2.25  # a sixteenth of the range of 4 beyond
    gate = SafetyGate(GateConfig(tolerance=0.0625))
    checked, told = gate.check(actions, embodiment, horizon=8)
    assert (checked[0, 0], told) == (side * 2, {})
    wide = replace(embodiment.action, minimum=(-9,) * 4, maximum=(9,) * 4)
    gripper = Gripper(axis="gripper", open=5 * side, closed=0)
    body, actions = replace(embodiment, action=wide, grippers=(gripper,)), chunk()
    actions[0, 3], actions[1, 3] = 5.5 * side, -0.5 * side
    checked, told = SafetyGate(GateConfig()).check(actions, body, horizon=8)
    assert (checked[0, 3], checked[1, 3], told) == (5 * side, 0, {})


@pytest.mark.parametrize(
    "wrong", [{"tolerance": 0.11}, {"tolerance": -1e-9}, {"max_age_ms": -1.0}, {"max_age_ms": np.inf}]
)
def test_a_configuration_that_means_nothing_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"gate.{next(iter(wrong))} is"):
        GateConfig(**wrong)
    GateConfig(tolerance=0.1, max_age_ms=0)
