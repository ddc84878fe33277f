import sys
from pathlib import Path

import numpy as np
import pytest

from mmseq.embodiment import Axes, Camera, Embodiment, Gripper
from mmseq.episode import Episode
from mmseq.serving import ReplayPolicy, Server, ServerConfig, example_observation

CLIENT = Path(__file__).parents[2] / "serve" / "client"


@pytest.fixture(scope="session")
def embodiment() -> Embodiment:
    names = ("x", "y", "z", "gripper")
    axes = Axes(
        names=names,
        units=("m", "m", "m", "unitless"),
        low=(-1,) * 4,
        high=(1,) * 4,
        minimum=(-2,) * 4,
        maximum=(2,) * 4,
    )
    return Embodiment(
        name="arm",
        rate_hz=20,
        cameras=(Camera(name="front", height=16, width=24), Camera(name="wrist", height=16, width=16)),
        proprio=axes,
        action=axes,
        grippers=(Gripper(axis="gripper", open=1, closed=-1),),
    )


@pytest.fixture(scope="session")
def episode() -> Episode:
    random = np.random.default_rng(0)
    return Episode.from_arrays(
        "pick-3",
        20,
        {
            "image.front": random.integers(0, 256, (40, 16, 24, 3), dtype=np.uint8),
            "image.wrist": random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8),
            "proprio": random.uniform(-1, 1, (40, 4)).astype(np.float32),
            "action": random.uniform(-1, 1, (40, 4)).astype(np.float32),
        },
        texts=["pick up the cup"],
        embodiment="arm",
    )


@pytest.fixture
def observation(embodiment) -> dict:
    return example_observation(embodiment)


@pytest.fixture
def policy(episode, embodiment) -> ReplayPolicy:
    return ReplayPolicy(episode, embodiment, horizon=8, execute=4)


@pytest.fixture
def start():
    """Starts servers on free ports and stops them all."""
    servers = []

    def begin(policy, **config) -> Server:
        servers.append(Server(policy, ServerConfig(port=0, grace_s=2, **config)).start())
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def client_package():
    """The client distribution, imported from its folder as it is not part of mmseq."""
    sys.path.insert(0, str(CLIENT))
    try:
        import mmseq_client

        yield mmseq_client
    finally:
        sys.path.remove(str(CLIENT))
