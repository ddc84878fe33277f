import contextlib
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmseq.data.importing import square
from mmseq.embodiment import Camera
from mmseq.errors import ConfigError
from mmseq.serving import Contract, ObservationRules, RequestError, example_observation
from mmseq.serving import observation as observations
from mmseq.serving.keys import check_aliases
from mmseq.serving.observation import MAX_TEXT, check_given, check_image, check_observation


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
            np.zeros((16, 24, 4), np.uint8),
            "wrong_shape",
            r"\(16, 24, 4\), expected uint8 \(16, 24, 3\). Leave the alpha channel out",
        ),
        ("observation.images.front", np.zeros((4, 16, 24), np.uint8), "wrong_shape", "alpha"),
        ("observation.images.front", np.zeros((16, 24), np.uint8), "wrong_shape", "RGB, not grey"),
        ("observation.images.front", np.zeros((16, 24, 1), np.uint8), "wrong_shape", "RGB, not grey"),
        ("observation.images.front", np.zeros((2, 16, 24, 3), np.uint8), "wrong_shape", "one picture"),
        ("observation.images.front", np.zeros((0, 16, 24, 3), np.uint8), "wrong_shape", "one picture"),
        ("observation.images.front", np.zeros((16, 24, 5), np.uint8), "wrong_shape", "channels last"),
        ("observation.images.front", np.zeros(3, np.uint8), "wrong_shape", "channels last"),
        ("observation.images.front", np.zeros((1, 24, 3), np.uint8), "wrong_shape", "at least a 8th"),
        ("observation.images.front", np.zeros((16, 2, 3), np.uint8), "wrong_shape", "at least a 8th"),
        ("observation.images.front", np.zeros((0, 24, 3), np.uint8), "wrong_shape", "at least a 8th"),
        ("observation.images.front", np.zeros((16, 24, 3), np.float32), "wrong_type", "Send 0..255"),
        ("observation.images.front", "png", "wrong_type", "is str"),
        ("observation.state", np.zeros(3, np.float32), "wrong_shape", r"\(3,\), expected float32 \(4,\) for axes"),
        ("observation.state", np.zeros((2, 4), np.float32), "wrong_shape", r"\(2, 4\)"),
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
        ("options", "", "wrong_type", "map"),
        ("options", {1: 2}, "wrong_type", "map with text keys"),
        ("options", {"temperature": 1e6 + 1}, "out_of_range", "options.temperature"),
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


def test_the_ends_of_what_is_taken_are_taken(observation, contract):
    for end in (-2, 2):  # the limits, and what rounding makes of them
        for state in ([end] * 4, [end * (1 + 1e-7)] * 4):
            taken = check({**observation, "observation.state": state}, contract)["observation.state"]
            assert taken.tolist() == [end] * 4
        assert refusal({**observation, "observation.state": [0, end * 1.001, 0, 0]}, contract).code == "out_of_range"
    assert "action_prefix" not in check({**observation, "action_prefix": []}, contract)
    assert refusal({**observation, "observation.state": []}, contract).code == "wrong_shape"
    one = check({**observation, "action_prefix": [[0.5] * 4]}, contract)["action_prefix"]
    assert one.tolist() == [[0.5] * 4]
    assert len(check({**observation, "prompt": "x" * MAX_TEXT}, contract)["prompt"]) == MAX_TEXT
    assert refusal({**observation, "prompt": "x" * (MAX_TEXT + 1)}, contract).code == "too_large"
    for seed in (0, (1 << 63) - 1):
        assert check({**observation, "options": {"seed": seed}}, contract)["options"] == {"seed": seed}
    assert refusal({**observation, "options": {"seed": 1 << 63}}, contract).key == "options"
    for temperature in (0, 0.0, 1e6):
        assert check({**observation, "options": {"temperature": temperature}}, contract)
    slack = np.float32(1e-4) * np.float32(4)  # of the range, here -2 to 2
    for end, beyond in ((np.float32(2) + slack, np.inf), (np.float32(-2) - slack, -np.inf)):
        state = np.array([0, end, 0, 0], np.float32)
        assert abs(check({**observation, "observation.state": state}, contract)["observation.state"][1]) == 2
        state[1] = np.nextafter(end, np.float32(beyond))
        assert refusal({**observation, "observation.state": state}, contract).code == "out_of_range"


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


