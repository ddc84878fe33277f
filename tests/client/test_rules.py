"""What limits a robot, at its edges: a value that just passes, and one that just does not."""

import numpy as np
import pytest
from mmseq_client import ContractError, Rules
from mmseq_client.rules import GRIPPER_SLACK, TOLERANCE, Breach, resting_action, rounding

LARGEST = float(np.finfo(np.float32).max)


def contract(low=(-2.0, 0.0, 0.0), high=(2.0, 8.0, 1.0), *, form="absolute", gripper=(0.0, 1.0), **action):
    axes = lambda **more: {"units": ["rad", "m", "percent"], "minimum": list(low), "maximum": list(high), **more}
    return {
        "name": "arm",
        "action_form": form,
        "proprio": axes(names=["b", "a", "g"]) | {"units": ["m", "rad", "percent"]},
        "action": axes(names=["a", "b", "g"], **action),
        "gripper": {"axis": "g", "open": gripper[0], "closed": gripper[1]} if gripper else None,
    }


def rows(*given):
    return np.array(given, np.float32)


def test_rounding_is_a_share_of_the_range_or_of_a_tenth_of_the_size():
    low, high = rows(-2, 0, 3, -8, 0.5), rows(2, 8, 3, -7.9, 0.5)
    expected = TOLERANCE * np.array([4, 8, 0.3, 0.8, 0.1])  # an axis that hardly moves: its size, at least 1
    np.testing.assert_allclose(rounding(low, high), expected, rtol=1e-5)
    np.testing.assert_allclose(rounding(low, high, 0.5), expected / TOLERANCE / 2, rtol=1e-5)


def test_what_is_rounding_is_limited_and_not_mentioned_and_more_is():
    rules = Rules(contract())
    given = rows([2 + 3.9e-4, 0, 0], [2 + 4.1e-4, 0, 0], [-2 - 3.9e-4, 8 + 7.9e-4, 0], [-2 - 4.1e-4, 8 + 8.1e-4, 0])
    found = rules.limit(given)
    assert list(found) == ["limit"]
    assert found["limit"].tolist() == [[False] * 3, [True, False, False], [False] * 3, [True, True, False]]
    np.testing.assert_array_equal(given, rows([2, 0, 0], [2, 0, 0], [-2, 8, 0], [-2, 8, 0]))
    with pytest.raises(Breach, match=r"'a' is 2\.5 at step 7, outside -2\.\.2 rad") as refused:
        rules.limit(rows([0, 0, 0], [2.5, 0, 0]), refuse={"limit"}, first=6)
    assert refused.value.rule == "limit"
    assert refused.value.found["limit"].tolist() == [[False] * 3, [True, False, False]]
    rules.limit(rows([2.5, 0, 0]), refuse={"gripper"})  # that rule alone


@pytest.mark.parametrize("gripper", [(0.2, 0.7), (0.7, 0.2)])
def test_a_gripper_beyond_open_and_closed_is_limited_and_far_beyond_is_mentioned(gripper):
    rules = Rules(contract(gripper=gripper))
    slack = GRIPPER_SLACK * 0.5
    given = rows(
        *([0, 0, value] for value in (0.2 - 0.9 * slack, 0.2 - 1.1 * slack, 0.7 + 0.9 * slack, 0.7 + 1.1 * slack))
    )
    free = given.copy()
    found = rules.limit(given)
    assert found["gripper"].tolist() == [[False, False, wrong] for wrong in (False, True, False, True)]
    np.testing.assert_allclose(given[:, 2], [0.2, 0.2, 0.7, 0.7], rtol=1e-6)
    assert rules.limit(free, grippers=False) == {}
    assert free[1, 2] < 0.2
    with pytest.raises(Breach, match=r"gripper 'g' is 0\.9 at step 4; open is .* and closed .*: check its sign"):
        rules.limit(rows([0, 0, 0.5], [0, 0, 0.9]), refuse={"gripper"}, first=3)


def test_only_limits_that_can_be_held_are_taken():
    Rules(contract(low=(-LARGEST, 0, 0), high=(LARGEST, 8, 1)))
    Rules(contract(low=(2.0, 0, 0)))  # an axis with one value
    Rules(contract(gripper=(1.0, 1.5)))  # of which one value is left
    for wrong in (
        {"low": (-2 * LARGEST, 0, 0)},
        {"low": (2.1, 0, 0)},
        {"high": (float("nan"), 8, 1)},
        {"gripper": (1.1, 1.5)},
    ):
        with pytest.raises(ContractError, match=r"the limits of \['a', 'b', 'g'\] are \[\S+, 0\.0, \S+\] to \["):
            Rules(contract(**wrong))
    with pytest.raises(ContractError, match="'arm' has no action axes"):
        Rules({**contract(), "action": None})


