"""The last control steps that a robot saw, for policies that look back: `video[4]`, `image@-8`, `proprio[4]`."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np


class Past:
    """Observations of the last `steps` control steps, now included; nothing is kept for 1."""

    def __init__(self, steps: int):
        self.steps = steps
        self._seen: deque[tuple[int, dict[str, Any]]] = deque(maxlen=steps)

    def clear(self) -> None:
        self._seen.clear()

    def add(self, step: int, observation: dict[str, Any]) -> None:
        """What was observed at a control step, later than those before; copied, since drivers fill one buffer again."""
        if self.steps > 1:
            copied = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in observation.items()}
            self._seen.append((step, copied))

    def stacked(self, step: int, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation of `step`, which was added, with the frames and states of the steps before it: (n, ...).

        A step that was not observed has what was seen last before it.
        """
        if self.steps == 1:
            return observation
        out = dict(observation)
        first = max(self._seen[0][0], step - self.steps + 1)
        for key, value in observation.items():
            if key.startswith("observation.") and "@" not in key and isinstance(value, np.ndarray):
                out[key] = np.stack([self._at(key, wanted) for wanted in range(first, step + 1)])
        return out

    def _at(self, key: str, step: int) -> Any:
        known = [(at, seen[key]) for at, seen in self._seen if key in seen]
        return next((value for at, value in reversed(known) if at <= step), known[0][1])
