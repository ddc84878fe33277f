"""The last control steps of a robot, what it saw and did, for policies that look back: `video[4]`, `image@-8`,
`proprio[4]`, `history`."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np


class Past:
    """Observations of the last `steps` control steps, now included; nothing is kept for 1."""

    def __init__(self, steps: int):
        self.steps = steps
        self._seen: deque[tuple[int, dict[str, Any]]] = deque(maxlen=steps)
        self._did: deque[tuple[int, np.ndarray]] = deque(maxlen=steps)

    def clear(self) -> None:
        self._seen.clear()
        self._did.clear()

    def commanded(self, step: int, action: np.ndarray) -> None:
        """What was commanded at a control step, also while it held: the server knows only what it sent."""
        if self.steps > 1:
            self._did.append((step, action))

    def add(self, step: int, observation: dict[str, Any]) -> None:
        """What was observed at a control step, later than those before; copied, since drivers fill one buffer again."""
        if self.steps > 1:
            copied = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in observation.items()}
            self._seen.append((step, copied))

    def stacked(self, step: int, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation of `step`, which was added, with the frames and states of the steps before it: (n, ...); and
        `past_actions` (n, axes), commanded until then.

        A step that was not observed has what was seen last before it, one without a command the last before it.
        """
        if self.steps == 1:
            return observation
        out = dict(observation)
        first = max(self._seen[0][0], step - self.steps + 1)
        for key, value in observation.items():
            if key.startswith("observation.") and "@" not in key and isinstance(value, np.ndarray):
                out[key] = np.stack([self._at(key, wanted) for wanted in range(first, step + 1)])
        if self._did and self._did[0][0] < step:
            steps = range(max(self._did[0][0], first), step)
            out["past_actions"] = np.stack([[a for at, a in self._did if at <= one][-1] for one in steps])
        return out

    def _at(self, key: str, step: int) -> Any:
        known = [(at, seen[key]) for at, seen in self._seen if key in seen]
        return next((value for at, value in reversed(known) if at <= step), known[0][1])
