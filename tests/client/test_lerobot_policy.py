"""A checkpoint in LeRobot: its own factory, pipelines and commands drive it, in process and through a server."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lerobot_policy_mmseq
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.envs.utils import preprocess_observation
from lerobot.policies import make_pre_post_processors
from lerobot.policies.factory import get_policy_class
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.rollout.inference.rtc import supports_rtc_inference
from lerobot_policy_mmseq.check import CheckConfig, differences, needed
from lerobot_policy_mmseq.check import main as check
from lerobot_policy_mmseq.processor_mmseq import make_mmseq_pre_post_processors
from mmseq_client import Client, ContractError, RefusedError, example_observation

from mmseq.cli import main
from mmseq.errors import CheckpointError, ConfigError
from mmseq.serving import Server, ServerConfig
from mmseq.serving.lerobot_directory import export_lerobot
from mmseq.serving.model_policy import ModelPolicy
from mmseq.testing import tiny

ROOT = Path(__file__).parents[2]
ARROW = "text, image, proprio -> action[4]"
AXES = ("x.pos", "y.pos", "z.pos", "g.pos")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("lerobot") / "checkpoint"
    model = tiny.model()
    model.tasks = {"policy": ARROW}
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(checkpoint):
    with Server(ModelPolicy.from_pretrained(checkpoint), ServerConfig(port=0, grace_s=2)) as running:
        yield running


@pytest.fixture(scope="module")
def exported(checkpoint):
    out = checkpoint.with_name("exported")
    assert main(["export", str(checkpoint), "lerobot", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def remote(checkpoint, server):
    return export_lerobot(checkpoint, checkpoint.with_name("remote"), server=f"127.0.0.1:{server.port}")


def load(directory, *overrides, rename=None):
    """As `lerobot-rollout` loads `--policy.path=directory`: policy and pipelines."""
    config = PreTrainedConfig.from_pretrained(directory, cli_overrides=list(overrides))
    config.pretrained_path = Path(directory)
    policy = get_policy_class(config.type).from_pretrained(directory, config=config)
    changes = {"device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": rename or {}}}
    before, after = make_pre_post_processors(config, str(directory), preprocessor_overrides=changes)

    def act(observation):
        with torch.inference_mode():
            return after(policy.select_action(before(observation)))

    return policy, act


def seen(seed):
    """What the robot sees: the raw frame, and the same as mmseq's own clients send it."""
    observation = example_observation(tiny.embodiment().to_dict(), seed)
    task = observation["prompt"] = tiny.TEXTS[seed % len(tiny.TEXTS)]
    frame = {key: value for key, value in observation.items() if key.startswith("observation")}
    return prepare_observation_for_inference(dict(frame), torch.device("cpu"), task, "arm"), observation


def test_the_directory_is_what_lerobots_own_classes_would_write(exported, tmp_path):
    config = PreTrainedConfig.from_pretrained(exported)
    assert isinstance(config, lerobot_policy_mmseq.MmseqConfig)
    assert (config.horizon, config.n_action_steps, config.rate_hz) == (4, 2, 20)
    assert config.action_feature_names == ["x", "y", "z", "g"]
    assert config.image_features["observation.images.front"].shape == (3, 16, 16)
    assert config.robot_state_feature.shape == (3,)
    assert config.action_feature.shape == (4,)
    for made in make_mmseq_pre_post_processors(config):
        made.save_pretrained(tmp_path)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        assert json.loads((exported / name).read_text()) == json.loads((tmp_path / name).read_text())


def test_in_process_the_actions_are_those_of_the_policy(exported, checkpoint):
    _, act = load(exported, "--n_action_steps=4")
    ours = ModelPolicy.from_pretrained(checkpoint)
    for seed in range(10):
        batch, observation = seen(seed)
        expected = ours.infer(observation)["actions"]
        got = np.concatenate([act(dict(batch)).numpy() for _ in range(4)])
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert len({tuple(a) for a in expected}) > 1


