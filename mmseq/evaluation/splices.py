"""How smoothly chunks follow each other: the change of the action where one takes over, against inside of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmseq.evaluation.results import Result


@dataclass
class Splices:
    """Of one or more episodes.

    at_splice, inside: the largest change of an axis (grippers aside) from one control step to the next, as a share
    of the axis' 1 % to 99 % range: at the first action of a chunk that was not committed before, and everywhere else.
    Holds are neither. splices: how often a chunk took over from another; identical: of these, before which the robot
    had executed exactly what the new chunk begins with.
    """

    at_splice: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    splices: int = 0
    identical: int = 0

    @classmethod
    def join(cls, several: Iterable[Splices]) -> Splices:
        joined = cls()
        for one in several:
            joined.at_splice += one.at_splice
            joined.inside += one.inside
            joined.splices += one.splices
            joined.identical += one.identical
        return joined

    def results(self, seed: int) -> list[Result]:
        """Rows for `--json`; none when there was no splice, or nothing to compare it with."""
        if not self.at_splice or not self.inside:
            return []
        n = len(self.at_splice)
        changes = [
            Result(
                name=f"splice.change_{name}",
                value=float(measure(self.at_splice)),
                unit="share of the range",
                better="lower",
                baseline_name="inside chunks",
                baseline_value=float(measure(self.inside)),
                n=n,
                seed=seed,
            )
            for name, measure in (("mean", np.mean), ("p99", lambda changes: np.quantile(changes, 0.99)))
        ]
        identical = Result(
            name="splice.committed_identical",
            value=self.identical / self.splices,
            unit="share",
            better="higher",
            baseline_name="all",
            baseline_value=1.0,
            n=self.splices,
            seed=seed,
        )
        return [*changes, identical]


class SpliceMeter:
    """Compares what a robot executed with what the server sent, without asking the loop how it spliced."""

    def __init__(self, embodiment: Mapping[str, Any]):
        from mmseq_client import gripper_axes

        axes, grippers = embodiment["action"], gripper_axes(dict(embodiment))
        self._motion = [i for i in range(len(axes["names"])) if i not in grippers]
        self._scale = np.maximum(np.subtract(axes["high"], axes["low"]), 1e-6)[self._motion]
        self._sent: dict[int, tuple[np.ndarray, int]] = {}  # by the step of its observation: chunk, how much is forced
        self._seam = -1  # the first step of the chunk under way that was not committed before
        self._executed: dict[int, np.ndarray] = {}
        self._last: Any = None
        self.found = Splices()

    def add(self, tick: Any, chunk: np.ndarray | None, committed: int = 0) -> None:
        """One control step of `mmseq_client.ControlLoop.tick`. chunk, committed: what came back, or will, if something
        was asked for, and how many actions of it were sent as its prefix."""
        if tick.asked and chunk is not None:
            self._sent[tick.step] = chunk, committed
        if tick.held:
            self._last = None
            return
        if self._last is not None:
            if tick.sequence != self._last.sequence:
                begin = tick.step - tick.age_steps
                self._seam = max(tick.step, begin + self._sent[begin][1])
                self.found.splices += 1
                self.found.identical += self._kept(begin, tick.step)
            change = np.abs(tick.action - self._last.action)[self._motion] / self._scale
            (self.found.at_splice if tick.step == self._seam else self.found.inside).append(float(change.max()))
        self._executed[tick.step], self._last = tick.action, tick

    def _kept(self, begin: int, end: int) -> bool:
        return all(
            step in self._executed and np.array_equal(self._executed[step], self._sent[begin][0][step - begin])
            for step in range(begin, end)
        )
