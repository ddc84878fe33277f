"""The robots of serve/robots/: a LeRobot robot, a ROS 2 node, the simulator."""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmseq_client import Client, ContractError, ControlLoop, NoObservationError

from mmseq.data.importing import square
from mmseq.embodiment import Axes, Camera, Embodiment, Gripper
from mmseq.episode import Episode
from mmseq.serving import ReplayPolicy, Server, ServerConfig

ROBOTS = Path(__file__).parents[2] / "serve" / "robots"
JOINTS = ("shoulder.pos", "elbow.pos", "gripper.pos")


@pytest.fixture(scope="module", autouse=True)
def folder():
    sys.path.insert(0, str(ROBOTS))
    yield
    sys.path.remove(str(ROBOTS))


def arm(names=JOINTS, size: int = 16) -> Embodiment:
    n = len(names)
    limits = {"low": (-90.0,) * n, "high": (90.0,) * n, "minimum": (-180.0,) * n, "maximum": (180.0,) * n}
    axes = Axes(names=names, units=("degree",) * n, **limits)
    camera = Camera(name="front", height=size, width=size)
    return Embodiment(name="so", rate_hz=50, cameras=(camera,), proprio=axes, action=axes)


def replay(robot: Embodiment) -> ReplayPolicy:
    actions = np.linspace(0, 30, 100 * len(robot.action), dtype=np.float32).reshape(100, -1)
    episode = Episode.from_arrays("up", 50, {"proprio": actions, "action": actions}, texts=["up"], embodiment="so")
    return ReplayPolicy(episode, robot, horizon=16, execute=8)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (16, 16), (10, 12)])
def test_frames_are_cropped_and_scaled_as_at_import(height, width):
    from mmseq_client.images import fit

    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(frame, 16, 16), square(frame, 16))
    assert fit(frame, 8, 16).shape == (8, 16, 3)
    with pytest.raises(ValueError, match="uint8"):
        fit(frame.astype(np.float32), 16, 16)