def test_a_step_as_large_as_allowed_passes_and_a_larger_one_is_limited():
    rules = Rules(contract(max_step=[0.5, 1.0, 1.0]))
    before = np.zeros(3, np.float32)
    assert rules.limit_steps(rows([0.5, 1, 1], [0, 0, 0]), before) == {}
    given = rows([0.5001, 0, 0], [0.01, 0, 0], [0.2, 2, 0])
    found = rules.limit_steps(given, before)
    assert found["rate"].tolist() == [[True, False, False], [False] * 3, [False, True, False]]
    np.testing.assert_allclose(given, rows([0.5, 0, 0], [0.01, 0, 0], [0.2, 1, 0]), atol=1e-6)
    assert rules.limit_steps(rows([0.50004, 0, 0]), before) == {}  # rounding
    unknown = np.full(3, np.nan, np.float32)
    assert rules.limit_steps(rows([2, 8, 1]), unknown) == {}
    assert rules.limit_steps(rows([2, 8, 1]), None) == {}
    assert rules.limit_steps(np.zeros((0, 3), np.float32), before) == {}
    assert Rules(contract()).limit_steps(rows([2, 8, 1]), before) == {}
    with pytest.raises(
        Breach, match=r"'b' moves from 1 to 3 at step 6; its max_step is 1 m per control step"
    ) as refused:
        rules.limit_steps(rows([0, 1, 0], [0, 3, 0]), before, refuse=True, first=5)
    assert refused.value.found["rate"].tolist() == [[False] * 3, [False, True, False]]


def test_a_robot_that_one_step_cannot_take_back_is_moved_by_hand():
    rules = Rules(contract(max_step=[0.5, 1.0, 1.0]))
    given = rows([2, 0, 0])
    assert rules.limit_steps(given, np.array([2.5, 0, 0], np.float32)) == {}
    for stands in ([2.6, 0, 0], [-2.6, 0, 0]):
        with pytest.raises(Breach, match=r"'a' stands at -?2\.6, outside of its limits -2\.\.2 .*move it back by hand"):
            rules.limit_steps(np.sign(stands[0]) * rows([2, 0, 0]), np.array(stands, np.float32))


@pytest.mark.parametrize(
    ("stated", "given", "expected"),
    [
        (None, None, None),
        ([1, 1, 1], None, [1, 1, 1]),
        (None, 0.5, [0.5, 0.5, 0.5]),
        ([1, 0.2, 1], 0.5, [0.5, 0.2, 0.5]),
        ([1, 1, 1], [0.1, 2, 0.3], [0.1, 1, 0.3]),
    ],
)
def test_the_smaller_of_two_largest_steps_counts(stated, given, expected):
    found = Rules(contract(**({"max_step": stated} if stated else {})), max_step=given).max_step
    assert (found is None) == (expected is None)
    if expected:
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("given", [0, -1, [1, 0, 1], [1, 1], [[1, 1, 1]], float("nan"), float("inf"), "fast", 10**400])
def test_a_largest_step_is_a_positive_number_or_one_for_each_axis(given):
    with pytest.raises(ContractError, match="give a positive number, or one for each of"):
        Rules(contract(), max_step=given)


def test_where_a_robot_stands_is_known_by_name_and_unit_and_of_grippers_never():
    at = Rules(contract()).stands([3.0, 0.5, 0.9])
    np.testing.assert_array_equal(at, [0.5, 3.0, np.nan])
    for state in (None, [1.0, 2.0], [[1.0, 2.0, 3.0]], "none"):
        assert np.isnan(Rules(contract()).stands(state)).all()
    other = contract()
    other["proprio"]["units"] = ["m", "deg", "percent"]
    np.testing.assert_array_equal(Rules(other).stands([3.0, 0.5, 0.9]), [np.nan, 3.0, np.nan])
    assert Rules(other).has_place
    for none in (contract(form="delta"), {**contract(), "proprio": None}):
        assert not Rules(none).has_place
        assert np.isnan(Rules(none).stands([3.0, 0.5, 0.9])).all()


def test_who_was_never_commanded_stands_still_with_open_grippers():
    np.testing.assert_allclose(resting_action(contract(), [3.0, 0.5, 0.9]), [0.5, 3.0, 0.0])
    np.testing.assert_allclose(resting_action(contract(), None), [0, 4, 0])
    np.testing.assert_allclose(resting_action(contract(), [9.0, -7.0, 0.9]), [-2, 8, 0])
    np.testing.assert_allclose(resting_action(contract(form="velocity", gripper=(1.0, 0.0)), [3.0, 0.5, 0]), [0, 0, 1])


@pytest.mark.parametrize(
    ("actions", "horizon", "passes"),
    [
        (np.zeros((4, 3)), 4, True),
        (np.zeros((4, 3), np.int64), None, True),
        (np.zeros((4, 3), bool), 4, False),
        (np.zeros((5, 3)), 4, False),
        (np.zeros((4, 2)), 4, False),
        (np.zeros((3, 4)), None, False),
        (np.zeros(3), None, False),
        (np.zeros(()), None, False),
        (np.zeros((4, 3), complex), 4, False),
        ([[0, 0, 0]], 1, False),
    ],
)
def test_a_chunk_has_the_shape_that_is_wanted(actions, horizon, passes):
    rules = Rules(contract())
    if passes:
        found = rules.well_formed(actions, horizon)
        assert (found.dtype, found.shape) == (np.float32, actions.shape)
        assert found is not actions
        return
    with pytest.raises(
        Breach, match=rf"expected float32 \({'n' if horizon is None else horizon}, 3\) for axes"
    ) as refused:
        rules.well_formed(actions, horizon)
    assert refused.value.rule == "shape"
    assert refused.value.found == {}


def test_a_number_that_is_none_is_named_with_its_place():
    actions = np.zeros((4, 3))
    actions[2, 1] = -np.inf
    with pytest.raises(Breach, match=r"action axis 'b' is -inf at step 2"):
        Rules(contract()).well_formed(actions, 4)
