"""The last check before actions leave for a robot.

==========  =====================================================================================================
`limit`     an axis outside of the embodiment's minimum..maximum
`rate`      an axis that moves by more than the embodiment's `max_step` from one control step to the next, also
            from the chunk before, where the session's control step is known and it executes what it was sent, and
            from where an absolute robot stands, where it has not been sent anything yet
`gripper`   the gripper's axis beyond open or closed: its sign or scale is not the contract's
==========  =====================================================================================================

Each is clamped or refused by configuration, counted by embodiment and axis, and told in the reply. A chunk of the
wrong shape, or with a number that is not finite, never passes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NoReturn

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.errors import ConfigError
from mmseq.serving.errors import RequestError

ROUNDING = 2.4e-7  # of a number as float32, both ends of a step
RULES = ("limit", "rate", "gripper")
GRIPPER_SLACK = 0.1  # of the way between open and closed: what training data overshoot


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Of each rule: `clamp` limits the axis, `refuse` answers with an error instead."""

    out_of_range: Literal["clamp", "refuse"] = "clamp"  # beyond the embodiment's minimum..maximum
    # more than the embodiment's max_step from one control step to the next
    too_fast: Literal["clamp", "refuse"] = "clamp"
    gripper: Literal["clamp", "refuse", "ignore"] = "clamp"  # beyond open or closed; or `ignore`
    # how far outside, as a share of the axis' range, still counts as rounding and is only limited
    tolerance: float = 1e-4
    max_age_ms: float = 0.0  # an answer to an observation older than this is refused as `late`; 0 is no limit

    def __post_init__(self):
        if not 0 <= self.tolerance <= 0.1:
            raise ConfigError(f"gate.tolerance is {self.tolerance}", fix="use a share from 0 to 0.1")
        if not (math.isfinite(self.max_age_ms) and self.max_age_ms >= 0):
            raise ConfigError(f"gate.max_age_ms is {self.max_age_ms}", fix="use milliseconds; 0 is no limit")


@dataclass
class GateCounts:
    """What the gate has seen since the start. values: numbers of a chunk, steps x axes."""

    chunks: int = 0
    chunks_clamped: int = 0
    chunks_refused: int = 0
    chunks_stale: int = 0
    values_clamped: int = 0
    by_axis: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (embodiment, axis, rule): values


@dataclass(frozen=True)
class _Limits:
    """Of one embodiment's actions, float32 (axes,)."""

    low: np.ndarray
    high: np.ndarray
    slack: np.ndarray
    max_step: np.ndarray | None
    gripper: int | None
    gripper_low: float = 0.0
    gripper_high: float = 0.0

    @classmethod
    def of(cls, embodiment: Embodiment, config: GateConfig) -> _Limits:
        axes = embodiment.action
        assert axes is not None
        low, high = axes.limits
        slack = config.tolerance * np.maximum(high - low, 1e-6)
        step = None if axes.max_step is None else np.asarray(axes.max_step, np.float32)
        g = embodiment.gripper
        if g is None:
            return cls(low, high, slack, step, None)
        first, last = sorted((g.open, g.closed))
        return cls(low, high, slack, step, axes.names.index(g.axis), first, last)


