"""openpi's example clients for ALOHA, DROID and LIBERO against tiny checkpoints of such robots.

What the clients send is rebuilt here with msgpack alone, as `examples/simple_client` of openpi packs it.
"""

from dataclasses import replace

import msgpack
import numpy as np
import pytest

from mmseq.embodiment import Axes, Camera
from mmseq.serving import ServerConfig
from mmseq.serving.model_policy import ModelPolicy
from mmseq.serving.server import Server
from mmseq.testing import tiny
from support.wire import dial

RANDOM = np.random.RandomState(0)
JOINTS = tuple(f"joint_{i}" for i in range(7))


def picture(*shape: int) -> np.ndarray:
    return RANDOM.randint(256, size=shape, dtype=np.uint8)


CLIENTS = {
    "aloha": {
        "state": np.ones((14,)),
        "images": {name: picture(3, 224, 224) for name in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")},
        "prompt": "do something",
    },
    "droid": {
        "observation/exterior_image_1_left": picture(224, 224, 3),
        "observation/wrist_image_left": picture(224, 224, 3),
        "observation/joint_position": RANDOM.rand(7),
        "observation/gripper_position": RANDOM.rand(1),
        "prompt": "do something",
    },
    "libero": {
        "observation/state": RANDOM.rand(8),
        "observation/image": picture(224, 224, 3),
        "observation/wrist_image": picture(224, 224, 3),
        "prompt": "do something",
    },
}
ROBOTS = {
    "aloha": (
        ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"),
        tuple(f"{side}_{i}" for side in ("left", "right") for i in range(7)),
        14,
    ),
    "droid": (("exterior_image_1_left", "wrist_image_left"), (*JOINTS, "gripper"), 8),
    "libero": (("image", "wrist_image"), ("x", "y", "z", "rx", "ry", "rz", "finger_0", "finger_1"), 7),
}


def openpi_pack(message) -> bytes:
    """As the client of openpi does."""

    def encode(value):
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return value

    return msgpack.packb(message, default=encode)


def msgpack_numpy_pack(message) -> bytes:
    """As the package msgpack-numpy does."""

    def encode(value):
        if isinstance(value, np.ndarray):
            body = {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape}
            return body | {b"data": value.tobytes()}
        return value

    return msgpack.packb(message, default=encode)


def axes(names: tuple[str, ...]) -> Axes:
    n = len(names)
    limits = {"low": (-1.0,) * n, "high": (1.0,) * n, "minimum": (-2.0,) * n, "maximum": (2.0,) * n}
    return Axes(names=names, units=("rad",) * n, **limits)


@pytest.fixture(scope="module", params=list(CLIENTS))
def served(request, tmp_path_factory):
    cameras, proprio, width = ROBOTS[request.param]
    robot = replace(
        tiny.embodiment(request.param),
        cameras=tuple(Camera(name=name, height=48, width=64) for name in cameras),
        proprio=axes(proprio),
        action=axes(tuple(f"a{i}" for i in range(width))),
        grippers=(),
    )
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny.model(tiny.tokenizers((robot,)))
    model.tasks = {"policy": "text, image, proprio -> action[2]"}
    model.save_pretrained(directory)
    with Server(ModelPolicy.from_pretrained(directory), ServerConfig(port=0)) as server:
        yield request.param, width, server


@pytest.mark.parametrize("pack", [openpi_pack, msgpack_numpy_pack])
def test_an_example_client_is_answered_unchanged(served, pack):
    name, width, server = served
    with dial(server) as socket:
        assert msgpack.unpackb(socket.recv())["name"]  # the metadata that a client of openpi reads first
        for _ in range(2):
            socket.send(pack(CLIENTS[name]))
            reply = socket.recv(timeout=20)
            assert isinstance(reply, bytes), reply
            body = msgpack.unpackb(reply)
            actions = np.frombuffer(body["actions"][b"data"], body["actions"][b"dtype"])
            assert actions.reshape(body["actions"][b"shape"]).shape == (2, width)
            assert body["server_timing"]["infer_ms"] > 0