def compare(remote, server, calls):
    """Actions through the plug-in against those of mmseq's own client, `calls` of each."""
    policy, act = load(remote, "--n_action_steps=1")
    policy.reset()
    with Client("127.0.0.1", server.port) as client:
        for seed in range(calls):
            batch, observation = seen(seed)
            np.testing.assert_allclose(act(batch).numpy()[0], client.infer(observation)["actions"][0], atol=1e-6)


def test_through_a_server_the_actions_are_those_of_the_client(remote, server):
    assert not (remote / "checkpoint").exists()
    compare(remote, server, 50)


@pytest.mark.slow
def test_a_thousand_calls_through_the_plug_in(remote, server):
    errors = dict(server.service.errors)
    compare(remote, server, 1000)
    assert dict(server.service.errors) == errors


def test_the_limit_of_the_step_holds_from_chunk_to_chunk(checkpoint, tmp_path):
    """A robot that executes 2 of 4 actions: the server limits within a chunk, the gate here from what was executed,
    and before anything was from where the robot stands."""
    axes = replace(tiny.axes("xyzg"), max_step=(0.05,) * 4)
    robot = replace(tiny.embodiment(), action_form="absolute", action=axes)
    model = tiny.model(tiny.tokenizers((robot,)))
    model.tasks = {"policy": ARROW}
    model.save_pretrained(tmp_path / "checkpoint")
    with Server(ModelPolicy.from_pretrained(tmp_path / "checkpoint"), ServerConfig(port=0, grace_s=2)) as limited:
        out = export_lerobot(tmp_path / "checkpoint", tmp_path / "out", server=f"127.0.0.1:{limited.port}")
        policy, act = load(out)
        actions = np.concatenate([act(seen(step)[0]).numpy() for step in range(12)])
        assert np.abs(np.diff(actions, axis=0)).max() <= 0.05 + 1e-5
        assert np.abs(np.diff(actions, axis=0)).max() > 0.04
        assert 0.04 < np.abs(actions[0, :3] - seen(0)[1]["observation.state"]).max() <= 0.05 + 1e-5
        assert policy.gate.counts["clamped_step"] > 0


def test_a_lagging_arm_goes_on_where_it_was_commanded_after_a_hold_and_a_late_answer(tmp_path, monkeypatch):
    axes = replace(tiny.axes("xyzg"), max_step=(0.05,) * 4)
    robot = replace(tiny.embodiment(), action_form="absolute", action=axes)
    model = tiny.model(tiny.tokenizers((robot,)))
    model.tasks = {"policy": ARROW}
    model.save_pretrained(tmp_path / "checkpoint")
    policy, act = load(export_lerobot(tmp_path / "checkpoint", tmp_path / "out"), "--n_action_steps=1")
    frame, answers, steps = seen(0)[0], [], []

    def infer(observations, step):
        steps.append(step)
        answer = answers.pop(0) if answers else np.full((policy.config.horizon, 4), 0.8, np.float32)
        if isinstance(answer, str):
            raise RefusedError(answer, "for the test", None, 20.0)
        return [answer]

    monkeypatch.setattr(policy.backend, "infer", infer)

    def at(state):
        frame["observation.state"] = torch.full((1, 3), state)
        return act(frame)[0, 0].item()

    commands = [at(0.5)]
    assert commands[0] == pytest.approx(0.55)  # from where it stands
    for _ in range(8):
        commands.append(at(commands[-1] - 0.3))
    assert commands[-1] == pytest.approx(0.8)
    for code in ("held", "late"):
        answers.append(code)
        assert at(0.5) == pytest.approx(0.8)
        assert at(0.5) == pytest.approx(0.8)
    answers.append("held")
    at(0.5)
    assert at(-0.5) == pytest.approx(-0.45)  # somebody has moved it
    assert steps == [*range(9), 9, 9, 10, 10, 11, 11]  # holding is no step of the episode