def test_pictures_are_brought_into_the_contracts_form_where_nothing_is_lost(contract, observation):
    key, picture = "observation.images.front", observation["observation.images.front"]  # 16 x 24
    taken = lambda value: check({**observation, key: value}, contract)[key]
    for same in (picture.transpose(2, 0, 1), picture[None], picture.transpose(2, 0, 1)[None]):
        np.testing.assert_array_equal(taken(same), picture)
    large = np.repeat(np.repeat(picture, 3, 0), 3, 1)
    np.testing.assert_array_equal(taken(large), picture)
    np.testing.assert_array_equal(taken(large.transpose(2, 0, 1)), picture)
    np.testing.assert_array_equal(taken(np.pad(large, ((9, 9), (0, 0), (0, 0)))), picture)  # letterboxed
    tall = np.arange(16 * 3 * 3, dtype=np.uint8).reshape(16, 3, 3)
    assert taken(tall).shape == (16, 24, 3)  # with three columns it is no picture of channels first
    assert taken(np.full((2, 3, 3), 7, np.uint8)).tolist() == np.full((16, 24, 3), 7).tolist()
    frames = np.stack([large] * 2)
    given = check_given({key: frames.transpose(0, 3, 1, 2)}, contract, ObservationRules())[0][key]
    np.testing.assert_array_equal(given, np.stack([picture] * 2))
    one = check_given({key: picture[None]}, contract, ObservationRules())[0][key]
    assert one.shape == (1, 16, 24, 3)
    assert (
        check({**observation, "observation.state": np.ones((1, 4))}, contract)["observation.state"].tolist() == [1] * 4
    )


def test_the_sizes_that_training_had_are_made_as_it_made_them(embodiment):
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    fitted = check_image(picture, Camera(name="front", height=16, width=16), key="k")
    np.testing.assert_array_equal(fitted, square(picture, 16))


def test_a_state_that_comes_in_parts_is_joined(observation, contract):
    state = observation.pop("observation.state")
    droid = {"observation/gripper_position": state[3:], "observation/joint_position": state[:3].tolist()}
    np.testing.assert_array_equal(check({**observation, **droid}, contract)["observation.state"], state)
    nested = {"observation": {"joint_position": state[None, :3], "gripper_position": state[3]}}
    np.testing.assert_array_equal(check({**observation, **nested}, contract)["observation.state"], state)
    aliases = {"arm": "observation.state", "hand": "observation.state"}
    parts = {"hand": state[1:], "arm": state[:1]}
    np.testing.assert_array_equal(
        check({**observation, **parts}, contract, aliases=aliases)["observation.state"], state
    )
    whole = {**observation, "observation.state": state}
    np.testing.assert_array_equal(check(whole, contract, aliases=aliases)["observation.state"], state)
    for change, code, words in (
        ({"arm": ...}, "missing_key", "'arm' is missing: 'observation.state' is made of arm, hand"),
        ({"arm": "far"}, "wrong_type", "'arm' is <U3"),
        ({"arm": [[1, 2], [3]]}, "wrong_type", "'arm' is not a list of numbers"),
        ({"arm": np.zeros((2, 1))}, "wrong_type", r"'arm' is float64 \(2, 1\)"),
        ({"arm": [0, 0]}, "wrong_shape", r"\(5,\), expected float32 \(4,\)"),
    ):
        given = {key: value for key, value in {**observation, **parts, **change}.items() if value is not ...}
        with pytest.raises(RequestError, match=words) as caught:
            check(given, contract, aliases=aliases)
        assert caught.value.code == code


