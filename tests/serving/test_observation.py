import contextlib
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmseq.errors import ConfigError
from mmseq.serving import Contract, ObservationRules, RequestError
from mmseq.serving.keys import check_aliases
from mmseq.serving.observation import check_given, check_observation


@pytest.fixture
def contract(policy) -> Contract:
    return Contract.from_policy(policy)


def check(observation, contract, **rules):
    return check_observation(observation, contract, ObservationRules(**rules))[0]


def refusal(observation, contract, **rules) -> RequestError:
    with pytest.raises(RequestError) as caught:
        check(observation, contract, **rules)
    return caught.value


def test_a_valid_observation_passes_unchanged(observation, contract):
    checked = check(observation, contract)
    assert set(checked) == set(observation)
    np.testing.assert_array_equal(checked["observation.images.front"], observation["observation.images.front"])
    assert checked["observation.state"].dtype == np.float32


@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("observation.state", ..., "missing_key", "'observation.state' is missing; expected observation.images.front"),
        ("observation.images.wrist", ..., "missing_key", "is missing"),
        (
            "observation.images.front",
            np.zeros((24, 16, 3), np.uint8),
            "wrong_shape",
            r"\(24, 16, 3\), expected uint8 \(16, 24",
        ),
        ("observation.images.front", np.zeros((3, 16, 24), np.uint8), "wrong_shape", "channels last"),
        ("observation.images.front", np.zeros((16, 24, 3), np.float32), "wrong_type", "Send 0..255"),
        ("observation.images.front", "png", "wrong_type", "is str"),
        ("observation.state", np.zeros(3, np.float32), "wrong_shape", r"\(3,\), expected float32 \(4,\) for axes"),
        ("observation.state", np.zeros((1, 4), np.float32), "wrong_shape", r"\(1, 4\)"),
        ("observation.state", np.array([0, np.nan, 0, 0]), "not_finite", "axis 'y' is nan"),
        ("observation.state", np.array([0, 0, -np.inf, 0]), "not_finite", "axis 'z' is -inf"),
        ("observation.state", np.array([0, 1e300, 0, 0]), "not_finite", "axis 'y'"),
        (
            "observation.state",
            np.array([0, 0, 57.3, 0]),
            "out_of_range",
            r"axis 'z' is 57.3, expected -2..2 m\. Check the unit",
        ),
        ("observation.state", ["a", 1, 2, 3], "wrong_type", "not a list of numbers"),
        ("observation.state", np.array(list("abcd")), "wrong_type", "<U1"),
        ("prompt", 7, "wrong_type", "'prompt' is int"),
        ("promt", "hello", "unknown_key", "did you mean 'prompt'"),
        ("options", [1], "wrong_type", "map"),
        ("options", {"temperature": float("nan")}, "out_of_range", "options.temperature"),
        ("options", {"temperature": -1}, "out_of_range", "options.temperature"),
        ("options", {"temperature": "hot"}, "out_of_range", "options.temperature"),
        ("options", {"seed": "x"}, "out_of_range", "options.seed"),
        ("options", {"seed": -1}, "out_of_range", "options.seed"),
        ("embodiment", "arn", "refused", "did you mean 'arm'"),
        ("embodiment_fingerprint", "0" * 16, "fingerprint", "send the contract|Send the contract"),
        ("action_prefix", np.zeros((8, 4), np.float32), "out_of_range", "8 steps, expected fewer than 8"),
        ("action_prefix", np.full((2, 4), 9, np.float32), "out_of_range", "axis 'x' is 9"),
        ("action_prefix", np.zeros(4, np.float32), "wrong_shape", r"expected float32 \(n, 4\)"),
    ],
)
def test_refusals_name_the_key(observation, contract, key, value, code, words):
    if value is ...:
        del observation[key]
    else:
        observation[key] = value
    error = refusal(observation, contract)
    assert (error.code, error.key) == (code, key)
    with pytest.raises(RequestError, match=words):
        raise error


def test_a_whole_contract_is_compared_field_by_field(observation, contract, embodiment):
    other = dataclasses.replace(embodiment, rate_hz=10, action_form="delta")
    error = refusal({**observation, "embodiment": other.to_dict()}, contract)
    assert error.code == "fingerprint"
    assert "action_form: absolute against delta" in str(error)
    assert "rate_hz: 20" in str(error)
    assert check({**observation, "embodiment": embodiment.to_dict()}, contract)["embodiment"] == "arm"
    assert check({**observation, "embodiment_fingerprint": embodiment.fingerprint}, contract)


def test_several_embodiments_must_be_told_apart(observation, contract, embodiment):
    two = dataclasses.replace(
        contract, embodiments={"arm": embodiment, "leg": dataclasses.replace(embodiment, name="leg")}
    )
    assert check({**observation, "embodiment": "leg"}, two)["embodiment"] == "leg"
    del observation["embodiment"]
    assert refusal(observation, two).code == "missing_key"