def test_several_environments_get_what_each_would_get_alone(exported, remote):
    rows = [seen(seed) for seed in range(3)]
    raw = {
        "pixels": {"front": np.stack([o["observation.images.front"] for _, o in rows])},
        "agent_pos": np.stack([o["observation.state"] for _, o in rows]),
    }
    for directory in (exported, remote):
        batch = preprocess_observation(raw)
        batch["task"] = [o["prompt"] for _, o in rows]
        policy, act = load(directory)
        together = act(batch)
        assert together.shape == (3, 4)
        for row, (single, _) in zip(together, rows):
            policy.reset()
            torch.testing.assert_close(act(single)[0], row)


def test_frames_of_a_camera_are_cropped_and_scaled_as_in_training(exported):
    from mmseq_client.images import fit

    large = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    batch, _ = seen(0)
    policy, _ = load(exported)
    batch["observation.images.front"] = torch.from_numpy(large).permute(2, 0, 1)[None] / 255
    (got,) = policy.observations.read(batch)
    np.testing.assert_array_equal(got["observation.images.front"], fit(large, 16, 16))


def test_real_time_chunking_of_lerobot_commits_what_is_under_way(remote):
    policy, _ = load(remote)
    assert supports_rtc_inference(policy)
    batch, _ = seen(0)
    first = policy.predict_action_chunk(batch)[0]
    batch, _ = seen(1)
    left = torch.cat([first[1:3], torch.zeros(3, 4)])  # LeRobot fills it up with zeros
    second = policy.predict_action_chunk(batch, inference_delay=4, prev_chunk_left_over=left)[0]
    torch.testing.assert_close(second[:2], first[1:3])


def test_what_differs_from_the_contract_is_named_before_anything_moves(exported, remote, server):
    good, _ = seen(0)
    _, act = load(exported)
    for change, message in (
        ({"observation.state": torch.zeros(1, 4)}, r"observation.state.*\(1, 4\).*x.*y.*z"),
        ({"observation.images.front": None}, r"observation.images.front.*--rename_map"),
        ({"observation.images.front": torch.full((1, 3, 16, 16), 255.0)}, "0..1"),
        ({"observation.images.front": torch.zeros(1, 16, 16, 3)}, "3, height, width"),
        ({"task": ""}, "--task"),
    ):
        with pytest.raises(ContractError, match=message):
            act({**good, **change})
    far = {**good, "observation.state": torch.tensor([[0, 90.0, 0]])}
    with pytest.raises(Exception, match=r"axis 'y' is 90"):
        act(far)
    with pytest.raises(RefusedError, match=r"axis 'y' is 90"):
        load(remote)[1](far)


def test_what_lerobot_says_of_dataset_and_environment_is_compared(exported):
    config = PreTrainedConfig.from_pretrained(exported)
    make = get_policy_class("mmseq").from_pretrained
    features = {"action": {"names": ["y", "x", "z", "g"]}, "observation.state": {"names": ["x", "y", "z"]}}
    with pytest.raises(ContractError, match=r"names of 'action' in the dataset: \['y', 'x'"):
        make(exported, config=config, dataset_meta=SimpleNamespace(features=features, fps=20))
    features["action"]["names"] = ["x", "y", "z", "g"]
    with pytest.raises(ContractError, match="fps of the dataset: 30, 20"):
        make(exported, config=config, dataset_meta=SimpleNamespace(features=features, fps=30))
    make(exported, config=config, dataset_meta=SimpleNamespace(features=features, fps=20))
    config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))}
    with pytest.raises(ContractError, match=r"\(7,\) there, \(4,\) here"):
        make(exported, config=config)


