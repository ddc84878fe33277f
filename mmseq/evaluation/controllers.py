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
    from mmseq_client.rules import resting_action

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