def test_openpi_spellings(observation, contract):
    front, wrist, state = (observation[f"observation.{key}"] for key in ("images.front", "images.wrist", "state"))
    plain = check(observation, contract)
    for spelling in (
        {"observation/image": front, "observation/wrist_image": wrist, "observation/state": state},
        {"observation/images/front": front, "observation/wrist": wrist, "state": state},
        {"images": {"front": front, "wrist": wrist}, "state": state},
        {"observation": {"images": {"front": front, "wrist": wrist}, "state": state.astype(np.float64)}},
    ):
        checked = check({**spelling, "prompt": np.array("do the task")}, contract)
        assert set(checked) == set(plain)
        assert all(np.array_equal(checked[key], plain[key]) for key in plain)


def test_two_spellings_of_one_key_are_refused(observation, contract):
    assert refusal({**observation, "state": observation["observation.state"]}, contract).code == "unknown_key"


def test_rules(observation, contract):
    far = {**observation, "observation.state": np.array([0, 0, 0, 5.0])}
    assert check(far, contract, state_range="clamp")["observation.state"][3] == 2
    assert check(far, contract, state_range="ignore")["observation.state"][3] == 5
    assert "extra" not in check({**observation, "extra": 1}, contract, unknown_keys="ignore")
    observation["cam0"] = observation.pop("observation.images.front")
    assert "observation.images.front" in check(observation, contract, aliases={"cam0": "observation.images.front"})


def test_a_prefix_needs_a_policy_that_understands_it(observation, contract):
    observation["action_prefix"] = np.zeros((2, 4), np.float32)
    assert check(observation, contract)["action_prefix"].shape == (2, 4)
    assert refusal(observation, dataclasses.replace(contract, prefix=False)).code == "refused"
    observation["action_prefix"] = np.zeros((0, 4), np.float32)
    assert "action_prefix" not in check(observation, contract)


def test_given_streams_of_any_arrow(observation, contract):
    front = observation["observation.images.front"]
    given = {
        "observation.images.front": np.stack([front] * 3),
        "observation.images.front@+16": front,
        "action": np.zeros((16, 4), np.float32),
        "question": "is the cup full?",
        "progress": 0.5,
    }
    assert set(check_given(given, contract, ObservationRules(), "question, progress -> action[2]")[0]) == {
        *given,
        "embodiment",
    }
    for key, value in [
        ("action", np.full((2, 4), np.nan)),
        ("observation.images.fornt", front),
        ("observation.images.front@+16", front[:3]),
        ("question", None),
        ("progress", float("inf")),
    ]:
        with pytest.raises(RequestError, match=re.escape(key)):
            check_given({key: value}, contract, ObservationRules(), "question, progress -> action[2]")


def test_a_key_that_a_prediction_does_not_read_is_refused(contract):
    with pytest.raises(RequestError, match="'progres' is not known: choose one of") as caught:
        check_given({"progres": 0.5}, contract, ObservationRules(), "progress -> action[2]")
    assert caught.value.code == "unknown_key"
    lax = ObservationRules(unknown_keys="ignore")
    assert set(check_given({"progres": 0.5}, contract, lax)[0]) == {"embodiment"}


@pytest.mark.parametrize(
    ("change", "code", "key"),
    [
        ({"prompt": None}, "missing_key", "prompt"),
        ({"prompt": ""}, "out_of_range", "prompt"),
        ({"prompt": " \n"}, "out_of_range", "prompt"),
        ({"options": {"temprature": 1.0}}, "unknown_key", "options"),
    ],
)
def test_what_a_policy_says_that_it_reads(observation, contract, change, code, key):
    said = {"policy": "text, image -> action[8]", "options": ["temperature", "seed"]}
    reading = dataclasses.replace(contract, extra=said)
    error = refusal({**observation, **change}, reading)
    assert (error.code, error.key) == (code, key)
    del observation["prompt"]
    if key == "prompt":
        check({**observation, "prompt": ""}, dataclasses.replace(contract, extra={"policy": "image -> action[8]"}))


def test_an_alias_of_nothing_is_refused(contract):
    check_aliases({"a": "observation.images.front", "b": "observation.state", "c": "prompt", "d": "images"}, contract)
    with pytest.raises(ConfigError, match=r"observation.images.nope.*observation.images"):
        check_aliases({"foo": "observation.images.nope"}, contract)


odd = st.sampled_from(
    [
        None,
        True,
        -1,
        1e40,
        "",
        "arm",
        b"x",
        [],
        [[]],
        {},
        {"name": "arm"},
        {1: 2},
        np.float32(1),
        np.array(3),
        np.zeros((0, 4)),
    ]
    + [
        np.zeros((2, 4), "f2"),
        np.full(4, np.nan),
        np.array("text"),
        np.zeros((16, 24, 3), np.uint8),
        {"front": np.zeros(3)},
    ]
)
keys = ["images", "state", "prompt", "embodiment", "embodiment_fingerprint", "action_prefix", "options", "observation"]
keys += ["observation.images.front", "observation.images.front@+1", "observation/image", "action", "other", ""]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from(keys), odd, max_size=4),
    field=st.sampled_from(["rate_hz", "action"]),
    value=odd,
)
def test_odd_values_are_refused_and_nothing_else_is_raised(observation, contract, embodiment, changes, field, value):
    whole = {**embodiment.to_dict(), field: value}
    for message in (changes, {**observation, **changes}, {**observation, "embodiment": whole}):
        for check_any in (check_observation, check_given):
            with contextlib.suppress(RequestError):
                check_any(message, contract, ObservationRules())
