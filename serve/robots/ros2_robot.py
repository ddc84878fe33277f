"""Drive a ROS 2 robot (ros2_control) with an mmseq server.

    python serve/robots/ros2_robot.py --contract arm.json --prompt "pick up the cup" \
      --camera front=/camera/image_raw --states /joint_states --commands /forward_position_controller/commands

Subscribes to sensor_msgs/Image per camera and sensor_msgs/JointState, publishes std_msgs/Float64MultiArray. Observed
joints are found by name. Commands have no names: the controller's parameter `joints` must list the contract's action
axes in the contract's order (`ros2 param get /forward_position_controller joints`). A sensor that is silent for
`--silent-s` stops requests, so the robot holds. Needs rclpy, pillow and `mmseq-client`; the conversions need no ROS.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mmseq_client import (
    Chunking,
    Client,
    ClientError,
    ContractError,
    ControlLoop,
    NoObservationError,
    holds_position,
    zero_action,
)
from mmseq_client.chunking import MODES
from mmseq_client.images import fit

CHANNELS = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2, None), "bgra8": (2, 1, 0, None), "mono8": (0,)}


def image_to_array(message: Any) -> np.ndarray:
    """sensor_msgs/Image as uint8 (H, W, 3) RGB, whatever its padding. Raises: ValueError for other encodings."""
    if message.encoding not in CHANNELS:
        raise ValueError(f"image encoding {message.encoding!r}; use one of {', '.join(CHANNELS)}")
    order = CHANNELS[message.encoding]
    rows = np.frombuffer(bytes(message.data), np.uint8).reshape(message.height, message.step)
    pixels = rows[:, : message.width * len(order)].reshape(message.height, message.width, len(order))
    chosen = [i for i in order if i is not None]
    return np.ascontiguousarray(pixels[..., chosen * 3 if len(chosen) == 1 else chosen])


class Ros2Robot:
    """A node as `mmseq_client.Robot`.

    cameras: contract's camera -> topic. states, commands: topics. messages: the classes Image, JointState and
    Float64MultiArray. silent_s: the longest time without a message of a sensor.
    """

    def __init__(
        self,
        node: Any,
        contract: dict[str, Any],
        cameras: dict[str, str],
        states: str,
        commands: str,
        messages: Any,
        silent_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._contract, self._silent_s, self._clock = contract, silent_s, clock
        self.sizes = {camera["name"]: (camera["height"], camera["width"]) for camera in contract["cameras"]}
        if set(cameras) != set(self.sizes):
            raise ContractError(
                f"topics are given for cameras {sorted(cameras)}, the contract has {sorted(self.sizes)}"
            )
        self._seen: dict[str, tuple[float, Any]] = {}  # by sensor: when it came, the message
        self._lock = threading.Lock()
        self._last: np.ndarray | None = None  # commanded
        for name, topic in cameras.items():
            node.create_subscription(messages.Image, topic, self._keeps(f"camera {name!r}"), 1)
        node.create_subscription(messages.JointState, states, self._keeps_joints, 10)
        self._message = messages.Float64MultiArray
        self._publisher = node.create_publisher(messages.Float64MultiArray, commands, 1)

    def _keeps(self, sensor: str) -> Callable[[Any], None]:
        def callback(message: Any) -> None:
            with self._lock:
                self._seen[sensor] = (self._clock(), message)

        return callback

    def _keeps_joints(self, message: Any) -> None:
        """Positions by name: an arm and its gripper may publish separately on one topic."""
        with self._lock:
            for name, position in zip(message.name, message.position):
                self._seen[f"joint {name!r}"] = (self._clock(), position)

    def _latest(self, sensor: str) -> Any:
        with self._lock:
            came, message = self._seen.get(sensor, (-float("inf"), None))
        if self._clock() - came > self._silent_s:
            raise NoObservationError(f"{sensor}: no message for {self._silent_s} s")
        return message

    def contract(self) -> dict[str, Any]:
        return self._contract

    def observe(self) -> dict[str, Any]:
        observation: dict[str, Any] = {
            f"observation.images.{name}": fit(image_to_array(self._latest(f"camera {name!r}")), *size)
            for name, size in self.sizes.items()
        }
        names = (self._contract.get("proprio") or {}).get("names", ())
        if names:
            joints = [self._latest(f"joint {name!r}") for name in names]
            observation["observation.state"] = np.array(joints, np.float32)
        return observation

    def act(self, action: np.ndarray) -> None:
        self._last = action.copy()
        self._publisher.publish(self._message(data=action.astype(np.float64).tolist()))

    def stop(self) -> None:
        """Where actions are velocities or deltas, zeros, and the gripper as it is; a position controller keeps its
        last command."""
        if not holds_position(self._contract):
            self.act(zero_action(self._contract, self._last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contract", type=Path, required=True, help="JSON of the embodiment")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--camera", type=_pair, action="append", default=[], metavar="NAME=TOPIC")
    parser.add_argument("--states", default="/joint_states")
    parser.add_argument("--commands", default="/forward_position_controller/commands")
    parser.add_argument("--silent-s", type=float, default=0.5)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token-file", type=Path, help="of the server")
    parser.add_argument("--ca-file", help="certificates (PEM) that the server's is signed by")
    parser.add_argument("--mode", default="realtime", choices=MODES)
    parser.add_argument("--execute", type=int, help="control steps from one request to the next")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        drive(args)
    except (ClientError, FileNotFoundError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    except ImportError as error:
        raise SystemExit(f"{error}; ROS 2 is not there: source /opt/ros/DISTRO/setup.bash before this") from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, topic = text.partition("=")
    if not (name and equals and topic):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=TOPIC")
    return name, topic


def drive(args: argparse.Namespace) -> None:
    token = args.token_file.read_text().strip() if args.token_file else None
    contract = json.loads(args.contract.read_text())
    import types

    import rclpy
    import rclpy.signals
    from sensor_msgs.msg import Image, JointState
    from std_msgs.msg import Float64MultiArray

    messages = types.SimpleNamespace(Image=Image, JointState=JointState, Float64MultiArray=Float64MultiArray)
    # else Ctrl-C ends ROS before the robot could be told to stop
    rclpy.init(signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    node = rclpy.create_node("mmseq_client")
    robot = Ros2Robot(node, contract, dict(args.camera), args.states, args.commands, messages, args.silent_s)
    threading.Thread(target=rclpy.spin, args=(node,), daemon=True).start()
    try:
        with Client(args.host, args.port, token, ca_file=args.ca_file) as client:
            loop = ControlLoop(client, robot, Chunking(args.mode, args.execute), prompt=args.prompt)
            loop.run(seconds=args.seconds)
            print(dict(loop.counts))
    finally:
        rclpy.shutdown()


if __name__ == "__main__":
    main()
