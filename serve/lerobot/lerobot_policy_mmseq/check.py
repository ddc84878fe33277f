"""Compare a robot of LeRobot with the contract of a policy. Nothing is connected and nothing moves.

    python -m lerobot_policy_mmseq.check --policy=OUT --fps=30 --robot.type=so101_follower --robot.id=arm ...

`lerobot-rollout` gives actions to the robot by their place, in the robot's own order, and tells a policy neither names
nor rate; so only this can find a joint in another one's place. Takes the options of `lerobot-rollout`.
"""

import importlib
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lerobot.cameras
import lerobot.robots
from lerobot.configs import parser
from lerobot.robots import RobotConfig, make_robot_from_config
from lerobot.utils.import_utils import register_third_party_plugins


def differences(
    contract: dict[str, Any], observation_features: dict[str, Any], action_features: dict[str, Any], fps: float
) -> list[str]:
    """What differs, in words; the features as `lerobot.robots.Robot` has them."""
    driven = (".pos", ".vel")  # lerobot-rollout leaves the others out
    state = [k for k, kind in observation_features.items() if not isinstance(kind, tuple) and k.endswith(driven)]
    action = [k for k in action_features if k.endswith(driven)]
    cameras = [k for k, kind in observation_features.items() if isinstance(kind, tuple)]
    found = []
    for what, theirs, axes in (("state", state, contract.get("proprio")), ("action", action, contract["action"])):
        if axes and theirs != list(axes["names"]):
            found.append(f"{what}: the robot has {theirs}, the contract {list(axes['names'])}")
    missing = [c["name"] for c in contract["cameras"] if c["name"] not in cameras]
    if missing:
        found.append(f"cameras: the robot has {cameras}, the contract also {missing}; see --rename_map")
    if fps != contract["rate_hz"]:
        found.append(f"fps: {fps:g} here, {contract['rate_hz']:g} in the contract")
    return found


@dataclass
class CheckConfig:
    """policy: the folder of `mmseq export ... lerobot OUT`. fps: that of `lerobot-rollout`."""

    robot: RobotConfig
    policy: Path
    fps: float = 30.0


@parser.wrap()
def main(config: CheckConfig) -> None:
    contract = json.loads((config.policy / "embodiment.json").read_text())
    robot = make_robot_from_config(config.robot)
    found = differences(contract, robot.observation_features, robot.action_features, config.fps)
    if found:
        raise SystemExit("\n".join(["the robot and the policy do not fit:", *found]))
    print(f"{robot.name} fits the contract of {contract['name']!r}")


if __name__ == "__main__":
    for package in (lerobot.robots, lerobot.cameras):
        for module in pkgutil.iter_modules(package.__path__):
            if module.ispkg:
                importlib.import_module(f"{package.__name__}.{module.name}")
    register_third_party_plugins()
    main()
