"""History: what one robot saw and did, for policies that look back, and what it was shown once and for all.

A policy may be given past frames and states (`video[4]`, `image@-8`, `proprio[4]`, `history`), a demonstration
(`demo[8]`) or a goal (`image@+16`). A client sends what it sees now; the rest is kept here for its session. One that
sees more than it asks for, such as `mmseq_client.ControlLoop`, sends the last frames itself, stacked (n, H, W, 3), and
what it sends counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmseq_client.past import Past

from mmseq.serving.errors import RequestError

log = logging.getLogger("mmseq.serving")


class History(Past):
    """The last control steps of one session. steps: how many the policy looks at, now included.

    kept: keys that are sent once and hold until the next `reset`, such as a demonstration's frames.
    """

    def __init__(self, steps: int, kept: Sequence[str] = ()):
        super().__init__(steps)
        self.kept = tuple(kept)
        self._held: dict[str, Any] = {}
        self._next, self._said = 0, False

    def forget(self, *, episode: bool = False) -> None:
        """What was seen and done. episode: another one begins, so that what it was shown is over, too."""
        self.clear()
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
        self._saw(now, {key: value for key, value in observation.items() if key not in self.kept})
        return self.stacked(now, observation, without=self.kept)

    def remember(self, step: int | None, actions: np.ndarray) -> None:
        """What the robot was sent for the control steps from `step` on."""
        self.commanded(self._next - 1 if step is None else step, actions)
