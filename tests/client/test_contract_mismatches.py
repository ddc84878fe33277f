"""Forty ways in which a robot and a server can mean different things, refused by the real server's contract on the
robot before anything moves, and by the server itself for clients that do not compare."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from mmseq_client import Client, ContractError, ControlLoop, RefusedError, fingerprint

from mmseq.embodiment import Axes, Camera, Embodiment, Gripper
from mmseq.episode import Episode
from mmseq.serving import ReplayPolicy, Server, ServerConfig

AXES = Axes(
    names=("j1", "j2", "j3", "gripper"),
    units=("radian", "radian", "metre", "unitless"),
    low=(-1, -2, -0.3, 0),
    high=(1, 2, 0.3, 1),
    minimum=(-3, -3, -0.5, 0),
    maximum=(3, 3, 0.5, 1),
)
ARM = Embodiment(
    name="arm",
    rate_hz=50,
    cameras=(Camera(name="front", height=16, width=24), Camera(name="wrist", height=16, width=16)),
    proprio=AXES,
    action=AXES,
    action_form="absolute",
    grippers=(Gripper(axis="gripper", open=0.0, closed=1.0),),
)


def put(*path, value):
    """A change of the contract: `value`, or a function of what is there, at the path."""

    def apply(body: dict) -> None:
        *parents, last = path
        for key in parents:
            body = body[key]
        body[last] = value(body[last]) if callable(value) else value

    return apply


def both(*changes):
    return lambda body: [change(body) for change in changes]


def swap(items: list) -> list:
    return [items[1], items[0], *items[2:]]


DEGREES = lambda values: [round(57.29578 * v, 3) for v in values]

MISMATCHES = {
    "another robot": put("name", value="leg"),
    "robot's name in other case": put("name", value="Arm"),
    "action order": put("action", "names", value=swap),
    "proprio order": put("proprio", "names", value=swap),
    "action order reversed": put("action", "names", value=lambda n: n[::-1]),
    "gripper first": put("action", "names", value=lambda n: [n[-1], *n[:-1]]),
    "another joint": put("action", "names", 0, value="j7"),
    "another proprio joint": put("proprio", "names", 2, value="elbow"),
    "an axis fewer": put("action", value=lambda a: {key: v[:-1] for key, v in a.items() if v}),
    "an axis more": put("action", value=lambda a: {key: [*v, v[-1]] for key, v in a.items() if v}),
    "no proprio": put("proprio", value=None),
    "no action": put("action", value=None),
    "degrees": put("action", "units", value=["degree", "degree", "metre", "unitless"]),
    "proprio in degrees": put("proprio", "units", value=["degree", "degree", "metre", "unitless"]),
    "millimetres": put("action", "units", 2, value="millimetre"),
    "radian per second": put("action", "units", 0, value="radian/s"),
    "gripper in metres": put("proprio", "units", 3, value="metre"),
    "gripper sign": put("gripper", value={"axis": "gripper", "open": 1.0, "closed": 0.0}),
    "gripper scale": put("gripper", value={"axis": "gripper", "open": 0.0, "closed": 255.0}),
    "gripper -1..1": put("gripper", value={"axis": "gripper", "open": -1.0, "closed": 1.0}),
    "gripper axis": put("gripper", "axis", value="j3"),
    "no gripper": put("gripper", value=None),
    "rate": put("rate_hz", value=20.0),
    "rate slightly": put("rate_hz", value=49.9),
    "a camera fewer": put("cameras", value=lambda c: c[:1]),
    "a camera more": put("cameras", value=lambda c: [*c, {"name": "top", "height": 16, "width": 16}]),
    "camera order": put("cameras", value=swap),
    "camera name": put("cameras", 1, "name", value="hand"),
    "camera height": put("cameras", 0, "height", value=32),
    "camera turned": put("cameras", 0, value={"name": "front", "height": 24, "width": 16}),
    "delta": put("action_form", value="delta"),
    "velocity": put("action_form", value="velocity"),
    "low quantile": put("action", "low", 0, value=-0.9),
    "high quantile": put("action", "high", 1, value=2.1),
    "proprio statistics": both(put("proprio", "low", value=DEGREES), put("proprio", "high", value=DEGREES)),
    "statistics of another dataset": put("action", "low", value=lambda v: [0.5 * x for x in v]),
    "no statistics": put("action", value=lambda a: {k: v for k, v in a.items() if k not in ("low", "high")}),
    "minimum": put("action", "minimum", 2, value=-0.6),
    "maximum": put("action", "maximum", 0, value=6.3),
    "limits of the state": put("proprio", "maximum", value=DEGREES),
}


@pytest.fixture(scope="module")
def client():
    actions = np.zeros((40, 4), np.float32)
    episode = Episode.from_arrays("one", 50, {"proprio": actions, "action": actions}, texts=["go"], embodiment="arm")
    with (
        Server(ReplayPolicy(episode, ARM), ServerConfig(port=0)) as server,
        Client("127.0.0.1", server.port, connect_timeout_s=30) as client,
    ):
        yield client


def test_there_are_forty():
    assert len(MISMATCHES) >= 40


def test_the_right_contract_drives(client, robot):
    robot._contract = ARM.to_dict()
    robot.observe = lambda: {
        "observation.images.front": np.zeros((16, 24, 3), np.uint8),
        "observation.images.wrist": np.zeros((16, 16, 3), np.uint8),
        "observation.state": np.zeros(4, np.float32),
    }
    loop = ControlLoop(client, robot)
    loop.run(seconds=0.5)
    assert len(robot.actions) > 15
    assert loop.counts["refused"] == loop.counts["withheld"] == 0
    assert loop.counts["held"] < 5
    assert robot.stops == 1


@pytest.mark.parametrize("name", MISMATCHES)
def test_refused_before_any_motion_on_both_ends(client, robot, name):
    body = copy.deepcopy(ARM.to_dict())
    MISMATCHES[name](body)
    assert body != ARM.to_dict()
    robot._contract = body
    with pytest.raises(ContractError, match=r"differs: \w+|is not served"):
        ControlLoop(client, robot)
    assert robot.actions == []
    with pytest.raises(RefusedError) as caught:
        client.infer({**robot.observe(), "embodiment": body})
    assert caught.value.code in ("fingerprint", "refused", "wrong_type")


def test_the_names_of_the_fields_are_told(client, robot):
    changed = dataclasses.replace(ARM, rate_hz=20, grippers=(Gripper(axis="gripper", open=1.0, closed=0.0),))
    robot._contract = changed.to_dict()
    with pytest.raises(ContractError) as caught:
        ControlLoop(client, robot)
    for words in ("rate_hz: 20 here, 50 on the server", "gripper.open: 1.0 here, 0.0 on the server"):
        assert words in str(caught.value)


def test_both_ends_compute_one_fingerprint():
    """It is written on each end, since a program that only trains has no client."""
    grippers = (*ARM.grippers, Gripper(axis="j3", open=0.0, closed=0.5))
    for robot in (ARM, dataclasses.replace(ARM, grippers=()), dataclasses.replace(ARM, grippers=grippers)):
        for whole in (robot, dataclasses.replace(robot, streams={"force": ARM.action})):
            assert fingerprint(whole.to_dict()) == whole.fingerprint
            assert fingerprint(json.loads(json.dumps(whole.to_dict()))) == whole.fingerprint
