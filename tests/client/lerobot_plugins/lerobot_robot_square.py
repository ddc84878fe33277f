"""A robot of LeRobot that goes where it is told at once, and writes down each action as a line of JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig

AXES = ("x.pos", "y.pos", "z.pos", "g.pos")


@RobotConfig.register_subclass("square")
@dataclass
class SquareRobotConfig(RobotConfig):
    """swapped: its first two motors are wired in the other order."""

    log: Path = Path("actions.jsonl")
    swapped: bool = False


class SquareRobot(Robot):
    config_class, name = SquareRobotConfig, "square"

    def __init__(self, config):
        super().__init__(config)
        self.log, self.is_connected, self.is_calibrated, self.cameras = config.log, False, True, {}
        self.axes = (AXES[1], AXES[0], *AXES[2:]) if config.swapped else AXES
        self.at = dict.fromkeys(self.axes, 0.0)

    @property
    def observation_features(self):
        return {**self.action_features, "front": (32, 32, 3)}

    @property
    def action_features(self):
        return dict.fromkeys(self.axes, float)

    is_connected = is_calibrated = False

    def connect(self, calibrate=True):
        self.is_connected = True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        return {**self.at, "front": np.full((32, 32, 3), int(127 + 100 * self.at["x.pos"]), np.uint8)}

    def send_action(self, action):
        self.at = {name: float(value) for name, value in action.items()}
        with self.log.open("a") as file:
            file.write(json.dumps(self.at) + "\n")
        return action

    def disconnect(self):
        self.is_connected = False