class TestLeRobot:
    @pytest.fixture
    def lerobot_arm(self, tmp_path):
        """A real subclass of LeRobot's Robot: motors that reach each position at once, and a camera."""
        robots = pytest.importorskip("lerobot.robots")

        @dataclass(kw_only=True)
        class Config(robots.RobotConfig):
            pass

        class Arm(robots.Robot):
            config_class, name = Config, "test_arm"
            action_features = property(lambda self: dict.fromkeys(reversed(JOINTS), float))
            observation_features = property(lambda self: {**self.action_features, "front": (48, 64, 3)})
            is_connected = is_calibrated = True
            connect = calibrate = configure = disconnect = lambda self, *_: None

            def __init__(self, config):
                super().__init__(config)
                self.positions, self.sent = dict.fromkeys(JOINTS, 0.0), []

            def get_observation(self):
                return {**self.positions, "front": np.full((48, 64, 3), 7, np.uint8)}

            def send_action(self, action):
                self.positions.update(action)
                self.sent.append(action)
                return action

        return Arm(Config(id="a", calibration_dir=tmp_path))

    def test_it_follows_the_server_by_the_names_of_its_joints(self, lerobot_arm):
        from lerobot_robot import LeRobotRobot

        policy = replay(arm())
        with Server(policy, ServerConfig(port=0)) as server, Client("127.0.0.1", server.port) as client:
            loop = ControlLoop(client, LeRobotRobot(lerobot_arm, arm().to_dict()))
            loop.run(seconds=0.6)
        assert loop.counts["refused"] == loop.counts["withheld"] == 0
        moved = lerobot_arm.sent[:-1]  # the last one is that of stop()
        assert len(moved) > 10
        found = np.array([[command[name] for name in JOINTS] for command in moved])
        assert all(any(np.allclose(row, action) for action in policy.actions) for row in found)
        assert lerobot_arm.sent[-1] == moved[-1]

    @pytest.mark.parametrize("form", ["absolute", "velocity"])
    def test_it_comes_to_rest_without_its_cameras(self, lerobot_arm, form):
        from lerobot_robot import LeRobotRobot

        gripper = Gripper(axis=JOINTS[2], open=9.0, closed=-9.0)
        robot = LeRobotRobot(lerobot_arm, dataclasses.replace(arm(), action_form=form, grippers=(gripper,)).to_dict())

        def dead():
            raise TimeoutError("camera front: no frame within 200 ms")

        lerobot_arm.get_observation = dead
        robot.stop()  # nothing was commanded and nothing is known
        lerobot_arm.sent.clear()
        command = np.float32([1, 2, 3])
        robot.act(command)
        command *= 50
        robot.stop()
        rest = [1, 2, 3] if form == "absolute" else [0, 0, 3]
        assert lerobot_arm.sent[-1] == dict(zip(JOINTS, rest, strict=True))

    def test_it_stops_where_it_is_and_keeps_its_grip(self, lerobot_arm):
        from lerobot_robot import LeRobotRobot

        gripper = Gripper(axis=JOINTS[2], open=9.0, closed=-9.0)
        robot = LeRobotRobot(lerobot_arm, dataclasses.replace(arm(), grippers=(gripper,)).to_dict())
        robot.act(np.float32([10, 20, -9]))
        lerobot_arm.positions.update(dict(zip(JOINTS, [8.0, 19.0, -4.0], strict=True)))  # it lags, and holds a cup
        robot.stop()
        assert lerobot_arm.sent[-1] == dict(zip(JOINTS, [8.0, 19.0, -9.0], strict=True))

    @pytest.mark.parametrize(
        ("contract", "words"),
        [
            (arm(names=("shoulder.pos", "elbow.pos", "wrist.pos")), r"no proprio axis \['wrist.pos'\]"),
            (arm(names=JOINTS[:2]), r"commands no \['gripper.pos'\]"),
            (dataclasses.replace(arm(), cameras=(Camera(name="top", height=8, width=8),)), r"no camera \['top'\]"),
        ],
    )
    def test_another_robot_is_refused(self, lerobot_arm, contract, words):
        from lerobot_robot import LeRobotRobot

        with pytest.raises(ContractError, match=words):
            LeRobotRobot(lerobot_arm, contract.to_dict())

    def test_the_command_knows_every_robot_of_lerobot(self):
        pytest.importorskip("lerobot.robots")
        command = [sys.executable, str(ROBOTS / "lerobot_robot.py"), "--robot.type=so101_follower", "--help"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        for words in ("--robot.port", "koch_follower", "--contract", "--execute", "--ca_file"):
            assert words in done.stdout

    def test_the_command_says_what_is_wrong_before_the_robot_is_connected(self, tmp_path):
        import lerobot_robot

        config = lerobot_robot.DriveConfig(robot=None, contract=tmp_path / "nope.json", prompt="up")
        with pytest.raises(SystemExit, match=r"No such file.*nope\.json"):
            lerobot_robot.main.__wrapped__(config)
        (tmp_path / "nope.json").write_text("{}")
        config.ca_file = tmp_path / "nope.pem"
        with pytest.raises(SystemExit, match=r"ca_file .*nope\.pem' cannot be read"):
            lerobot_robot.main.__wrapped__(config)


@dataclass
class Image:
    """The fields of sensor_msgs/Image that are read."""

    height: int
    width: int
    encoding: str
    step: int
    data: bytes


@dataclass
class JointState:
    name: list
    position: list
    velocity: list = field(default_factory=list)


@dataclass
class Float64MultiArray:
    data: list


class Node:
    """Topics within one process."""

    def __init__(self):
        self.subscriptions, self.published = {}, []

    def create_subscription(self, kind, topic, callback, depth):
        self.subscriptions[topic] = callback

    def create_publisher(self, kind, topic, depth):
        return SimpleNamespace(publish=lambda message: self.published.append((topic, message)))


class TestRos2:
    def image(self, frame: np.ndarray, encoding: str = "rgb8", padding: int = 0) -> Image:
        rows = frame.reshape(len(frame), -1)
        rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
        return Image(*frame.shape[:2], encoding, rows.shape[1], rows.tobytes())

    @pytest.mark.parametrize("padding", [0, 5])
    def test_images_of_every_encoding_become_rgb(self, padding):
        from ros2_robot import image_to_array

        frame = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        alpha = np.full((6, 8, 1), 9, np.uint8)
        bgr = frame[..., ::-1]
        for encoding, pixels in (
            ("rgb8", frame),
            ("bgr8", bgr),
            ("rgba8", np.concatenate([frame, alpha], 2)),
            ("bgra8", np.concatenate([bgr, alpha], 2)),
        ):
            np.testing.assert_array_equal(image_to_array(self.image(pixels, encoding, padding)), frame)
        grey = image_to_array(self.image(frame[..., 0], "mono8", padding))
        np.testing.assert_array_equal(grey, np.repeat(frame[..., :1], 3, 2))
        with pytest.raises(ValueError, match=r"'16UC1'; use one of rgb8"):
            image_to_array(self.image(frame, "16UC1"))

    def test_a_node_observes_commands_and_notices_a_silent_camera(self):
        from ros2_robot import Ros2Robot

        now, node = [100.0], Node()
        messages = SimpleNamespace(Image=Image, JointState=JointState, Float64MultiArray=Float64MultiArray)
        contract = arm().to_dict()
        make = lambda cameras: Ros2Robot(
            node, contract, cameras, "/joints", "/commands", messages, clock=lambda: now[0]
        )
        with pytest.raises(ContractError, match=r"topics are given for cameras \['top'\]"):
            make({"top": "/camera"})
        robot = make({"front": "/camera"})
        with pytest.raises(NoObservationError, match="camera 'front'"):
            robot.observe()
        node.subscriptions["/camera"](self.image(np.full((20, 30, 3), 7, np.uint8)))
        node.subscriptions["/joints"](JointState([JOINTS[2], JOINTS[0]], [3.0, 1.0]))
        with pytest.raises(NoObservationError, match=f"joint '{JOINTS[1]}'"):  # publishes separately, and later
            robot.observe()
        node.subscriptions["/joints"](JointState(["another", JOINTS[1]], [9.0, 2.0]))
        seen = robot.observe()
        assert seen["observation.images.front"].shape == (16, 16, 3)
        np.testing.assert_array_equal(seen["observation.state"], [1, 2, 3])
        now[0] += 0.6
        node.subscriptions["/joints"](JointState(list(JOINTS), [1.0, 2.0, 3.0]))
        with pytest.raises(NoObservationError, match=r"camera 'front': no message for 0\.5 s"):
            robot.observe()
        robot.act(np.float32([1, 2, 3]))
        robot.stop()
        assert node.published == [("/commands", Float64MultiArray([1.0, 2.0, 3.0]))]

    def test_a_robot_without_proprio_observes_its_cameras(self):
        from ros2_robot import Ros2Robot

        node = Node()
        messages = SimpleNamespace(Image=Image, JointState=JointState, Float64MultiArray=Float64MultiArray)
        body = dataclasses.replace(arm(), proprio=None)
        robot = Ros2Robot(node, body.to_dict(), {"front": "/camera"}, "/joints", "/commands", messages)
        node.subscriptions["/camera"](self.image(np.full((16, 16, 3), 7, np.uint8)))
        assert set(robot.observe()) == {"observation.images.front"}

    def test_a_velocity_robot_is_stopped_with_zeros_and_keeps_its_grip(self):
        from ros2_robot import Ros2Robot

        node = Node()
        messages = SimpleNamespace(Image=Image, JointState=JointState, Float64MultiArray=Float64MultiArray)
        body = dataclasses.replace(
            arm(), action_form="velocity", grippers=(Gripper(axis=JOINTS[2], open=3.0, closed=-3.0),)
        )
        robot = Ros2Robot(node, body.to_dict(), {"front": "/camera"}, "/joints", "/commands", messages)
        robot.stop()
        command = np.float32([1, 2, -3])
        robot.act(command)
        command *= 50  # what its owner does with it later
        robot.stop()
        sent = [message for _, message in node.published]
        assert sent == [
            Float64MultiArray([0.0, 0.0, 0.0]),
            Float64MultiArray([1.0, 2.0, -3.0]),
            Float64MultiArray([0.0, 0.0, -3.0]),
        ]


def test_the_simulator_runs_in_real_time(capsys, tmp_path):
    pytest.importorskip("metaworld")
    from simulator_robot import main

    from mmseq.simulation.metaworld import ACTION_NAMES, PROPRIO_NAMES

    axes = lambda names, low, high: Axes(
        names=names, units=("unitless",) * 4, low=low, high=high, minimum=low, maximum=high
    )
    sawyer = Embodiment(
        name="so",
        rate_hz=20,
        cameras=(Camera(name="front", height=64, width=64),),
        proprio=axes(PROPRIO_NAMES, (-0.8, 0.1, -0.2, -0.1), (0.8, 1.3, 1.0, 1.5)),
        action=axes(ACTION_NAMES, (-1.0,) * 4, (1.0,) * 4),
        action_form="delta",
    )
    actions = np.zeros((40, 4), np.float32)
    episode = Episode.from_arrays("one", 20, {"proprio": actions, "action": actions}, texts=["go"], embodiment="so")
    (tmp_path / "token").write_text("secret\n")
    with Server(ReplayPolicy(episode, sawyer), ServerConfig(port=0, token="secret")) as server:
        options = ["--port", str(server.port), "--token-file", str(tmp_path / "token")]
        with pytest.raises(SystemExit, match="nope"):
            main([*options, "--task", "nope"])
        with pytest.raises(SystemExit, match=r"ca_file 'nope\.pem' cannot be read"):
            main([*options, "--ca-file", "nope.pem"])
        robot = main([*options, "--seconds", "2"])
    assert 4 <= robot.env.steps <= 40
    assert "steps; {" in capsys.readouterr().out
