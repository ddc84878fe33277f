import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "serve" / "client"))  # distributions of their own
sys.path.insert(0, str(Path(__file__).parents[2] / "serve" / "lerobot"))

from mmseq.embodiment import Axes, Camera, Embodiment, Gripper

HORIZON = 16


def axes(names: str, limit: float) -> Axes:
    n = len(names)
    return Axes(
        names=tuple(names),
        units=("m",) * n,
        low=(-limit,) * n,
        high=(limit,) * n,
        minimum=(-limit,) * n,
        maximum=(limit,) * n,
    )


@pytest.fixture(scope="session")
def embodiment() -> Embodiment:
    return Embodiment(
        name="arm",
        rate_hz=50,
        cameras=(Camera(name="front", height=8, width=8),),
        proprio=axes("xyz", 1.0),
        action=axes("xyzg", 1e6),
        action_form="absolute",
        grippers=(Gripper(axis="g", open=0.0, closed=1.0),),
    )


class RecordingRobot:
    """Does what it is told and remembers it: (control step, action) by the order of the calls."""

    def __init__(self, contract: dict):
        self._contract, self.actions, self.stops = contract, [], 0

    def contract(self) -> dict:
        return self._contract

    def observe(self) -> dict:
        return {
            "observation.images.front": np.zeros((8, 8, 3), np.uint8),
            "observation.state": np.zeros(3, np.float32),
        }

    def act(self, action: np.ndarray) -> None:
        self.actions.append(action.copy())

    def stop(self) -> None:
        self.stops += 1


@pytest.fixture
def robot(embodiment) -> RecordingRobot:
    return RecordingRobot(embodiment.to_dict())


class CountingServer:
    """In place of a connection: chunks whose rows say where they come from.

    Row i of the chunk for the observation of control step t is (t, i, t + i, 0); a prefix is kept.
    """

    def __init__(self, embodiment: Embodiment, horizon: int = HORIZON):
        self.metadata = {
            "name": "counting",
            "embodiments": {embodiment.name: embodiment.to_dict()},
            "fingerprints": {embodiment.name: embodiment.fingerprint},
            "horizon": horizon,
            "prefix": True,
            "chunking": {"mode": "plain", "execute": horizon // 2, "decay": 0.01},
        }
        self.horizon, self.asked, self.connections = horizon, [], 1

    def check_contract(self, embodiment: dict) -> dict:
        from mmseq_client.contract import require_served

        return require_served(embodiment, self.metadata)

    def connect(self, timeout_s: float) -> None:
        self.connections += 1

    def close(self) -> None:
        pass

    def infer(self, observation: dict, timeout_s: float, reconnect: bool) -> dict:
        self.asked.append(observation)
        step, rows = observation["step"], np.arange(self.horizon)
        actions = np.stack([np.full(self.horizon, step), rows, step + rows, 0 * rows], 1).astype(np.float32)
        prefix = observation.get("action_prefix")
        if prefix is not None:
            actions[: len(prefix)] = prefix
        return {"actions": actions, "step": step, "sent_at": observation["sent_at"]}


@pytest.fixture
def server(embodiment) -> CountingServer:
    return CountingServer(embodiment)