def test_a_robot_of_lerobot_is_compared_by_name_order_and_rate():
    contract = {
        "rate_hz": 20,
        "cameras": [{"name": "front", "height": 16, "width": 16}],
        "proprio": {"names": list(AXES)},
        "action": {"names": list(AXES)},
    }
    there = dict.fromkeys(AXES, float)
    assert differences(contract, {**there, "front": (480, 640, 3), "x.torque": float}, there, 20) == []
    swapped = dict.fromkeys((AXES[1], AXES[0], *AXES[2:]), float)
    found = differences(contract, {**there, "top": (480, 640, 3)}, swapped, 30)
    assert [line.split(":")[0] for line in found] == ["action", "cameras", "fps"]
    renamed = {"observation.images.top": "observation.images.front"}
    assert differences(contract, {**there, "top": (480, 640, 3)}, there, 20, renamed) == []


def test_axes_that_lerobot_does_not_pass_on_are_named():
    names = ["x", "y"]
    contract = {"rate_hz": 20, "cameras": [], "proprio": {"names": names}, "action": {"names": names}}
    found = differences(contract, dict.fromkeys(names, float), dict.fromkeys(names, float), 20)
    assert len(found) == 2
    for line in found:
        assert "only axes ending in .pos or .vel, and the robot also has ['x', 'y']" in line


def test_the_check_takes_the_command_line_of_a_rollout(exported, tmp_path):
    given = ["--policy.path=OUT", "--task", "pick up", "--robot.type=a", "--fps", "30", "--rename_map={}", "--task=b"]
    assert needed([*given, "--policy.server=gpu:1"]) == [
        "--policy=OUT",
        "--robot.type=a",
        "--fps",
        "30",
        "--rename_map={}",
    ]
    wrong = CheckConfig(robot=None, policy=tmp_path)
    with pytest.raises(SystemExit, match="the folder that `mmseq export CHECKPOINT lerobot OUT` wrote"):
        check.__wrapped__(wrong)


def test_another_contract_on_the_server_is_refused(exported, checkpoint, tmp_path, server):
    with pytest.raises(ContractError, match="chunks have 2 steps here, 4 on the server"):
        load(exported, f"--server=127.0.0.1:{server.port}", "--horizon=2")
    body = json.loads((exported / "embodiment.json").read_text())
    body["proprio"]["units"][1] = "rad"
    other = export_lerobot(checkpoint, tmp_path / "other", server=f"127.0.0.1:{server.port}")
    (other / "embodiment.json").write_text(json.dumps(body))
    with pytest.raises(ContractError, match=r"proprio.units.*rad"):
        load(other)
    with pytest.raises(ContractError, match="HOST:PORT"):
        load(exported, "--server=8000")
    with pytest.raises(FileNotFoundError, match=r"--policy.server"):
        load(other, "--server=null")


def test_an_operators_hold_keeps_the_robot_and_it_goes_on_by_itself(remote, server):
    policy, act = load(remote, "--n_action_steps=1")
    batch, _ = seen(0)
    given = policy.select_action(dict(batch))
    moving = given[0].clone()
    given.mul_(50)  # a step of LeRobot's that works in place
    server.service.hold("a person is near")
    try:
        held = act(batch)[0]  # actions are changes: zeros, and the gripper as it was
        assert held.tolist() == [0, 0, 0, moving[3].item()]
        assert policy._last[0].tolist() == held.tolist()  # where the limit of the step begins then
        policy.reset()
        with pytest.raises(RefusedError, match="held"):
            act(batch)
    finally:
        server.service.release()
    torch.testing.assert_close(act(batch)[0], moving)


