"""Which action belongs to which control step: chunks, their splices, and when to ask for the next one.

Pure bookkeeping over (control step, chunk): no I/O and no clock, so the same code runs on a robot, in a
simulator and in tests. H is the horizon, the control steps of a chunk.

========== ===========================================================================================
plain      the newest chunk takes over when it arrives, at the row of the control step that it is then
ensemble   as ACT: a step's action is the mean of the rows that all chunks have for it, with weights
           exp(-decay * i), i = 0 the oldest (Zhao et al. 2023, arXiv:2304.13705)
realtime   the d actions that will be executed while the model thinks are sent with the observation, and the
           new chunk begins with exactly these (Black et al. 2025, arXiv:2506.07339, without approximation)
========== ===========================================================================================
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

import numpy as np

from mmseq_client.errors import ClientError

MODES = ("plain", "ensemble", "realtime")
_SAME = 1e-5  # rounding on the wire


@dataclass(frozen=True)
class Chunking:
    """How chunks become actions, spelled as in the server's configuration.

    mode: one of `MODES`. execute: control steps from one request to the next (s); None: half of the horizon, in
    ensemble 1. The delay d of a reply, in control steps, is measured, and s is kept in d <= s <= H - d.
    decay: of the weights in ensemble.
    """

    mode: str = "plain"
    execute: int | None = None
    decay: float = 0.01

    def __post_init__(self):
        if self.mode not in MODES:
            raise ClientError(f"chunking mode is {self.mode!r}; use one of {', '.join(MODES)}")
        if self.execute is not None and (type(self.execute) is not int or self.execute < 1):
            raise ClientError(f"chunking execute is {self.execute!r}; use a whole number of control steps from 1 on")
        if not (math.isfinite(self.decay) and self.decay >= 0):
            raise ClientError(f"chunking decay is {self.decay!r}; use 0 or more")

    def steps(self, horizon: int) -> int:
        """s for chunks of `horizon`. Raises: ClientError when a chunk is too short for it."""
        if self.execute is None:
            return 1 if self.mode == "ensemble" else max(1, horizon // 2)
        if self.execute > horizon:
            raise ClientError(f"execute is {self.execute}, expected 1..{horizon} (the horizon)")
        return self.execute


@dataclass(frozen=True)
class Ask:
    """A request to send now. prefix: float32 (n, axes), the actions that will be executed meanwhile, n <= delay.
    executed: control steps of the episode that have been executed before this one."""

    sequence: int
    step: int
    executed: int
    delay: int
    prefix: np.ndarray


@dataclass(frozen=True)
class Planned:
    """The action of one control step, float32 (axes,). sequence: of the newest chunk in it; age_steps: since the
    observation that chunk was made from, less than max_age."""

    action: np.ndarray
    sequence: int
    age_steps: int
    max_age: int


@dataclass
class _Chunk:
    sequence: int
    step: int  # of its observation
    executed: int  # of the episode, before row 0
    first: int  # the control step of row 0: `step`, later by the steps the robot has held since
    actions: np.ndarray
    late: bool = False  # older than allowed, for a robot that has stood still since: only row 0 is executed


class Delays:
    """How long replies take: a high quantile of the last ones, in whatever they are counted in."""

    REMEMBERED = 50
    QUANTILE = 0.95

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=self.REMEMBERED)
        self._warm = False

    def add(self, delay: float) -> None:
        if not self._warm and self._last:
            self._last.clear()  # a server's first answer is often slow and says nothing of the next ones
            self._warm = True
        self._last.append(delay)

    @property
    def usual(self) -> float:
        """0 while nothing is known."""
        return sorted(self._last)[math.ceil(self.QUANTILE * len(self._last)) - 1] if self._last else 0


def ensemble(
    chunks: Sequence[tuple[int, np.ndarray]], step: int, decay: float, grippers: Sequence[int] = ()
) -> np.ndarray:
    """float32 (n, axes): what chunks say together of the control steps from `step` on, as far as the newest reaches.

    chunks: the oldest first, each the control step of its first row, and its rows (H, axes). Each weighs
    exp(-decay * i), i = 0 the oldest that speaks of a step. grippers: axes of which the newest alone decides, for half
    open is neither.
    """
    first, newest = chunks[-1]
    newest = newest[step - first :]
    if len(chunks) == 1:
        return newest.astype(np.float32)
    total, weights, said = np.zeros(newest.shape), np.zeros((len(newest), 1)), np.zeros((len(newest), 1))
    for first, rows in chunks:
        rows = rows[step - first :][: len(newest)]
        weight = np.exp(-decay * said[: len(rows)])
        total[: len(rows)] += weight * rows
        weights[: len(rows)] += weight
        said[: len(rows)] += 1
    mean = (total / weights).astype(np.float32)
    mean[:, list(grippers)] = newest[:, list(grippers)]
    return mean


class ChunkBuffer:
    """The chunks under way.

    Each control step: `ask` (and send what it returns), `accept` what came back, then `action`. max_age: control
    steps from an observation after which none of its actions may be executed; at most, and by default, H. A robot
    that has stood still since executes row 0 of a later chunk as well, unless max_age is given, if answers usually
    take that long: else it would never move.
    prefix: whether the server forces a prefix, which realtime needs. grippers: axes that are never averaged.
    """

    def __init__(
        self,
        chunking: Chunking,
        horizon: int,
        max_age: int | None = None,
        prefix: bool = True,
        grippers: Sequence[int] = (),
    ):
        if chunking.mode == "realtime" and not prefix:
            raise ClientError(
                "the server's policy does not force a prefix, which realtime needs; use plain or ensemble"
            )
        self.chunking, self.horizon, self.execute = chunking, horizon, chunking.steps(horizon)
        self.grippers = list(grippers)
        self.max_age = horizon if max_age is None else max(1, min(horizon, max_age))
        self._patience = math.inf if max_age is None else max(1, max_age)
        self._delays = Delays()
        self._sequence = 0
        self.restart()

    def restart(self) -> None:
        """A new episode, of which nothing has been executed."""
        self._executed = 0
        self.reset()

    def reset(self) -> None:
        """Forget all chunks and the request under way; what is known of the delay and of the episode stays."""
        self._chunks: list[_Chunk] = []
        self._flight: Ask | None = None
        self._played: dict[int, np.ndarray] = {}  # since the request under way, by control step
        self._held_from: int | None = None  # holding, since the request under way, from this step on

    @property
    def delay(self) -> int:
        """d: the control steps that a reply takes, a high quantile of the last ones."""
        return int(self._delays.usual)

    def executed(self, step: int) -> int:
        """How many control steps of the episode have been executed before `step`: while nothing valid is left, none."""
        live = self._live(step)
        return live[-1].executed + step - live[-1].first if live else self._executed

    def commanded(self, step: int) -> None:
        """What `action` gave for `step` was executed."""
        self._executed = self.executed(step) + 1

    def left(self, step: int) -> int:
        """How many actions there are from `step` on."""
        return max((self._until(chunk) - step for chunk in self._chunks), default=0)

    def due(self, step: int) -> bool:
        """Whether the next chunk is to be asked for at this step."""
        if self._flight is not None:
            return False
        if self.left(step) <= self.delay:  # beside a late chunk's one row an answer would be too old again
            return not (self._chunks and self._chunks[-1].late and self.left(step) > 0)
        return step - self._chunks[-1].step >= min(max(self.execute, self.delay), max(1, self.horizon - self.delay))

    def ask(self, step: int) -> Ask | None:
        """The request to send at this step, or None."""
        if not self.due(step):
            return None
        self._sequence += 1
        prefix = np.zeros((0, 0), np.float32)
        if self.chunking.mode == "realtime" and self.left(step) > 0:
            newest = self._chunks[-1]
            row = step - newest.first
            prefix = newest.actions[row : row + min(self.delay, self.left(step), self.horizon - 1)]
        self._flight = Ask(self._sequence, step, self.executed(step), min(self.delay, self.horizon), prefix)
        # one that stands still begins the answer at its first row, whatever delays its loop until then
        self._played, self._held_from = {}, None if self.left(step) > 0 else step
        return self._flight

    def accept(
        self, sequence: int, actions: np.ndarray, step: int, limit: Callable[[np.ndarray], None] | None = None
    ) -> str | None:
        """Take the chunk (H, axes) that answers request `sequence`. Returns: None, or why it is discarded.

        limit: called with the rows that are still to come, (n, axes), to change them in place or to raise.
        """
        ask = self._flight
        if ask is None or ask.sequence != sequence:
            return "out of order"
        self._flight = None
        took, usual, still = step - ask.step, self.delay, self._held_from is not None and not self._played
        self._delays.add(took)
        late = took >= self.max_age
        if late and not (still and took <= usual and took < self._patience):
            return (
                f"stale: it took {took} control steps, at most {self.max_age - 1} are allowed "
                f"(horizon {self.horizon}, max_age {self.max_age}); answers must be faster, or chunks longer"
            )
        if len(ask.prefix) and np.abs(actions[: len(ask.prefix)] - ask.prefix).max() > _SAME:
            return "without its prefix"
        if self.chunking.mode == "realtime" and any(
            np.abs(actions[at - ask.step] - played).max() > _SAME for at, played in self._played.items()
        ):
            return "late"  # longer than committed: the robot went on along the old chunk, elsewhere than the new one
        held = 0 if self._held_from is None else step - self._held_from
        first = step if late else ask.step + held
        chunk = _Chunk(sequence, ask.step, ask.executed, first, np.array(actions, np.float32), late)
        if limit is not None:
            limit(chunk.actions[step - chunk.first :])
        kept = self._live(step) if self.chunking.mode == "ensemble" else []
        self._chunks = [*kept, chunk]
        return None

    def lost(self, sequence: int, step: int, late: bool = False) -> None:
        """There will be no answer to `sequence`. late: because it would have taken longer than expected."""
        if self._flight is not None and self._flight.sequence == sequence:
            if late:
                self._delays.add(max(self.delay + 1, step - self._flight.step))
            self._flight = None

    def action(self, step: int) -> Planned | None:
        """The action of control step `step`; None when no valid one is left, and the robot has to hold."""
        live = self._live(step)
        if not live:
            self._held_from = step if self._held_from is None else self._held_from
            return None
        action = ensemble([(chunk.first, chunk.actions) for chunk in live], step, self.chunking.decay, self.grippers)[0]
        self._played[step] = action
        newest = live[-1]
        allowed = step - newest.step + 1 if newest.late else self.max_age
        return Planned(action.copy(), newest.sequence, step - newest.step, allowed)

    def _live(self, step: int) -> list[_Chunk]:
        """The chunks that have an action for `step`, the newest last."""
        return [chunk for chunk in self._chunks if step < self._until(chunk)]

    def _until(self, chunk: _Chunk) -> int:
        """The first control step that the chunk has no action for any more."""
        if chunk.late:
            return chunk.first + 1
        return min(chunk.first + len(chunk.actions), chunk.step + self.max_age)
