"""A simulator as recording, the closed loop and robots' drivers see it, and how one is found by its name.

    env = open_simulator("metaworld", "window-open", seed=0)
    env.observe()                        # {"image.front": uint8 (H, W, 3), "proprio": float32 (axes,)}
    env.act(env.expert()())              # one control step of its scripted expert, if it has one

Another simulator is a class with these methods and an entry point in the group `mmseq.simulators` (`plugins.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.episode import IMAGE_PREFIX
from mmseq.plugins import find
from mmseq.streams import row_of


class Simulator(Protocol):
    """One robot in one task, an episode at a time. Made with the task's name; keyword arguments are its own.

    task: its name. steps, succeeded: of the episode under way.
    """

    task: str
    steps: int
    succeeded: bool

    @staticmethod
    def tasks() -> Sequence[str]:
        """The names of all tasks."""
        ...

    @property
    def instructions(self) -> Sequence[str]:
        """How the task is asked for, the plainest first."""
        ...

    def contract(self) -> Embodiment:
        """The robot: axes, limits, cameras, rate, what its actions are."""
        ...

    def reset(self, seed: int | None = None) -> Any:
        """Begin the episode of `seed`; it does not depend on what ran before."""
        ...

    def observe(self) -> dict[str, np.ndarray]:
        """What the robot may know, by the names that an episode has: `image.<camera>` uint8 (H, W, 3), `proprio` and
        further vectors float32 (axes,)."""
        ...

    def act(self, action: np.ndarray) -> bool:
        """One control step, float32 (axes,). Returns whether the task succeeded in it."""
        ...

    def render(self) -> np.ndarray:
        """What the first camera sees, uint8 (H, W, 3)."""
        ...

    def expert(self) -> Callable[[], np.ndarray] | None:
        """What gives the action of a scripted expert for the state that the simulator is in; None without one."""
        ...

    def close(self) -> None: ...


def open_simulator(name: str, task: str, **options: Any) -> Simulator:
    """Raises: ConfigError for a simulator that nobody has installed."""
    return find("simulators", name)(task, **options)


def to_wire(observation: dict[str, np.ndarray], cameras: Sequence[str]) -> dict[str, np.ndarray]:
    """An observation under the keys of a server. cameras: of its contract, in order, for pictures of other names."""
    images = [name for name in observation if name.startswith(IMAGE_PREFIX)]
    named = {name: name.removeprefix(IMAGE_PREFIX) for name in images}
    if not set(named.values()) <= set(cameras):
        named = dict(zip(images, cameras))
    wire = {f"{row_of(name).wire}{camera}": observation[name] for name, camera in named.items()}
    return wire | {str(row_of(name).wire): values for name, values in observation.items() if name not in images}


def quantise(action: np.ndarray, bins: int = 64, low: Any = -1.0, high: Any = 1.0) -> np.ndarray:
    """`action` moved to the nearest of `bins` evenly spaced values from `low` to `high`, ends included, float32."""
    low, span = np.asarray(low, np.float64), np.subtract(high, low)
    share = np.clip((np.asarray(action) - low) / np.where(span > 0, span, 1), 0, 1)
    return (low + np.rint(share * (bins - 1)) / (bins - 1) * span).astype(np.float32)
