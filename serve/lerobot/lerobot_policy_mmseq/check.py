"""Compare a robot of LeRobot with the contract of a policy. Nothing is connected and nothing moves.

    python -m lerobot_policy_mmseq.check --policy=OUT --fps=30 --robot.type=so101_follower --robot.id=arm ...

`lerobot-rollout` gives actions to the robot by their place, in the robot's own order, and tells a policy neither names
nor rate; so only this can find a joint in another one's place. Takes the options of `lerobot-rollout`.
"""

import importlib
import json
import pkgutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lerobot.cameras
import lerobot.robots
from lerobot.configs import parser
from lerobot.robots import RobotConfig, make_robot_from_config
from lerobot.utils.import_utils import register_third_party_plugins

from lerobot_policy_mmseq.observation import IMAGES


def differences(
    contract: dict[str, Any],
    observation_features: dict[str, Any],
    action_features: dict[str, Any],
    fps: float,
    rename_map: dict[str, str] | None = None,
) -> list[str]:
    """What differs, in words; the features as `lerobot.robots.Robot` has them. rename_map: of `lerobot-rollout`."""
    driven = (".pos", ".vel")  # lerobot-rollout leaves the others out
    state = [k for k, kind in observation_features.items() if not isinstance(kind, tuple)]
    cameras = [k for k, kind in observation_features.items() if isinstance(kind, tuple)]
    renamed = {(rename_map or {}).get(IMAGES + name, IMAGES + name) for name in cameras}
    found = []
    pairs = (("state", state, contract.get("proprio")), ("action", list(action_features), contract["action"]))
    for what, offered, axes in pairs:
        theirs, others = [k for k in offered if k.endswith(driven)], [k for k in offered if not k.endswith(driven)]
        if axes and theirs != list(axes["names"]):
            line = f"{what}: the robot has {theirs}, the contract {list(axes['names'])}"
            if set(others) & set(axes["names"]):
                line += f"; lerobot-rollout passes on only axes ending in .pos or .vel, and the robot also has {others}"
            found.append(line)
    missing = [c["name"] for c in contract["cameras"] if IMAGES + c["name"] not in renamed]
    if missing:
        found.append(f"cameras: the robot has {cameras}, the contract also {missing}; see --rename_map")
    if fps != contract["rate_hz"]:
        found.append(f"fps: {fps:g} here, {contract['rate_hz']:g} in the contract")
    return found


@dataclass
class CheckConfig:
    """policy: the folder of `mmseq export ... lerobot OUT`. fps, rename_map: those of `lerobot-rollout`."""

    robot: RobotConfig
    policy: Path
    fps: float = 30.0
    rename_map: dict[str, str] = field(default_factory=dict)


def needed(arguments: list[str]) -> list[str]:
    """Of the options of `lerobot-rollout` those that are read here; `--policy.path` is `--policy`."""
    kept: list[str] = []
    take = True
    for argument in arguments:
        if argument.startswith("-"):
            name = argument.partition("=")[0]
            take = name in ("-h", "--help", "--policy", "--policy.path", "--fps", "--rename_map", "--config_path")
            take = take or name.startswith("--robot.")
        if take:
            kept.append(argument.replace("--policy.path", "--policy", 1))
    return kept


@parser.wrap()
def main(config: CheckConfig) -> None:
    try:
        contract = json.loads((config.policy / "embodiment.json").read_text())
    except OSError as error:
        raise SystemExit(
            f"{error}; give --policy the folder that `mmseq export CHECKPOINT lerobot OUT` wrote"
        ) from None
    try:
        robot = make_robot_from_config(config.robot)
    except ImportError as error:
        raise SystemExit(f"LeRobot knows this robot's axes and cameras only with its drivers: {error}") from None
    found = differences(contract, robot.observation_features, robot.action_features, config.fps, config.rename_map)
    if found:
        raise SystemExit("\n".join(["the robot and the policy do not fit:", *found]))
    print(f"{robot.name} fits the contract of {contract['name']!r}")


if __name__ == "__main__":
    for package in (lerobot.robots, lerobot.cameras):
        for module in pkgutil.iter_modules(package.__path__):
            if module.ispkg:
                importlib.import_module(f"{package.__name__}.{module.name}")
    register_third_party_plugins()
    sys.argv[1:] = needed(sys.argv[1:])
    main()