def test_further_vectors_of_a_robot_are_taken_and_checked(observation, contract, embodiment):
    force = dataclasses.replace(embodiment.action, names=("fx", "fy", "fz", "t"), units=("N",) * 4)
    robot = dataclasses.replace(embodiment, streams={"force": force})
    feeling = dataclasses.replace(contract, embodiments={"arm": robot})
    example = example_observation(robot)
    assert example["observation.force"].shape == (4,)
    assert check(example, feeling)["observation.force"].dtype == np.float32
    assert feeling.to_dict()["embodiments"]["arm"]["streams"]["force"]["names"] == ["fx", "fy", "fz", "t"]
    error = refusal({**example, "observation.force": [0, 9, 0, 0]}, feeling)
    assert (error.code, error.key) == ("out_of_range", "observation.force")
    assert refusal({**observation, "observation.force": [0] * 4}, contract).code == "unknown_key"
    for shape in ((3, 4), (4,)):
        found = check_given({"observation.force": np.zeros(shape)}, feeling, ObservationRules())[0]
        assert found["observation.force"].shape == shape


def test_a_camera_that_is_called_image_is_that_one(contract, embodiment, observation):
    cameras = (Camera(name="wrist", height=16, width=16), Camera(name="image", height=16, width=24))
    robot = dataclasses.replace(embodiment, cameras=cameras)
    given = {
        "observation/image": observation["observation.images.front"],
        "observation/wrist_image": np.zeros((16, 16, 3), np.uint8),
    }
    checked = check({**given, "state": [0] * 4}, dataclasses.replace(contract, embodiments={"arm": robot}))
    np.testing.assert_array_equal(checked["observation.images.image"], observation["observation.images.front"])


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
        ("observation.images.front@+16", front[..., :2]),
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


def test_pictures_that_would_fill_the_server_once_enlarged_are_refused(embodiment):
    camera = Camera(name="front", height=224, width=224)
    small = np.zeros((6000, 28, 28, 3), np.uint8)
    with pytest.raises(RequestError, match="has 6000 pictures for a camera of 224 x 224") as caught:
        check_image(small, camera, key="demo.images.front", frames=True)
    assert caught.value.code == "too_large"
    assert check_image(small[:8], camera, key="demo.images.front", frames=True).shape == (8, 224, 224, 3)


def test_of_a_stack_a_policy_that_looks_back_reads_the_last_frames(observation, contract):
    contract = dataclasses.replace(contract, history=3)
    frames = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 24, 3), np.uint8)
    checked = check({**observation, "observation.images.front": frames}, contract)
    assert checked["observation.images.front"][:, 0, 0, 0].tolist() == [47, 48, 49]
    one = check({**observation, "observation.images.front": frames[7]}, contract)["observation.images.front"]
    np.testing.assert_array_equal(one, frames[7])  # the only one that it has seen


@pytest.mark.parametrize("key", ["demo.images.front", "observation.images.front@-8"])
def test_a_clip_may_have_so_many_frames_and_no_more(contract, monkeypatch, key):
    monkeypatch.setattr(observations, "MAX_SHOWN", 3)
    frames = np.zeros((4, 16, 24, 3), np.uint8)
    assert check_given({key: frames[:3]}, contract, ObservationRules())[0][key].shape == (3, 16, 24, 3)
    with pytest.raises(RequestError, match="has 4 frames, at most 3 are read") as caught:
        check_given({key: frames}, contract, ObservationRules())
    assert (caught.value.code, caught.value.key) == ("too_large", key)
    assert check_given({"observation.images.front": frames}, contract, ObservationRules())[0]


def test_what_was_done_is_read_as_far_as_a_policy_looks_back(observation, contract):
    contract = dataclasses.replace(contract, history=3)
    did = np.arange(20, dtype=np.float32).reshape(5, 4) / 10
    checked = check({**observation, "past_actions": did}, contract)
    np.testing.assert_array_equal(checked["past_actions"], did[-2:])
    assert "past_actions" not in check({**observation, "past_actions": did[:0]}, contract)
    far = check({**observation, "past_actions": did + 9}, contract)["past_actions"]
    assert far.tolist() == [[2] * 4] * 2  # what was sent has been limited as well


def test_a_stack_of_no_states_is_refused(observation, contract):
    contract = dataclasses.replace(contract, history=3)
    width = len(observation["observation.state"])
    empty = refusal({**observation, "observation.state": np.zeros((0, width), np.float32)}, contract)
    assert (empty.code, empty.key) == ("wrong_shape", "observation.state")
