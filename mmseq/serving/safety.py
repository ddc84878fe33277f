"""The last check before actions leave for a robot, by the rules that its client has too: `mmseq_client.rules`.

What breaks `limit`, `gripper` or `rate` is clamped or refused by configuration, counted by embodiment and axis, and
told in the reply. A step is also limited from the chunk before, where the session's control step is known and it
executes what it was sent, and from where an absolute robot stands, where it has not been sent anything yet. A chunk of
the wrong shape, or with a number that is not finite, never passes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from mmseq_client.rules import TOLERANCE, Breach, Rules

from mmseq.embodiment import Embodiment
from mmseq.errors import ConfigError
from mmseq.serving.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Of each rule: `clamp` limits the axis, `refuse` answers with an error instead."""

    out_of_range: Literal["clamp", "refuse"] = "clamp"  # beyond the embodiment's minimum..maximum
    # more than the embodiment's max_step from one control step to the next
    too_fast: Literal["clamp", "refuse"] = "clamp"
    gripper: Literal["clamp", "refuse", "ignore"] = "clamp"  # beyond open or closed; or `ignore`
    # how far outside, as a share of the axis' range, still counts as rounding and is only limited
    tolerance: float = TOLERANCE
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


class SafetyGate:
    """Checks every chunk; nothing that is not finite or outside of the limits passes in any configuration."""

    def __init__(self, config: GateConfig):
        self.config = config
        self.counts = GateCounts()
        configured = {"limit": config.out_of_range, "gripper": config.gripper, "rate": config.too_fast}
        self._refused = {rule for rule, what in configured.items() if what == "refuse"}
        self._rules: dict[str, tuple[Embodiment, Rules]] = {}

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
        rules, n = self.rules(embodiment), 0 if prefix is None else len(prefix)
        found: dict[str, np.ndarray] = {}
        try:
            actions = rules.well_formed(actions, horizon)
            if n:
                actions[:n] = prefix
            free, ignored = actions[n:], self.config.gripper == "ignore"  # a view: what is not committed yet
            found = rules.limit(free, refuse=self._refused, grippers=not ignored, first=n)
            refuse = "rate" in self._refused and not stood
            found |= rules.limit_steps(free, actions[n - 1] if n else before, refuse=refuse, first=n)
        except Breach as breach:
            self._count(found | breach.found, embodiment)
            self.counts.chunks_refused += 1
            raise RequestError("unsafe_action", f"the safety gate withheld a chunk: {breach}") from breach
        if not found:
            return actions, {}
        clamped = int(np.logical_or.reduce(list(found.values())).sum())
        self.counts.chunks_clamped += 1
        self.counts.values_clamped += clamped
        return actions, {"clamped": clamped, "axes": self._count(found, embodiment)}

    def rules(self, embodiment: Embodiment) -> Rules:
        known = self._rules.get(embodiment.name)
        if known is None or known[0] is not embodiment:
            rules = Rules(embodiment.to_dict(), tolerance=self.config.tolerance)
            known = self._rules[embodiment.name] = (embodiment, rules)
        return known[1]

    def observed(self, state: Any, embodiment: Embodiment) -> np.ndarray | None:
        """Where a robot that stands still is, see `Rules.stands`; None when nothing of it is known."""
        at = self.rules(embodiment).stands(state)
        return None if np.isnan(at).all() else at

    def counted_twice(self, *, clamped: bool) -> None:
        """One chunk went through `check` before and after it was averaged. clamped: both times."""
        self.counts.chunks -= 1
        self.counts.chunks_clamped -= int(clamped)

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

    def status(self) -> dict[str, Any]:
        by_axis: dict[str, dict[str, dict[str, int]]] = {}
        for (body, axis, rule), count in self.counts.by_axis.items():
            by_axis.setdefault(body, {}).setdefault(axis, {})[rule] = count
        return {**asdict(self.config), **vars(self.counts), "by_axis": by_axis}
