"""The last control steps of a robot, what it saw and did, for policies that look back: `video[4]`, `image@-8`,
`proprio[4]`, `history`. The robot's end keeps them, and a server for clients that do not."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

import numpy as np


class Past:
    """Observations of the last `steps` control steps, now included; nothing is kept for 1."""

    def __init__(self, steps: int):
        self.steps = steps
        self._seen: deque[tuple[int, dict[str, Any]]] = deque()
        self._did: deque[tuple[int, np.ndarray]] = deque()  # first control step of some actions, and these

    def clear(self) -> None:
        self._seen.clear()
        self._did.clear()

    def commanded(self, step: int, actions: np.ndarray) -> None:
        """Actions (n, axes) from a control step on, in place of what was to be done from there; the last one holds."""
        if self.steps > 1:
            _append(self._did, step, actions, step - self.steps)

    def add(self, step: int, observation: dict[str, Any]) -> None:
        """What was observed at a control step; copied, since drivers fill one buffer again."""
        if self.steps > 1:
            copied = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in observation.items()}
            self._saw(step, copied)

    def _saw(self, step: int, observation: dict[str, Any]) -> None:
        _append(self._seen, step, observation, step - self.steps + 1)

    def stacked(self, step: int, observation: dict[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
        """The observation of `step`, which was added, with the frames and states of the steps before it: (n, ...); and
        `past_actions` (n, axes), commanded until then. What is a stack already stays as it is.

        A step that was not observed has what was seen last before it, one without a command the last before it.
        without: keys that are no matter of time.
        """
        if self.steps == 1:
            return observation
        out = dict(observation)
        first = max(self._seen[0][0], step - self.steps + 1)
        for key, value in observation.items():
            timed = key.startswith("observation.") and "@" not in key and key not in without
            if timed and isinstance(value, np.ndarray) and not _is_stack(key, value):
                out[key] = np.stack([self._at(key, wanted) for wanted in range(first, step + 1)])
        if "past_actions" not in out and self._did and self._did[0][0] < step:
            steps = range(max(self._did[0][0], first), step)
            out["past_actions"] = np.stack([self._action(wanted) for wanted in steps])
        return out

    def _at(self, key: str, step: int) -> Any:
        known = [(at, seen[key]) for at, seen in self._seen if key in seen]
        value = next((value for at, value in reversed(known) if at <= step), known[0][1])
        return value[-1] if _is_stack(key, value) else value

    def _action(self, step: int) -> np.ndarray:
        first, actions = next((at, actions) for at, actions in reversed(self._did) if at <= step)
        return actions[min(step - first, len(actions) - 1)]


def _append(kept: deque[tuple[int, Any]], step: int, value: Any, oldest: int) -> None:
    """Keep a value of a step, once for a step that comes a second time, and none but the last of those before
    `oldest`."""
    while kept and kept[-1][0] >= step:
        kept.pop()
    kept.append((step, value))
    while len(kept) > 1 and kept[1][0] <= oldest:
        kept.popleft()


def _is_stack(key: str, value: np.ndarray) -> bool:
    return value.ndim == (4 if key.startswith("observation.images.") else 2)
