"""What drives a simulated robot in place of a policy, from its contract: baselines, and the ceiling.

==============  ====================================================================================================
`random`        uniform between the limits of each axis
`hold`          stands still with its grippers open
`replay`        what the expert did in another layout, executed blindly
`expert_tokens` the scripted expert through the bins of the action tokenizer
==============  ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mmseq.errors import ConfigError
from mmseq.simulation.base import Simulator, quantise

OTHER_LAYOUT = 7  # further on, whose actions are replayed
Controller = Callable[[], np.ndarray]


def resting_action(contract: dict[str, Any], state: Any) -> np.ndarray:
    """What a robot that nobody has commanded yet does, float32 (axes,): it stands still, its grippers open.

    state: of an observation; an axis of an absolute robot that it lacks is sent the middle of its limits.
    """
    from mmseq_client import Rules, holds_position
    from mmseq_client.contract import grippers_of

    rules = Rules(contract)
    middle = (rules.low + rules.high) / 2 if holds_position(contract) else np.zeros_like(rules.low)
    at = rules.stands(state)
    action = np.where(np.isnan(at), middle, at).astype(np.float32)
    for axis, gripper in zip(rules.grippers, grippers_of(contract)):
        action[axis] = gripper["open"]
    rules.limit(action[None])
    return action


def expert_episode(env: Simulator, seed: int, layout: int, max_steps: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """The actions of the expert in a layout, and what was seen after each; `env` stands at the start of `seed` then.

    Raises: ConfigError where a simulator has no expert.
    """
    expert = env.expert()
    if expert is None:
        raise ConfigError(f"the simulator has no expert for {env.task!r}", fix="evaluate another task")
    env.reset(layout)
    done: list[tuple[np.ndarray, dict[str, Any]]] = []
    while not env.succeeded and len(done) < max_steps:
        action = expert()
        env.act(action)
        done.append((action, env.observe()))
    env.reset(seed)
    return done


def make_controller(
    name: str, env: Simulator, seed: int, rng: np.random.Generator, *, bins: int, max_steps: int
) -> Controller:
    """`env` stands at the start of the episode of `seed`. bins: of the action tokenizer.

    Raises: ConfigError where a simulator has no expert.
    """
    robot = env.contract()
    axes = robot.action
    assert axes is not None
    if name == "random":
        return lambda: rng.uniform(axes.minimum, axes.maximum).astype(np.float32)
    rest = resting_action(robot.to_dict(), env.observe().get("proprio"))
    if name == "hold":
        return lambda: rest
    expert = env.expert()
    if expert is None:
        raise ConfigError(f"the simulator has no expert for {env.task!r}", fix=f"leave {name} out")
    if name == "expert_tokens":
        return lambda: quantise(expert(), bins, axes.low, axes.high)
    recorded = [action for action, _ in expert_episode(env, seed, seed + OTHER_LAYOUT, max_steps)]
    actions = iter(recorded)
    return lambda: next(actions, rest)
