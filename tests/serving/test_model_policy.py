"""A checkpoint behind the server: the same answers as the model in this process."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmseq.episode import Episode
from mmseq.errors import CheckpointError, ConfigError, ModelError, TaskError
from mmseq.serving import Server, ServerConfig
from mmseq.serving.errors import RequestError
from mmseq.serving.model_policy import ModelPolicy
from mmseq.serving.observation import ObservationRules, check_observation, example_observation
from mmseq.serving.observed import ObservationTokens, required_keys
from mmseq.serving.policy import Contract
from mmseq.testing import tiny
from support.wire import http

mmseq_client = pytest.importorskip("mmseq_client")
RATE = tiny.embodiment().rate_hz
GOAL = tiny.episode(0)["image.front"][6]
ARROW = "text, image, proprio -> action[4]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    model = tiny.model()
    model.tasks = {"policy": ARROW, "forward_dynamics": "image, action[4] -> image@+4"}
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def policy(checkpoint):
    return ModelPolicy.from_pretrained(checkpoint)


def observe(episode, t):
    return {
        "observation.images.front": episode["image.front"][t],
        "observation.state": episode["proprio"][t],
        "prompt": episode.texts[0],
    }


def test_the_server_answers_what_the_model_predicts(policy):
    episode = tiny.episode(3)
    expected = policy.model.predict(ARROW, episode, 5)["action"]
    with Server(policy, ServerConfig(port=0)) as server, mmseq_client.Client("127.0.0.1", server.port) as client:
        assert client.horizon == 4
        client.check_contract(tiny.embodiment().to_dict())
        np.testing.assert_allclose(client.infer(observe(episode, 5))["actions"], expected, atol=1e-6)


def test_a_committed_prefix_begins_the_chunk(policy):
    axes = policy.robots["arm"].action
    prefix = policy.tokenizers["action"].decode(np.array([[3, 30, 7, 0], [31, 1, 2, 9]]), axes)
    actions = policy.infer({**observe(tiny.episode(1), 2), "action_prefix": prefix})["actions"]
    assert actions.shape == (4, 4)
    np.testing.assert_array_equal(actions[:2], prefix)


def test_any_arrow_by_name_or_text(policy):
    episode = tiny.episode(2)
    given = {**observe(episode, 4), "action": episode["action"][4:8]}
    image = policy.predict("forward_dynamics", given)["image"]
    np.testing.assert_array_equal(image, policy.model.predict("image, action[4] -> image@+4", episode, 4)["image"])
    goal = {**observe(episode, 4), "observation.images.front@+5": episode["image.front"][9]}
    actions = policy.predict("image, image@+5 -> action[5]", goal)["action"]
    np.testing.assert_allclose(actions, policy.model.predict("image, image@+5 -> action[5]", episode, 4)["action"])


def test_a_goal_policy_is_served_with_its_goal_checked(policy):
    goal_policy = ModelPolicy(policy.model, arrow="image, proprio, image@+5 -> action[5]")
    contract = Contract.from_policy(goal_policy)
    keys = ["observation.images.front", "observation.state", "observation.images.front@+5"]
    assert list(contract.required(contract.embodiments["arm"])) == keys
    episode = tiny.episode(2)
    seen = {k: v for k, v in observe(episode, 4).items() if k in keys} | {keys[2]: episode["image.front"][9]}
    checked, _ = check_observation(seen, contract, ObservationRules())
    expected = policy.model.predict("image, proprio, image@+5 -> action[5]", episode, 4)["action"]
    np.testing.assert_allclose(goal_policy.infer(checked)["actions"], expected)
    for change, message in (
        ({keys[2]: seen[keys[2]][..., :2]}, "expected uint8"),
        ({keys[2]: seen[keys[2]].astype(np.float32)}, "expected uint8"),
        ({"observation.images.front@+6": seen[keys[2]]}, "is not known"),
    ):
        with pytest.raises(RequestError, match=message):
            check_observation({**seen, **change}, contract, ObservationRules())
    with pytest.raises(RequestError, match=r"front@\+5' is missing"):
        check_observation({k: v for k, v in seen.items() if k != keys[2]}, contract, ObservationRules())


def test_a_goal_alone_is_enough_where_the_arrow_asks_for_no_more(policy):
    goal_policy = ModelPolicy(policy.model, arrow="proprio, image@+5 -> action[5]")
    contract = Contract.from_policy(goal_policy)
    episode = tiny.episode(2)
    seen = {"observation.state": episode["proprio"][4], "observation.images.front@+5": episode["image.front"][9]}
    checked, _ = check_observation(seen, contract, ObservationRules())
    expected = policy.model.predict("proprio, image@+5 -> action[5]", episode, 4)["action"]
    np.testing.assert_allclose(goal_policy.infer(checked)["actions"], expected)


def test_each_robot_has_its_own_keys():
    robots = (tiny.embodiment(), tiny.embodiment("two", ("front", "wrist")))
    policy = ModelPolicy(tiny.model(tiny.tokenizers(robots)), arrow="image, proprio, image@end -> action[5]")
    contract = Contract.from_policy(policy)
    required = {name: contract.required(body) for name, body in contract.embodiments.items()}
    assert required["arm"] == ("observation.images.front", "observation.state", "observation.images.front@end")
    assert "observation.images.wrist@end" in required["two"]
    episode = tiny.episode(2)
    seen = {k: v for k, v in observe(episode, 4).items() if k != "prompt"} | {"embodiment": "arm"}
    check_observation({**seen, "observation.images.front@end": GOAL}, contract, ObservationRules())


@pytest.mark.parametrize(
    ("arrow", "message"),
    [
        ("answer, image -> action[4]", "given answer, which nobody sends"),
        ("image, progress -> action[2]", "given progress"),
        ("image, action[4]@-2 -> action[2]", r"given action\[4\]@-2, which is not over by now"),
        ("image, action[2]@+2 -> action[2]", r"given action\[2\]@\+2, which is not over by now"),
        ("image, motion[2]@-2 -> action[2]", r"given motion\[2\]@-2, which nobody sends"),
        ("image, image@+1..3 -> action[2]", "only training draws one"),
        ("image.wrist -> action[2]", "has the cameras"),
    ],
)
def test_an_arrow_that_an_observation_cannot_fill_is_not_served(policy, arrow, message):
    with pytest.raises((ConfigError, TaskError), match=message):
        ModelPolicy(policy.model, arrow=arrow).contract()


def test_past_frames_fill_a_given_video(policy):
    episode = tiny.episode(2)
    given = {"observation.images.front": episode["image.front"][2:6], "embodiment": "arm"}
    expected = policy.model.predict("video[4] -> progress", episode, 5)["progress"]
    assert policy.predict("video[4] -> progress", given)["progress"] == pytest.approx(expected, abs=1e-6)


def test_blanked_images_change_nothing_else(checkpoint):
    blind = ModelPolicy.from_pretrained(checkpoint, blank_images=True)
    one, other = observe(tiny.episode(1), 0), observe(tiny.episode(2), 0)
    other |= {"observation.state": one["observation.state"], "prompt": one["prompt"]}
    np.testing.assert_array_equal(blind.infer(one)["actions"], blind.infer(other)["actions"])


@pytest.mark.parametrize(
    ("arrow", "change", "message"),
    [
        ("image, image@+5 -> action[5]", {}, "a future image of camera 'front'"),
        ("image, image@+5 -> action[5]", {"observation.images.front@+4": GOAL}, "a future image of camera 'front'"),
        ("image, image@+5 -> action[5]", {"observation.images.front@5": GOAL}, "no readable offset"),
        (
            "image, image@+5 -> action[5]",
            {"observation.images.front@+5": GOAL, f"observation.images.front@+{5 / RATE}s": GOAL},
            "a second time",
        ),
        ("demo[2], image -> action[5]", {}, "is given a demonstration"),
        ("image -> action[1000]", {}, "at most 256 steps of 128 axes"),
        ("image -> video[200]", {}, "at most 2048 are decoded at once"),
        ("video[4] -> text", {}, "needs the last 4 frames, the observation has 1"),
        ("image, action[4] -> image@+4", {}, "it has no action"),
        ("policy", {"embodiment": "amr"}, "did you mean 'arm'"),
    ],
)
def test_what_is_missing_is_named(policy, arrow, change, message):
    with pytest.raises(TaskError, match=message.replace("[", r"\[")):
        policy.predict(arrow, {**observe(tiny.episode(0), 1), **change})


def test_a_model_without_a_policy_is_refused(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trained on no policy"):
        ModelPolicy.from_pretrained(tmp_path)


def test_a_chunk_in_few_passes_only_of_a_policy_that_has_learned_it(policy, checkpoint, monkeypatch):
    with pytest.raises(ConfigError, match=r"not learned to decode .* it has nothing.*parallel"):
        ModelPolicy.from_pretrained(checkpoint, passes=2)
    monkeypatch.setattr(policy.model, "parallel", ["policy"])
    with pytest.raises(ConfigError, match="passes is 0"):
        ModelPolicy(policy.model, passes=0)
    with pytest.raises(ConfigError, match="not learned to decode"):
        policy.model.predict("image -> action[4]", tiny.episode(3), 5, passes=2)
    expected = policy.model.predict(ARROW, tiny.episode(3), 5, passes=2)["action"]
    found = ModelPolicy(policy.model, passes=2).infer(observe(tiny.episode(3), 5))["actions"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_batch_of_robots_gets_what_each_would_get_alone(policy):
    axes = policy.robots["arm"].action
    prefix = policy.tokenizers["action"].decode(np.array([[3, 30, 7, 0]]), axes)
    asked = [observe(tiny.episode(i), 2 + i) | {"embodiment": "arm"} for i in range(3)]
    asked[1] = {**asked[1], "action_prefix": prefix, "options": {"seed": 5}}
    assert len({policy.batch_key(one) for one in asked}) == 1
    broken = {key: value for key, value in asked[0].items() if key != "observation.state"}
    found = policy.infer_many([*asked, broken])
    for one, result in zip(asked, found):
        np.testing.assert_allclose(result["actions"], policy.infer(one)["actions"], atol=1e-6)
    np.testing.assert_array_equal(found[1]["actions"][:1], prefix)
    assert isinstance(found[3], TaskError)
    for other in ({"options": {"temperature": 0.5}}, {"embodiment": "leg"}):
        assert policy.batch_key({**asked[0], **other}) != policy.batch_key(asked[0])


def test_warming_up_answers_once_and_forgives_what_it_cannot_make(policy):
    policy.warm_up()
    ModelPolicy(policy.model, arrow="image, proprio, image@+5 -> action[5]").warm_up()


@pytest.mark.parametrize("how", [{}, {"passes": 2}, {"passes": 3}])
def test_whatever_else_was_asked_a_known_robot_has_compiled_passes_only(policy, monkeypatch, how):
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(policy.model, "parallel", ["policy"])
    compiled = ModelPolicy(policy.model, compile=True, **how)
    compiled.warm_up()
    observation = example_observation(next(iter(policy.robots.values())))
    axes = policy.robots["arm"].action
    for others in (
        {},
        {"prompt": "a prompt that is longer than that of the warm-up"},
        {"prompt": "far too long " * 30},
        {"options": {"temperature": 1.0}},
    ):
        compiled.infer(observation | others)
        compiled.predict("image -> video[3]", observation)
        before = Counter(compiled.extend.passes)
        for committed in range(3):
            prefix = policy.tokenizers["action"].decode(np.full((committed, 4), 9), axes)
            asked = observation | {"action_prefix": prefix}
            plain = ModelPolicy(policy.model, **how).infer(asked)
            np.testing.assert_array_equal(compiled.infer(asked)["actions"], plain["actions"])
        assert compiled.extend.passes["as they are"] == before["as they are"]
        assert compiled.extend.passes["compiled"] >= before["compiled"] + 3 * 2


@pytest.mark.slow
def test_a_compiled_policy_answers_the_same_and_compiles_nothing_after_its_warm_up(policy):
    plain, compiled = policy, ModelPolicy(policy.model, compile=True)
    compiled.warm_up()
    shapes = set(compiled.extend.compiled)
    assert shapes
    robot = next(iter(plain.robots.values()))
    for seed in range(4):
        observation = example_observation(robot, seed=seed) | {"prompt": "another text " * seed}
        np.testing.assert_array_equal(plain.infer(observation)["actions"], compiled.infer(observation)["actions"])
    assert compiled.extend.compiled == shapes


def test_robots_whose_chunks_differ_in_length_are_not_served_together():
    slow, fast = tiny.embodiment("slow"), replace(tiny.embodiment("fast"), rate_hz=40.0)
    both = tiny.model(tiny.tokenizers((slow, fast)))
    with pytest.raises(ConfigError, match=r"\{'slow': 4, 'fast': 8\}.*--embodiment"):
        ModelPolicy(both, arrow="image -> action[0.2s]")
    assert ModelPolicy(both, arrow="image -> action[0.2s]", embodiment="fast").horizon == 8


def test_weights_that_are_not_finite_serve_nobody(checkpoint):
    broken = ModelPolicy.from_pretrained(checkpoint)
    with torch.no_grad():
        next(broken.model.transformer.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        broken.warm_up()
    good = ModelPolicy.from_pretrained(checkpoint)
    with Server(broken, ServerConfig(port=0)) as server:
        until = time.monotonic() + 20
        while "failed to warm up" not in (said := http(server, "GET", "/readyz").text):
            assert time.monotonic() < until, said
            time.sleep(0.01)
        refused = pytest.raises(mmseq_client.RefusedError, match="policy_failed")
        with mmseq_client.Client("127.0.0.1", server.port) as client, refused:
            client.infer(observe(tiny.episode(3), 5))
    with Server(good, ServerConfig(port=0), load=lambda: broken) as server, pytest.raises(ModelError):
        server.reload().result(20)


def test_a_robot_without_cameras_looks_back_at_its_states():
    blind = tiny.embodiment("blind", cameras=())
    model = tiny.model(tiny.tokenizers((blind,)))
    states = np.linspace(-0.9, 0.9, 4, dtype=np.float32)[:, None].repeat(3, 1)
    tokens = ObservationTokens({"observation.state": states}, model.tokenizers, "blind")
    bins = model.tokenizers.encode_vector("proprio", "blind", states, what="state", where="here")
    assert tokens.now == 3
    np.testing.assert_array_equal(tokens.codes("proprio", 1, 2), bins[1:2])
    np.testing.assert_array_equal(tokens.codes("proprio", 0, 4), bins)
    policy = ModelPolicy(model, arrow="text, proprio[4] -> action[4]")
    for seen in (states[0], states[:2], states):  # an episode begins
        assert policy.infer({"observation.state": seen, "prompt": "go"})["actions"].shape == (4, 4)


def test_a_policy_is_given_what_its_robot_did(policy):
    """And as an episode begins, that it stood still with its gripper open."""
    arrow, episode = "image, action[2]@-2 -> action[4]", tiny.episode(2)
    looks_back = ModelPolicy(policy.model, arrow=arrow)
    contract = Contract.from_policy(looks_back)
    assert contract.history == 3
    assert contract.required(contract.embodiments["arm"]) == ("observation.images.front",)
    rest = np.array([[0, 0, 0, -1.0]] * 2, np.float32)  # its actions are changes
    with Server(looks_back, ServerConfig(port=0)) as server, mmseq_client.Client("127.0.0.1", server.port) as client:
        sent = rest
        for step in range(4):  # asked at each step: what it was sent last is what it did
            seen = {"observation.images.front": episode["image.front"][step]}
            now = Episode.from_arrays(
                "now",
                RATE,
                {"image.front": episode["image.front"][[step] * 3], "action": np.concatenate([sent[-2:], sent[-1:]])},
                embodiment="arm",
            )
            expected = policy.model.predict(arrow, now, 2)["action"]
            reply = client.infer({**seen, "step": step})["actions"]
            np.testing.assert_allclose(reply, expected, atol=1e-6)
            sent = np.concatenate([sent, reply[:1]])


def test_a_client_says_what_its_robot_did(policy):
    arrow, episode = "image, action[2]@-2 -> action[4]", tiny.episode(2)
    expected = policy.model.predict(arrow, episode, 4)["action"]
    seen = {"observation.images.front": episode["image.front"][4], "past_actions": episode["action"][:4]}
    np.testing.assert_allclose(ModelPolicy(policy.model, arrow=arrow).infer(seen)["actions"], expected)
    with pytest.raises(TaskError, match=r"needs the last 2 commands, the observation has 1.*past_actions"):
        policy.predict(arrow, {**seen, "past_actions": episode["action"][3:4]})
    assert policy.predict("image, action[2]@-2 -> image@+1", seen)["image"].shape == (16, 16, 3)


def test_what_an_absolute_robot_did_before_its_episode_is_where_it_stands():
    robot = replace(tiny.embodiment(), action_form="absolute")
    policy = ModelPolicy(tiny.model(tiny.tokenizers((robot,))), arrow="action[2]@-2, image -> action[4]")
    seen = {"observation.images.front": GOAL, "observation.state": np.float32([0.25, -0.5, 1.0])}
    assert required_keys(policy.arrow, robot) == ["observation.images.front", "observation.state"]
    did = np.float32([[0.25, -0.5, 1.0, -1.0]] * 2)
    now = policy.infer({**seen, "past_actions": did})["actions"]
    np.testing.assert_array_equal(policy.infer(seen)["actions"], now)
    np.testing.assert_array_equal(policy.infer({**seen, "past_actions": did[:1]})["actions"], now)
    silent = replace(robot, proprio=tiny.axes("abc"))
    with pytest.raises(ConfigError, match=r"nobody knows those of x, y, z of robot 'arm'.*proprio\[2\]"):
        ModelPolicy(tiny.model(tiny.tokenizers((silent,))), arrow="image, action[2]@-2 -> action[4]")


@pytest.mark.parametrize("arrow", ["image, video[4]@+8 -> action[5]", "image, proprio[2]@+3, image@+3 -> action[5]"])
def test_what_lies_ahead_is_sent_with_its_offset(policy, arrow):
    episode = tiny.episode(2)
    goal_policy = ModelPolicy(policy.model, arrow=arrow)
    contract = Contract.from_policy(goal_policy)
    seen = {"observation.images.front": episode["image.front"][4]}
    ahead = {
        "observation.images.front@+8": episode["image.front"][9:13],
        "observation.state@+3": episode["proprio"][6:8],
        "observation.images.front@+3": episode["image.front"][7],
    }
    required = contract.required(contract.embodiments["arm"])
    seen |= {key: ahead[key] for key in required if key in ahead}
    assert set(seen) == set(required)
    expected = policy.model.predict(arrow, episode, 4)["action"]
    with Server(goal_policy, ServerConfig(port=0)) as server, mmseq_client.Client("127.0.0.1", server.port) as client:
        np.testing.assert_allclose(client.infer(seen)["actions"], expected, atol=1e-6)
    np.testing.assert_allclose(policy.predict(arrow, seen)["action"], expected, atol=1e-6)
    short = {key: value[-1:] if "@" in key and len(value) in (2, 4) else value for key, value in seen.items()}
    with pytest.raises(
        TaskError, match=r"future video of 4 frames .*there it has 1|needs 'observation.state' of steps 2"
    ):
        goal_policy.infer(short)


def test_two_offsets_that_are_one_step_are_one_picture(policy):
    arrow, episode = f"image, image@+4, image@+{4 / RATE}s -> action[4]", tiny.episode(2)
    twice = ModelPolicy(policy.model, arrow=arrow)
    seen = {"observation.images.front": episode["image.front"][4]}
    goal = {"observation.images.front@+4": episode["image.front"][8]}
    assert required_keys(twice.arrow, twice.robots["arm"]) == [*seen, *goal]
    expected = policy.model.predict(arrow, episode, 4)["action"]
    np.testing.assert_allclose(twice.infer({**seen, **goal})["actions"], expected)
    both = {**seen, **goal, f"observation.images.front@+{4 / RATE}s": GOAL}
    with pytest.raises(
        TaskError, match=r"front@\+0.2s' is given a second time: at 20 Hz '.*front@\+4' is the same step"
    ):
        twice.infer(both)


@pytest.mark.parametrize(
    ("arrow", "reads"),
    [
        ("text, image -> action[4]", True),
        ("(text, image -> action[1]) * 2", True),
        ("(image -> action[1]) * 2, text", True),
        ("image, proprio -> action[4]", False),
        ("image -> text, action[4]", False),
    ],
)
def test_a_contract_says_whether_the_policy_reads_an_instruction(policy, arrow, reads):
    assert Contract.from_policy(ModelPolicy(policy.model, arrow=arrow)).to_dict()["reads_prompt"] is reads
