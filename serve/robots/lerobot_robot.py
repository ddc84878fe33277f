"""Drive any LeRobot robot with an mmseq server.

    python serve/robots/lerobot_robot.py --robot.type=so101_follower --robot.port=/dev/ttyACM0 --robot.id=arm \
      --robot.disable_torque_on_disconnect=false \
      --robot.cameras="{front: {type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}}" \
      --contract=CHECKPOINT/tokenizers/embodiments/arm.json --prompt="pick up the cup"

The contract's axes are found by their names in what the robot offers, so their order cannot be confused. Needs
`lerobot` with the extra of the robot, and `mmseq-client`.
"""

import importlib
import json
import logging
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lerobot.cameras
import lerobot.robots
import numpy as np
from lerobot.configs import parser
from lerobot.robots import Robot, RobotConfig, make_robot_from_config
from lerobot.utils.import_utils import register_third_party_plugins
from mmseq_client import (
    Chunking,
    Client,
    ClientError,
    ContractError,
    ControlLoop,
    gripper_axes,
    holds_position,
    zero_action,
)
from mmseq_client.images import fit

log = logging.getLogger(__name__)


class LeRobotRobot:
    """A connected LeRobot robot as `mmseq_client.Robot`.

    contract: of the checkpoint. Raises: ContractError when the robot lacks an axis or a camera of it, or has an
    action that the contract does not command.
    """

    def __init__(self, robot: Robot, contract: dict[str, Any]):
        self.robot, self._contract = robot, contract
        self._last: np.ndarray | None = None  # commanded
        self.cameras = {camera["name"]: (camera["height"], camera["width"]) for camera in contract["cameras"]}
        self.state_names = list((contract.get("proprio") or {}).get("names", ()))
        self.action_names = list(contract["action"]["names"])
        offered, accepted = robot.observation_features, robot.action_features
        for what, wanted, there in (
            ("camera", self.cameras, [key for key, kind in offered.items() if isinstance(kind, tuple)]),
            ("proprio axis", self.state_names, [key for key, kind in offered.items() if not isinstance(kind, tuple)]),
            ("action axis", self.action_names, list(accepted)),
        ):
            missing = [name for name in wanted if name not in there]
            if missing:
                raise ContractError(f"the robot has no {what} {missing}; it has {there}")
        unknown = [name for name in accepted if name not in self.action_names]
        if unknown:
            raise ContractError(f"the contract commands no {unknown}, which the robot expects")

    def contract(self) -> dict[str, Any]:
        return self._contract

    def observe(self) -> dict[str, Any]:
        seen = self.robot.get_observation()
        observation: dict[str, Any] = {
            f"observation.images.{name}": fit(np.asarray(seen[name]), *size) for name, size in self.cameras.items()
        }
        if self.state_names:
            observation["observation.state"] = np.array([seen[name] for name in self.state_names], np.float32)
        return observation

    def act(self, action: np.ndarray) -> None:
        self._last = action.copy()
        self.robot.send_action(dict(zip(self.action_names, action.tolist())))

    def stop(self) -> None:
        """Command the position where the arm is, where actions are positions. Nothing is disconnected here, so the
        torque stays on."""
        if holds_position(self._contract):
            try:
                seen = self.robot.get_observation()
            except Exception as error:  # one dead camera is enough
                log.warning("stopping at the last command, for the robot cannot say where it is: %s", error)
                seen = {} if self._last is None else dict(zip(self.action_names, self._last.tolist()))
            if all(name in seen for name in self.action_names):
                here = {name: float(seen[name]) for name in self.action_names}
                for at in gripper_axes(self._contract) if self._last is not None else ():
                    here[self.action_names[at]] = float(self._last[at])  # closed on something it is less far than sent
                self.robot.send_action(here)
        else:
            rest = zero_action(self._contract, self._last)
            self.robot.send_action(dict(zip(self.action_names, rest.tolist())))


@dataclass
class DriveConfig:
    """contract: JSON of the embodiment. mode, execute: see `mmseq_client.Chunking`. token_file: for the server;
    ca_file: certificates (PEM) that its own is signed by."""

    robot: RobotConfig
    contract: Path
    prompt: str
    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    ca_file: Path | None = None
    mode: str = "realtime"
    execute: int | None = None
    seconds: float = 60.0


@parser.wrap()
def main(config: DriveConfig) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)  # lerobot has set it to warnings
    try:
        drive(config)
    except (ClientError, FileNotFoundError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def drive(config: DriveConfig) -> None:
    contract = json.loads(config.contract.read_text())
    token = config.token_file.read_text().strip() if config.token_file else None
    ca_file = str(config.ca_file) if config.ca_file else None
    chunking = Chunking(config.mode, config.execute)
    if getattr(config.robot, "disable_torque_on_disconnect", False):
        log.warning(
            "the arm's torque goes off when this ends, so it falls; "
            "--robot.disable_torque_on_disconnect=false keeps it where it is"
        )
    # the server first: an arm with its torque on does not wait for it
    with (
        Client(config.host, config.port, token, ca_file=ca_file) as client,
        make_robot_from_config(config.robot) as robot,
    ):
        loop = ControlLoop(client, LeRobotRobot(robot, contract), chunking, prompt=config.prompt)
        try:
            loop.run(seconds=config.seconds)
        finally:
            print(dict(loop.counts))


def register() -> None:
    """Make every robot and camera of LeRobot, and of its plug-ins, known to the command line by its name."""
    for package in (lerobot.robots, lerobot.cameras):
        for module in pkgutil.iter_modules(package.__path__):
            if module.ispkg:
                importlib.import_module(f"{package.__name__}.{module.name}")
    register_third_party_plugins()


if __name__ == "__main__":
    register()
    main()
