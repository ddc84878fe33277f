"""The last check before an action reaches the motors: finite, shape, limits, rate of change, gripper, age."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from mmseq_client.errors import ContractError, UnsafeActionError

_SLACK = 1e-4  # of an axis' range, or largest step: rounding, not counted
_ROUNDING = 2.4e-7  # of a number as float32, both ends of a step
_GRIPPER_SLACK = 0.1  # of the way between open and closed: what training data overshoot, as the server has it


class ActionGate:
    """Checks chunks when they arrive and each action before it leaves, against the robot's contract.

    out_of_range: `clamp` limits an axis to minimum..maximum (the gripper to open..closed) and its change from one
    control step to the next to `max_step`, where the contract has it or it is given (a number, or one by axis: only to
    allow less); `refuse` withholds the chunk instead.
    counts: what it has limited and withheld. Raises: ContractError for a contract without actions.
    """

    def __init__(self, embodiment: dict[str, Any], out_of_range: str = "clamp", max_step: Any = None):
        if out_of_range not in ("clamp", "refuse"):
            raise ContractError(f"out_of_range is {out_of_range!r}; use clamp or refuse")
        axes = embodiment.get("action")
        if not axes:
            raise ContractError("embodiment {!r} has no action axes".format(embodiment.get("name")))
        self.names: list[str] = list(axes["names"])
        self.refuses = out_of_range == "refuse"
        low, high = np.array(axes["minimum"], np.float64), np.array(axes["maximum"], np.float64)
        self.max_step = np.float32(axes["max_step"]) if axes.get("max_step") else None
        if max_step is not None:
            try:
                less = np.asarray(max_step, np.float32)
            except (TypeError, ValueError, OverflowError):
                less = np.zeros(())
            if less.shape not in ((), (len(self.names),)) or not (np.isfinite(less) & (less > 0)).all():
                raise ContractError(
                    f"max_step is {max_step!r}; give a positive number, or one for each of {self.names}"
                )
            less = np.broadcast_to(less, (len(self.names),))
            self.max_step = less if self.max_step is None else np.minimum(less, self.max_step)
        gripper = embodiment.get("gripper")
        self.gripper = self.names.index(gripper["axis"]) if gripper else None
        if gripper:
            least, most = sorted((gripper["open"], gripper["closed"]))
            low[self.gripper] = max(low[self.gripper], least)
            high[self.gripper] = min(high[self.gripper], most)
        if not (np.isfinite(np.float32([low, high])).all() and (low <= high).all()):
            raise ContractError(f"the limits of {self.names} are {low.tolist()} to {high.tolist()}")
        self.low, self.high = _inward(low, high)
        self.slack = _SLACK * np.maximum(self.high - self.low, 1e-6)
        if gripper:
            self.slack[self.gripper] = _GRIPPER_SLACK * (most - least)
        self.counts: Counter[str] = Counter()

    def check_chunk(self, actions: Any, horizon: int, clamp: bool = False) -> np.ndarray:
        """A reply's actions as float32 (horizon, axes) within the limits. clamp: even if it is configured to refuse.

        Raises: UnsafeActionError that names the axis, the step and the value.
        """
        wanted = (horizon, len(self.names))
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "iuf" or actions.shape != wanted:
            got = getattr(actions, "shape", type(actions).__name__)
            self._withhold("shape", f"actions are {got}, expected float32 {wanted} for axes {self.names}")
        with np.errstate(over="ignore"):
            actions = actions.astype(np.float32)
        bad = ~np.isfinite(actions)
        if bad.any():
            step, axis = np.argwhere(bad)[0]
            self._withhold("not_finite", f"axis {self.names[axis]!r} is {actions[step, axis]} at step {step}")
        outside = (actions < self.low - self.slack) | (actions > self.high + self.slack)
        if outside.any():
            step, axis = np.argwhere(outside)[0]
            if self.refuses and not clamp:
                limits = f"{self.low[axis]:.5g}..{self.high[axis]:.5g}"
                self._withhold(
                    "out_of_range",
                    f"axis {self.names[axis]!r} is {actions[step, axis]:.5g} at step {step}, outside {limits}",
                )
            self.counts["clamped_range"] += int(outside.sum())
        return np.clip(actions, self.low, self.high)

    def limit_steps(self, actions: np.ndarray, previous: np.ndarray | None, clamp: bool = False) -> None:
        """Keep each axis' change per control step within `max_step`, from `previous` (axes,) on; in place.

        previous: the action before, or where the robot stands; NaN for an axis of which it is not known. clamp: even
        if it is configured to refuse, for a robot that stands: what it sees lags behind what it is to do.
        Raises: UnsafeActionError when it is configured to refuse, and for a robot that stands so far outside of its
        limits that one step cannot take it back.
        """
        if self.max_step is None:
            return
        for row, action in enumerate(actions):
            if previous is not None:
                known = np.isfinite(previous)
                rounding = _ROUNDING * np.maximum(np.abs(action), np.abs(previous))
                outside = np.abs(action - previous) > self.max_step * (1 + _SLACK) + rounding
                if outside.any():
                    axis = int(np.argmax(outside))
                    if self.refuses and not clamp:
                        change = abs(float(action[axis] - previous[axis]))
                        self._withhold(
                            "max_step",
                            f"axis {self.names[axis]!r} changes by {change:.5g} at step {row}, "
                            f"more than {self.max_step[axis]:.5g}",
                        )
                    self.counts["clamped_step"] += int(outside.sum())
                np.clip(action, previous - self.max_step, previous + self.max_step, out=action, where=known)
                beyond = (action < self.low) | (action > self.high)
                if beyond.any():
                    axis = int(np.argmax(beyond))
                    self._withhold(
                        "max_step",
                        f"axis {self.names[axis]!r} stands at {previous[axis]:.5g}, outside of its limits "
                        f"{self.low[axis]:.5g}..{self.high[axis]:.5g} by more than its max_step "
                        f"{self.max_step[axis]:.5g}: move it back by hand",
                    )
            previous = action

    def check_action(
        self, action: np.ndarray, previous: np.ndarray | None, *, age_steps: int, max_age: int, clamp: bool = False
    ) -> np.ndarray:
        """The one action that is about to be executed, float32 (axes,), after all of the above and its age.

        Raises: UnsafeActionError.
        """
        if not 0 <= age_steps < max_age:
            self._withhold("stale", f"the action is {age_steps} control steps old, at most {max_age - 1} are allowed")
        checked = self.check_chunk(action[None], 1)
        self.limit_steps(checked, previous, clamp)
        return checked[0]

    def _withhold(self, reason: str, what: str) -> None:
        self.counts[reason] += 1
        raise UnsafeActionError(f"the gate withheld it ({reason}): {what}")


def _inward(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 limits as float32, so that what is between these is between those."""
    least, most = low.astype(np.float32), high.astype(np.float32)
    least = np.where(least.astype(np.float64) < low, np.nextafter(least, np.float32(np.inf)), least)
    most = np.where(most.astype(np.float64) > high, np.nextafter(most, np.float32(-np.inf)), most)
    nearest = low.astype(np.float32)  # one value that float32 has not
    return np.where(least > most, nearest, least), np.where(least > most, nearest, most)