def test_export_refuses_what_lerobot_cannot_drive(checkpoint, exported, tmp_path):
    with pytest.raises(CheckpointError, match="exists"):
        export_lerobot(checkpoint, exported)
    with pytest.raises(ConfigError, match=r"LeRobot has no observation.images.front@\+4"):
        export_lerobot(checkpoint, tmp_path / "a", policy="image, proprio, image@+4 -> action[4]")
    with pytest.raises(ConfigError, match="1 to 4"):
        export_lerobot(checkpoint, tmp_path / "a", execute=9)
    for server in ("foo", "http://gpu:80", "gpu:99999999", ":80"):
        with pytest.raises(ConfigError, match="Write HOST:PORT"):
            export_lerobot(checkpoint, tmp_path / "a", server=server)
    with pytest.raises(ConfigError, match="passes is the server"):
        export_lerobot(checkpoint, tmp_path / "a", server="gpu:80", passes=4)
    with pytest.raises(ConfigError, match="not learned to decode"):
        export_lerobot(checkpoint, tmp_path / "a", passes=4)
    tiny.model(tiny.tokenizers((tiny.embodiment("one"), tiny.embodiment("two")))).save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"one, two\. Name yours with --embodiment"):
        export_lerobot(tmp_path / "two", tmp_path / "a", policy=ARROW)
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Installed distributions: the plug-in, and those of an environment and a robot."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "serve" / "lerobot", root / "source", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(root)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=root / "source", check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(root)
    for name in ("lerobot_env_square", "lerobot_robot_square"):
        shutil.copy(Path(__file__).parent / "lerobot_plugins" / f"{name}.py", root)
        (root / f"{name}-1.dist-info").mkdir()
        (root / f"{name}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    return root


def command(site, module, *options):
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "serve" / "client")])
    return subprocess.run(
        [sys.executable, "-m", module, *options],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_lerobot_eval_runs_it_in_process_and_through_a_server(exported, server, site, tmp_path):
    rewards = []
    for more in ([], [f"--policy.server=127.0.0.1:{server.port}"]):
        done = command(
            site,
            "lerobot.scripts.lerobot_eval",
            f"--policy.path={exported}",
            "--policy.device=cpu",
            "--env.type=square",
            "--eval.n_episodes=4",
            "--eval.batch_size=2",
            '--rename_map={"observation.images.cam": "observation.images.front"}',
            f"--output_dir={tmp_path / str(len(more))}",
            *more,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        info = json.loads((tmp_path / str(len(more)) / "eval_info.json").read_text())
        rewards.append(info["per_task"][0]["metrics"]["sum_rewards"])
    assert len(rewards[0]) == 4
    assert rewards[0] == pytest.approx(rewards[1])
    assert rewards[0][0] != 0


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_lerobot_rollout_drives_a_robot(inference, site, tmp_path):
    robot = replace(tiny.embodiment(), proprio=tiny.axes(AXES), action=tiny.axes(AXES), grippers=())
    model = tiny.model(tiny.tokenizers((replace(robot, action_form="absolute"),)))
    model.tasks = {"policy": ARROW.replace("4", "16")}
    model.save_pretrained(tmp_path / "checkpoint")
    out = export_lerobot(tmp_path / "checkpoint", tmp_path / "out")
    options = ["--robot.type=square", f"--robot.log={tmp_path / 'actions.jsonl'}"]
    checked = command(site, "lerobot_policy_mmseq.check", f"--policy={out}", "--fps=20", *options)
    assert checked.returncode == 0, checked.stderr[-3000:]
    other = command(site, "lerobot_policy_mmseq.check", f"--policy={out}", *options, "--robot.swapped=true")
    assert other.returncode != 0
    assert "action: the robot has ['y.pos', 'x.pos'" in other.stderr
    assert "fps: 30 here, 20 in the contract" in other.stderr
    done = command(
        site,
        "lerobot.scripts.lerobot_rollout",
        f"--policy.path={out}",
        "--policy.device=cpu",
        "--device=cpu",
        "--fps=20",
        "--duration=4",
        "--task=open the window",
        "--return_to_initial_position=false",
        f"--inference.type={inference}",
        *options,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    actions = [json.loads(line) for line in (tmp_path / "actions.jsonl").read_text().splitlines()]
    assert len(actions) > 30
    assert all(set(action) == set(AXES) and all(-1 <= v <= 1 for v in action.values()) for action in actions)
    assert len({action["x.pos"] for action in actions}) > 1
