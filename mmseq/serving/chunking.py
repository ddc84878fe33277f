"""Action chunks for clients that know nothing of them: what a session was sent, spliced to what it is sent next.

=============  ======================================================================================================
`plain`        the chunk as the policy gave it
`ensemble`     ACT's temporal ensembling: the mean of what all chunks say of a control step, weighted exp(-decay * i)
               with i = 0 for the oldest (Zhao et al. 2023, arXiv:2304.13705)
`realtime`     the actions that the robot executes until the answer arrives are forced as the beginning of the chunk;
               with actions as tokens in time order that is exact (inpainting a diffusion policy approximates it:
               Black et al. 2025, arXiv:2506.07339)
=============  ======================================================================================================

Legend: H control steps of a chunk, A axes; a chunk's row i belongs to control step `step + i`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from mmseq_client.chunking import MODES, ensemble

from mmseq.errors import ConfigError
from mmseq.serving.errors import RequestError

TURN_KEYS = ("step", "executed", "sent_at", "deadline_ms", "delay", "reset", "chunking")


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How chunks become actions for clients that do not do it themselves."""

    # `plain`, `ensemble` (ACT), `realtime` (actions under way are forced as the beginning)
    mode: Literal["plain", "ensemble", "realtime"] = "plain"
    # control steps between two requests of a client that does not say; default: not known (plain), one (ensemble), half
    # of the chunk (realtime)
    execute: int | None = None
    decay: float = 0.01  # of the ensemble's weights

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(f"chunking.mode is {self.mode!r}", fix=f"use one of {', '.join(MODES)}")
        if self.execute is not None and self.execute < 1:
            raise ConfigError(f"chunking.execute is {self.execute}", fix="use 1 or more, up to the policy's horizon")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ConfigError(f"chunking.decay is {self.decay}", fix="use 0 or more; ACT's is 0.01")

    def resolve(self, horizon: int, *, prefix: bool) -> Chunking:
        """With `execute` filled in. Raises: ConfigError for what a policy of this horizon cannot do."""
        default = {"plain": None, "ensemble": 1, "realtime": max(1, horizon // 2)}[self.mode]
        execute = default if self.execute is None else self.execute
        if execute is not None and not 1 <= execute <= horizon:
            raise ConfigError(f"chunking.execute is {execute}", fix=f"use 1 to {horizon}, the policy's horizon")
        if self.mode == "realtime" and not prefix:
            raise ConfigError("chunking.mode is realtime, and the policy takes no action_prefix", fix="use plain")
        return Chunking(mode=self.mode, execute=execute, decay=self.decay)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What an observation says of its place in the session, all of it optional. See `serve/README.md`."""

    step: int | None = None
    executed: int | None = None
    sent_at: float | None = None
    deadline_ms: float | None = None
    delay: int | None = None
    reset: bool = False
    chunking: str | None = None


def take_turn(observation: dict[str, Any]) -> tuple[Turn, dict[str, Any]]:
    """The turn, and the observation without it. Raises: RequestError that names the key."""
    if not any(key in observation for key in TURN_KEYS):
        return Turn(), observation
    given = {key: _plain(observation[key]) for key in TURN_KEYS if observation.get(key) is not None}
    rest = {key: value for key, value in observation.items() if key not in TURN_KEYS}
    for key, value in given.items():
        number = type(value) in (int, float)
        if key in ("step", "executed", "delay"):
            good, wanted = type(value) is int and 0 <= value < 1 << 53, "a whole number from 0 on"
        elif key == "sent_at":
            good, wanted = number and math.isfinite(value), "a finite number"
        elif key == "deadline_ms":
            good, wanted = number and 0 < value <= 86_400_000, "milliseconds above 0, at most a day"
        elif key == "reset":
            good, wanted = type(value) is bool, "true or false"
        else:
            good, wanted = isinstance(value, str) and value == "plain", "'plain', or nothing for the server's own"
        if not good:
            raise RequestError("out_of_range", f"{key!r} is {value!r:.40}, expected {wanted}", key=key)
    return Turn(**given), rest


def _plain(value: Any) -> Any:
    """A number or a bool as Python's own, also from numpy."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


class ChunkMemory:
    """What one session was sent, and so what its robot executes now."""

    def __init__(self, chunking: Chunking, horizon: int):
        self.chunking, self.horizon = chunking, horizon
        self._sent: tuple[int, np.ndarray] | None = None  # step of its first row, (H, A)
        self._predicted: deque[tuple[int, np.ndarray]] = deque()  # of the ensemble, before averaging
        self._before: np.ndarray | None = None  # the action of the control step before that
        self._asked: int | None = None
        self._next = 0  # the control step of a client that does not say

    def forget(self) -> None:
        """What was planned; not how far the robot is."""
        self._sent = self._asked = self._before = None
        self._predicted.clear()

    def begin(self, turn: Turn) -> int | None:
        """The control step of a request; None when nobody knows.

        Raises: RequestError when the session has been further already.
        """
        if turn.reset:
            self.forget()
            self._next = 0
        if turn.step is None:
            if self.chunking.execute is None:
                return None
            self._asked = self._next
            return self._asked
        if self._asked is not None and turn.step < self._asked:
            raise RequestError(
                "refused",
                f"'step' is {turn.step}, this session was at {self._asked} already",
                key="step",
                fix="send reset: true with the first observation of an episode",
            )
        self._asked = turn.step
        return turn.step

    def prefix(self, step: int, delay: int) -> np.ndarray | None:
        """Rows (n, A) of the last chunk for control steps `step` to `step + delay`; None when there are none."""
        if self._sent is None:
            return None
        first = step - self._sent[0]
        count = min(delay, self.horizon - 1)
        rows = self._sent[1][first : first + count] if first >= 0 else self._sent[1][:0]
        return rows.copy() if len(rows) else None

    def before(self, step: int) -> np.ndarray | None:
        """The action (A,) that this session has for the control step before `step`; None where it has none."""
        if self._sent is None:
            return None
        at = step - 1 - self._sent[0]
        if at == -1:  # asked a second time
            return self._before
        return self._sent[1][at] if 0 <= at < self.horizon else None

    def ensemble(self, step: int, chunk: np.ndarray, grippers: Sequence[int] = ()) -> np.ndarray:
        """Rows (H, A): what `chunk` and earlier chunks say together, see `mmseq_client.chunking.ensemble`."""
        if self._predicted and self._predicted[-1][0] == step:
            self._predicted.pop()  # asked a second time
        self._predicted.append((step, chunk))
        while self._predicted[0][0] + self.horizon <= step:
            self._predicted.popleft()
        return ensemble(self._predicted, step, self.chunking.decay, grippers)

    def remember(self, step: int | None, chunk: np.ndarray) -> None:
        self._before = None if step is None else self.before(step)
        self._sent = None if step is None else (step, chunk)
        if step is not None:
            self._next = step + (self.chunking.execute or self.horizon)
