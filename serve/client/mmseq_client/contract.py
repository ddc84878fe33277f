"""The contract of one robot, as a dict: comparing two, their fingerprint, and a valid random observation."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np

from mmseq_client.errors import ContractError


def fingerprint(embodiment: dict[str, Any]) -> str:
    """16 hexadecimal digits of a robot's contract, the same that the server computes."""
    text = json.dumps(embodiment, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """A server's first frame, once it has what a client reads. Raises: ContractError."""
    robots, horizon = metadata.get("embodiments"), metadata.get("horizon")
    good = isinstance(robots, dict) and all(isinstance(body, dict) and "name" in body for body in robots.values())
    try:
        json.dumps([robots, metadata.get("fingerprints"), metadata.get("fingerprint"), metadata.get("tasks")])
    except (TypeError, ValueError):
        good = False
    if not good or type(horizon) is not int or horizon < 1:
        raise ContractError("what answers there serves no contract of robots: it may be another kind of server")
    return metadata


def require_served(embodiment: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The server's own copy of a robot's contract.

    metadata: the server's first frame. Raises: ContractError that names each field that differs.
    """
    if not isinstance(embodiment, dict):
        raise ContractError(f"contract() gave {type(embodiment).__name__}; return the robot's embodiment as a dict")
    served = metadata.get("embodiments") or {}
    name = embodiment.get("name")
    if name not in served:
        raise ContractError("embodiment {!r} is not served; there is {}".format(name, ", ".join(sorted(served))))
    lines = differences(json.loads(json.dumps(embodiment)), served[name])
    if lines:
        raise ContractError("embodiment {!r} differs: {}".format(name, "; ".join(lines)))
    return served[name]


def differences(mine: Any, theirs: Any, prefix: str = "") -> list[str]:
    """The fields in which two contracts differ, `field: mine here, theirs on the server`."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = sorted(set(mine) | set(theirs))
        return [line for key in keys for line in differences(mine.get(key), theirs.get(key), prefix + key + ".")]
    return [] if mine == theirs else [f"{prefix[:-1]}: {mine} here, {theirs} on the server"]


def reads_prompt(metadata: dict[str, Any]) -> bool:
    """Whether the policy that is served reads an instruction: what its server says, which can read arrows.

    One from before it said so names the arrow: there, whether `text` stands before the first `->`.
    """
    said = metadata.get("reads_prompt")
    given = str(metadata.get("policy", "")).partition("->")[0]
    return said if isinstance(said, bool) else re.search(r"(?<![\w.])text(?![\w.])", given) is not None


def holds_position(embodiment: dict[str, Any]) -> bool:
    """Whether its last action keeps a robot where it is; where actions are changes or velocities, zeros do."""
    return embodiment.get("action_form", "absolute") == "absolute"


def grippers_of(embodiment: dict[str, Any]) -> list[dict[str, Any]]:
    """`axis`, `open` and `closed` of each gripper; a contract has null, one, or a list of them."""
    given = embodiment.get("gripper") or []
    return [given] if isinstance(given, dict) else list(given)


def gripper_axes(embodiment: dict[str, Any]) -> list[int]:
    """Which axes of an action are grippers. Raises: ContractError for one that is no axis."""
    names = list(embodiment["action"]["names"])
    wrong = [gripper["axis"] for gripper in grippers_of(embodiment) if gripper["axis"] not in names]
    if wrong:
        raise ContractError(f"the gripper {wrong[0]!r} is not among the action axes {names}")
    return [names.index(gripper["axis"]) for gripper in grippers_of(embodiment)]


def zero_action(embodiment: dict[str, Any], last: np.ndarray | None) -> np.ndarray:
    """What stops a robot whose actions are changes or velocities, float32: zeros, and each gripper as it was last.

    last: (..., axes), None before the first one.
    """
    action = np.zeros(len(embodiment["action"]["names"]) if last is None else last.shape, np.float32)
    if last is not None:
        at = gripper_axes(embodiment)
        action[..., at] = last[..., at]
    return action


def rest_action(embodiment: dict[str, Any], last: np.ndarray) -> np.ndarray:
    """What keeps a robot where it is after `last` (..., axes): that position, or no motion; grippers stay."""
    return last if holds_position(embodiment) else zero_action(embodiment, last)


def example_observation(embodiment: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """A valid random observation of a contract, to try a server without a robot."""
    random = np.random.RandomState(seed)
    observation: dict[str, Any] = {"prompt": "do the task", "embodiment": embodiment["name"]}
    for camera in embodiment.get("cameras") or []:
        shape = (camera["height"], camera["width"], 3)
        observation["observation.images." + camera["name"]] = random.randint(0, 256, shape).astype(np.uint8)
    vectors = dict(embodiment.get("streams") or {}, state=embodiment.get("proprio"))
    for name, axes in vectors.items():
        if axes:
            observation["observation." + name] = random.uniform(axes["low"], axes["high"]).astype(np.float32)
    return observation