class SafetyGate:
    """Checks every chunk; nothing that is not finite or outside of the limits passes in any configuration."""

    def __init__(self, config: GateConfig):
        self.config = config
        self.counts = GateCounts()
        self._limits: dict[str, tuple[Embodiment, _Limits]] = {}

    def check(
        self,
        actions: Any,
        embodiment: Embodiment,
        *,
        horizon: int | None,
        prefix: np.ndarray | None = None,
        before: np.ndarray | None = None,
        stood: bool = False,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The chunk as float32 (horizon, axes) within the limits, and what was clamped: {} or `clamped` and `axes`.

        prefix: float32 (n, axes), committed already; the chunk begins with exactly these. before: float32 (axes,),
        the action of the control step before the chunk, where it is known; NaN for an axis of which it is not. stood:
        that is where the robot stands, which lags behind what it is to do: the step is limited and not refused.
        Raises: RequestError `unsafe_action`.
        """
        self.counts.chunks += 1
        axes = embodiment.action
        assert axes is not None
        n = 0 if prefix is None else len(prefix)
        actions = self.well_formed(actions, embodiment, horizon)
        if prefix is not None:
            actions[:n] = prefix
        limits = self._of(embodiment)
        found: dict[str, np.ndarray] = {}
        free = actions[n:]  # a view: what is not committed yet
        if not ((free >= limits.low) & (free <= limits.high)).all():
            outside = (free < limits.low - limits.slack) | (free > limits.high + limits.slack)
            if outside.any():
                found["limit"] = outside
            if outside.any() and self.config.out_of_range == "refuse":
                step, axis = np.argwhere(outside)[0]
                self._violated(
                    found,
                    embodiment,
                    f"action axis {axes.names[axis]!r} is {free[step, axis]:.5g} at step {n + step}, outside "
                    f"{axes.minimum[axis]:.5g}..{axes.maximum[axis]:.5g} {axes.units[axis]}",
                )
        self._gripper(free, n, limits, embodiment, found)
        np.clip(free, limits.low, limits.high, out=free)
        if limits.max_step is not None:
            self._rate(actions, n, limits, before, embodiment, found, stood)
        return actions, self._explain(found, embodiment)

    def observed(self, state: Any, embodiment: Embodiment) -> np.ndarray | None:
        """Where an absolute robot that stands still is, as an action (axes,): of each axis that its proprio has under
        the same name and unit. NaN for the others, and for a gripper: closed on something it is not where it was sent.
        """
        axes, proprio, gripper = embodiment.action, embodiment.proprio, embodiment.gripper
        assert axes is not None
        if embodiment.action_form != "absolute" or proprio is None or np.shape(state) != (len(proprio),):
            return None
        place = {key: i for i, key in enumerate(zip(proprio.names, proprio.units))}
        at = np.full(len(axes), np.nan, np.float32)
        for i, (name, unit) in enumerate(zip(axes.names, axes.units)):
            if (name, unit) in place and (gripper is None or name != gripper.axis):
                at[i] = state[place[name, unit]]
        return at

    def counted_twice(self, *, clamped: bool) -> None:
        """One chunk went through `check` before and after it was averaged. clamped: both times."""
        self.counts.chunks -= 1
        self.counts.chunks_clamped -= int(clamped)

    def well_formed(self, actions: Any, embodiment: Embodiment, horizon: int | None) -> np.ndarray:
        """A copy as float32 (horizon, axes), finite. Raises: RequestError `unsafe_action`."""
        axes = embodiment.action
        assert axes is not None
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "iuf":
            self._refuse(f"actions are {type(actions).__name__}, expected a float32 array")
        wanted = (horizon if horizon is not None else "n", len(axes))
        if actions.ndim != 2 or actions.shape[1] != len(axes) or (horizon is not None and len(actions) != horizon):
            self._refuse(f"actions are {actions.shape}, expected {wanted} for axes {list(axes.names)}")
        with np.errstate(over="ignore"):
            actions = actions.astype(np.float32)
        if not np.isfinite(actions).all():
            step, axis = np.argwhere(~np.isfinite(actions))[0]
            self._refuse(f"action axis {axes.names[axis]!r} is {actions[step, axis]} at step {step}")
        return actions

    def _of(self, embodiment: Embodiment) -> _Limits:
        known = self._limits.get(embodiment.name)
        if known is None or known[0] is not embodiment:
            known = self._limits[embodiment.name] = (embodiment, _Limits.of(embodiment, self.config))
        return known[1]

    def _gripper(self, free: np.ndarray, n: int, limits: _Limits, body: Embodiment, found: dict) -> None:
        if limits.gripper is None or self.config.gripper == "ignore":
            return
        column = free[:, limits.gripper]
        slack = GRIPPER_SLACK * (limits.gripper_high - limits.gripper_low)
        wrong = (column < limits.gripper_low - slack) | (column > limits.gripper_high + slack)
        if not wrong.any():
            return
        mask = np.zeros(free.shape, bool)
        mask[:, limits.gripper] = wrong
        found["gripper"] = mask
        assert body.gripper is not None
        if self.config.gripper == "refuse":
            step = int(np.argmax(wrong))
            self._violated(
                found,
                body,
                f"the gripper {body.gripper.axis!r} is {column[step]:.5g} at step {n + step}; open is "
                f"{body.gripper.open:g} and closed {body.gripper.closed:g}: check its sign and scale",
            )
        np.clip(column, limits.gripper_low, limits.gripper_high, out=column, where=wrong)

    def _rate(
        self,
        actions: np.ndarray,
        n: int,
        limits: _Limits,
        before: np.ndarray | None,
        body: Embodiment,
        found: dict[str, np.ndarray],
        stood: bool,
    ) -> None:
        """Rows from `n` on, each against the row before it.

        Raises: RequestError for a robot that stands so far outside of its limits that one step cannot take it back.
        """
        max_step, axes = limits.max_step, body.action
        assert max_step is not None
        assert axes is not None
        previous = actions[n - 1] if n else before
        rows = actions[n:] if previous is None else np.concatenate([previous[None], actions[n:]])
        allowed = max_step * (1 + 1e-5) + ROUNDING * np.nan_to_num(np.abs(rows)).max(0)  # no breach
        if not (np.abs(np.diff(rows, axis=0)) > allowed).any():
            return
        mask = found["rate"] = np.zeros_like(actions[n:], dtype=bool)
        for i, row in enumerate(actions[n:]):
            if previous is not None:
                mask[i] = np.abs(row - previous) > allowed
                if mask[i].any() and self.config.too_fast == "refuse" and not stood:
                    axis = int(np.argmax(mask[i]))
                    self._violated(
                        found,
                        body,
                        f"action axis {axes.names[axis]!r} moves from {previous[axis]:.5g} to {row[axis]:.5g} at step "
                        f"{n + i}; its max_step is {max_step[axis]:.5g} {axes.units[axis]} per control step",
                    )
                np.clip(row, previous - max_step, previous + max_step, out=row, where=mask[i])
                beyond = (row < limits.low) | (row > limits.high)
                if beyond.any():
                    axis = int(np.argmax(beyond))
                    self._violated(
                        found,
                        body,
                        f"action axis {axes.names[axis]!r} stands at {previous[axis]:.5g}, outside of its limits "
                        f"{axes.minimum[axis]:.5g}..{axes.maximum[axis]:.5g} by more than its max_step "
                        f"{max_step[axis]:.5g} {axes.units[axis]}: move it back by hand",
                    )
            previous = row

    def _explain(self, found: dict[str, np.ndarray], embodiment: Embodiment) -> dict[str, Any]:
        if not found:
            return {}
        self.counts.chunks_clamped += 1
        told = self._count(found, embodiment)
        any_rule = np.logical_or.reduce(list(found.values()))
        self.counts.values_clamped += int(any_rule.sum())
        return {"clamped": int(any_rule.sum()), "axes": told}

    def _count(self, found: dict[str, np.ndarray], embodiment: Embodiment) -> dict[str, dict[str, int]]:
        """Counts by axis and rule of one chunk, added to those of all."""
        assert embodiment.action is not None
        told: dict[str, dict[str, int]] = {}
        for rule, mask in found.items():
            for axis in np.flatnonzero(mask.any(0)):
                name, count = embodiment.action.names[axis], int(mask[:, axis].sum())
                told.setdefault(name, {})[rule] = count
                self.counts.by_axis[embodiment.name, name, rule] += count
        return told

    def stale(self, age_ms: float) -> None:
        """Raises: RequestError `late` when the observation that was answered is too old."""
        if self.config.max_age_ms and age_ms > self.config.max_age_ms:
            self.counts.chunks_stale += 1
            raise RequestError("late", f"the answer took {age_ms:.0f} ms, the limit is {self.config.max_age_ms:.0f}")

    def _violated(self, found: dict[str, np.ndarray], embodiment: Embodiment, what: str) -> NoReturn:
        self._count(found, embodiment)
        self._refuse(what)

    def _refuse(self, what: str) -> NoReturn:
        self.counts.chunks_refused += 1
        raise RequestError("unsafe_action", f"the safety gate withheld a chunk: {what}")

    def status(self) -> dict[str, Any]:
        by_axis: dict[str, dict[str, dict[str, int]]] = {}
        for (body, axis, rule), count in self.counts.by_axis.items():
            by_axis.setdefault(body, {}).setdefault(axis, {})[rule] = count
        return {**asdict(self.config), **vars(self.counts), "by_axis": by_axis}
