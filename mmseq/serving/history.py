"""History: what one robot saw and did, for policies that look back, and what it was shown once and for all.

A policy may be given past frames and states (`video[4]`, `image@-8`, `proprio[4]`, `history`), a demonstration
(`demo[8]`) or a goal (`image@+16`). A client sends what it sees now; the rest is kept here for its session. One that
sees more than it asks for, such as `mmseq_client.ControlLoop`, sends the last frames itself, stacked (n, H, W, 3), and
what it sends counts.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmseq.serving.errors import RequestError
from mmseq.serving.keys import IMAGES

log = logging.getLogger("mmseq.serving")


class History:
    """The last control steps of one session. steps: how many the policy looks at, now included.

    kept: keys that are sent once and hold until the next `reset`, such as a demonstration's frames.
    """

    def __init__(self, steps: int, kept: Sequence[str] = ()):
        self.steps, self.kept = steps, tuple(kept)
        self._seen: deque[tuple[int, dict[str, np.ndarray]]] = deque()
        self._did: deque[tuple[int, np.ndarray]] = deque()  # first control step of a chunk, and its actions
        self._held: dict[str, Any] = {}
        self._next, self._said = 0, False

    def forget(self, *, episode: bool = False) -> None:
        """What was seen and done. episode: another one begins, so that what it was shown is over, too."""
        self._seen.clear()
        self._did.clear()
        self._next = 0
        if episode:
            self._held.clear()

    def fill(self, observation: dict[str, Any], step: int | None, passed: int = 1) -> dict[str, Any]:
        """The observation with what came before it. step: the control step of now; None where a client does not say:
        `passed` control steps after the one before, by the clock.

        Each past step has what was seen last before it, and those before the beginning what was seen first.
        Raises: RequestError for a key that was never sent.
        """
        self._held |= {key: observation[key] for key in self.kept if key in observation}
        missing = [key for key in self.kept if key not in self._held]
        if missing:
            raise RequestError(
                "missing_key",
                f"{missing[0]!r} is missing; send it with the first observation of an episode: it is kept",
                key=missing[0],
            )
        observation = {**observation, **{key: self._held[key] for key in self.kept}}
        if self.steps == 1:
            return observation
        if step is None and not self._said:
            self._said = True
            log.warning(
                "the policy looks %d control steps back, and a client does not say its 'step': the clock says when it "
                "saw what; have it send 'step', or set chunking.execute",
                self.steps - 1,
            )
        now = step if step is not None else self._next - 1 + passed if self._seen else 0
        self._next = now + 1
        while self._seen and self._seen[-1][0] >= now:  # asked a second time
            self._seen.pop()
        known = (key for key in observation if key not in self.kept)
        seen = {key: observation[key] for key in known if key.startswith(IMAGES) or _is_vector(key, observation)}
        self._seen.append((now, seen))
        first = max(now - self.steps + 1, self._seen[0][0])
        wanted = range(first, now + 1)
        for key, value in seen.items():
            if value.ndim == (4 if key.startswith(IMAGES) else 2):
                continue  # a stack of the client's own
            found = [self._at(key, at) for at in wanted]
            observation[key] = np.stack(found)
        while len(self._seen) > 1 and self._seen[1][0] <= now - self.steps + 1:
            self._seen.popleft()
        if "past_actions" in observation:  # a client that knows what its robot did
            return observation
        did = [self._action(at) for at in range(first, now)]
        if did and all(action is not None for action in did):
            observation["past_actions"] = np.stack(did)  # type: ignore[arg-type]
        return observation

    def remember(self, step: int | None, actions: np.ndarray) -> None:
        """What the robot was sent for the control steps from `step` on."""
        if self.steps > 1:
            first = self._next - 1 if step is None else step
            while self._did and self._did[-1][0] >= first:  # asked a second time
                self._did.pop()
            self._did.append((first, actions))
            while len(self._did) > 1 and self._did[1][0] <= first - self.steps:
                self._did.popleft()

    def _at(self, key: str, step: int) -> np.ndarray:
        past = [seen[key] for at, seen in self._seen if at <= step and key in seen]
        value = past[-1] if past else next(seen[key] for _, seen in self._seen if key in seen)
        return value[-1] if value.ndim == (4 if key.startswith(IMAGES) else 2) else value

    def _action(self, step: int) -> np.ndarray | None:
        for first, actions in reversed(self._did):
            if first <= step:
                return actions[min(step - first, len(actions) - 1)]
        return None


def _is_vector(key: str, observation: dict[str, Any]) -> bool:
    return key.startswith("observation.") and isinstance(observation[key], np.ndarray)
