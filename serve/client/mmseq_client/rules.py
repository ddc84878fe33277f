"""What limits a robot, from its contract: the server checks each chunk by it, and the client each action again.

=============  ==================================================================================================
`shape`        no array of numbers, or not (rows, axes); passes in no configuration
`not_finite`   a NaN or an infinity; passes in no configuration
`limit`        an axis outside of minimum..maximum
`gripper`      a gripper's axis beyond open or closed: its sign or scale is not the contract's
`rate`         an axis that moves by more than its `max_step` from one control step to the next
=============  ==================================================================================================

What breaks one of the last three is limited in place, or refused: a `Breach` is raised. What lies beyond a limit by no
more than rounding is limited and not mentioned. Rows are control steps in order, float32 (n, axes).
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np

from mmseq_client.contract import gripper_axes, grippers_of, holds_position
from mmseq_client.errors import ContractError

TOLERANCE = 1e-4  # of an axis' range, or of its largest step: what counts as rounding
ROUNDING = 2.4e-7  # of a number as float32, both ends of a step
GRIPPER_SLACK = 0.1  # of the way between open and closed: what training data overshoot


class Breach(ValueError):
    """A chunk that is not passed on, and why. found: by rule, a mask (n, axes) of all breaches that were seen."""

    def __init__(self, rule: str, what: str, found: dict[str, np.ndarray] | None = None):
        super().__init__(what)
        self.rule, self.found = rule, found or {}


def inward(minimum: Any, maximum: Any) -> tuple[np.ndarray, np.ndarray]:
    """Limits as float32 (axes,), rounded so that what is between these is between the stated ones.

    An axis with one value that float32 has not is given the nearest.
    """
    exact_low, exact_high = np.asarray(minimum, np.float64), np.asarray(maximum, np.float64)
    low, high = exact_low.astype(np.float32), exact_high.astype(np.float32)
    inner_low = np.where(low < exact_low, np.nextafter(low, np.float32(np.inf)), low)
    inner_high = np.where(high > exact_high, np.nextafter(high, np.float32(-np.inf)), high)
    crossed = inner_low > inner_high
    return np.where(crossed, low, inner_low), np.where(crossed, low, inner_high)


def rounding(low: np.ndarray, high: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """How far beyond its limits a value still counts as rounded, (axes,): a share of the range, and for an axis that
    hardly moves of a tenth of its size."""
    size = np.maximum(1, np.maximum(np.abs(low), np.abs(high)))
    return tolerance * np.maximum(high - low, 0.1 * size)


class Rules:
    """Of one robot's actions. embodiment: its contract as a dict. max_step: a number or one for each axis, where less
    is allowed than the contract says.

    Raises: ContractError for a contract without actions, or with limits that are none.
    """

    def __init__(self, embodiment: dict[str, Any], *, tolerance: float = TOLERANCE, max_step: Any = None):
        axes = embodiment.get("action")
        if not axes:
            raise ContractError("embodiment {!r} has no action axes".format(embodiment.get("name")))
        self.names: list[str] = list(axes["names"])
        self.units: list[str] = list(axes["units"])
        self.stated = np.array([axes["minimum"], axes["maximum"]], np.float64)
        self.grippers = gripper_axes(embodiment)
        inner = self.stated.copy()  # with grippers between open and closed
        self._open_closed = [(float(g["open"]), float(g["closed"])) for g in grippers_of(embodiment)]
        for axis, values in zip(self.grippers, self._open_closed):
            inner[:, axis] = max(inner[0, axis], min(values)), min(inner[1, axis], max(values))
        finite = np.abs([self.stated, inner]).max() <= np.finfo(np.float32).max  # NaN is not
        if not finite or (self.stated[0] > self.stated[1]).any() or (inner[0] > inner[1]).any():
            raise ContractError(f"the limits of {self.names} are {inner[0].tolist()} to {inner[1].tolist()}")
        self.low, self.high = inward(*self.stated)
        self._inner_low, self._inner_high = inward(*inner)
        self._slack = rounding(self.low, self.high, tolerance)
        self.max_step = _smallest(axes.get("max_step"), max_step, self.names)
        self._sensed = _sensed(embodiment, self.grippers)
        self.state_width = len((embodiment.get("proprio") or {}).get("names", ()))

    def well_formed(self, actions: Any, horizon: int | None) -> np.ndarray:
        """A copy as float32 (horizon, axes), finite. Raises: Breach."""
        wanted = f"float32 ({'n' if horizon is None else horizon}, {len(self.names)}) for axes {self.names}"
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "iuf":
            raise Breach("shape", f"actions are {type(actions).__name__}, expected {wanted}")
        rows = actions.shape[0] if horizon is None and actions.ndim else horizon
        if actions.shape != (rows, len(self.names)):
            raise Breach("shape", f"actions are {actions.shape}, expected {wanted}")
        with np.errstate(over="ignore"):
            actions = actions.astype(np.float32)
        bad = ~np.isfinite(actions)
        if bad.any():
            step, axis = np.argwhere(bad)[0]
            raise Breach("not_finite", f"action axis {self.names[axis]!r} is {actions[step, axis]} at step {step}")
        return actions

    def limit(
        self, rows: np.ndarray, *, refuse: Container[str] = (), grippers: bool = True, first: int = 0
    ) -> dict[str, np.ndarray]:
        """Keep `rows` within the limits, in place; masks of what broke them, by rule.

        refuse: rules that raise instead. grippers: whether they stay between open and closed. first: the number of
        the first row, as errors tell it. Raises: Breach that names the axis, the step and the value.
        """
        found: dict[str, np.ndarray] = {}
        outside = (rows < self.low - self._slack) | (rows > self.high + self._slack)
        if outside.any():
            found["limit"] = outside
            if "limit" in refuse:
                step, axis = np.argwhere(outside)[0]
                low, high = self.stated[:, axis]
                raise Breach(
                    "limit",
                    f"action axis {self.names[axis]!r} is {rows[step, axis]:.5g} at step {first + step}, outside "
                    f"{low:.5g}..{high:.5g} {self.units[axis]}",
                    found,
                )
        for axis, (opened, closed) in zip(self.grippers if grippers else (), self._open_closed):
            slack = GRIPPER_SLACK * abs(closed - opened)
            wrong = (rows[:, axis] < min(opened, closed) - slack) | (rows[:, axis] > max(opened, closed) + slack)
            if not wrong.any():
                continue
            found.setdefault("gripper", np.zeros(rows.shape, bool))[:, axis] = wrong
            if "gripper" in refuse:
                step = int(np.argmax(wrong))
                raise Breach(
                    "gripper",
                    f"the gripper {self.names[axis]!r} is {rows[step, axis]:.5g} at step {first + step}; open is "
                    f"{opened:g} and closed {closed:g}: check its sign and scale",
                    found,
                )
        low, high = (self._inner_low, self._inner_high) if grippers else (self.low, self.high)
        np.clip(rows, low, high, out=rows)
        return found

    def limit_steps(
        self, rows: np.ndarray, previous: np.ndarray | None, *, refuse: bool = False, first: int = 0
    ) -> dict[str, np.ndarray]:
        """Keep each axis' change per control step within `max_step`, in place; the mask of what was more, if any.

        previous: (axes,), the action before or where the robot stands; NaN for an axis of which it is not known.
        Raises: Breach where that is refused, and for a robot that stands so far outside of its limits that one step
        cannot take it back.
        """
        if self.max_step is None or not len(rows):
            return {}
        whole = rows if previous is None else np.concatenate([previous[None], rows])
        if not _too_far(whole[:-1], whole[1:], self.max_step).any():
            return {}
        found = {"rate": np.zeros(rows.shape, bool)}
        for i, row in enumerate(rows):
            if previous is not None:
                over = found["rate"][i] = _too_far(previous, row, self.max_step)
                if over.any() and refuse:
                    axis = int(np.argmax(over))
                    raise Breach(
                        "rate",
                        f"action axis {self.names[axis]!r} moves from {previous[axis]:.5g} to {row[axis]:.5g} at step "
                        f"{first + i}; its max_step is {self.max_step[axis]:.5g} {self.units[axis]} per control step",
                        found,
                    )
                np.clip(row, previous - self.max_step, previous + self.max_step, out=row, where=over)
                beyond = (row < self.low) | (row > self.high)
                if beyond.any():
                    axis = int(np.argmax(beyond))
                    low, high = self.stated[:, axis]
                    raise Breach(
                        "rate",
                        f"action axis {self.names[axis]!r} stands at {previous[axis]:.5g}, outside of its limits "
                        f"{low:.5g}..{high:.5g} by more than its max_step {self.max_step[axis]:.5g} "
                        f"{self.units[axis]}: move it back by hand",
                        found,
                    )
            previous = row
        return found

    @property
    def has_place(self) -> bool:
        """Whether its state says where an axis of it stands."""
        return bool(self._sensed)

    def stands(self, state: Any) -> np.ndarray:
        """Where an absolute robot that stands still is, as an action (axes,): of each axis that its proprio has under
        the same name and unit. NaN for the others, and for grippers: closed on something they are not where they were
        sent."""
        at = np.full(len(self.names), np.nan, np.float32)
        if self._sensed and np.shape(state) == (self.state_width,):
            for axis, sensed in self._sensed.items():
                at[axis] = state[sensed]
        return at


def resting_action(contract: dict[str, Any], state: Any) -> np.ndarray:
    """What a robot that nobody has commanded yet does, float32 (axes,): it stands still, its grippers open.

    state: of an observation; an axis of an absolute robot that it lacks is sent the middle of its limits.
    """
    rules = Rules(contract)
    middle = (rules.low + rules.high) / 2 if holds_position(contract) else np.zeros_like(rules.low)
    at = rules.stands(state)
    action = np.where(np.isnan(at), middle, at).astype(np.float32)
    for axis, gripper in zip(rules.grippers, grippers_of(contract)):
        action[axis] = gripper["open"]
    rules.limit(action[None])
    return action


def _too_far(before: np.ndarray, after: np.ndarray, max_step: np.ndarray) -> np.ndarray:
    size = np.maximum(np.abs(before), np.abs(after))
    return np.abs(after - before) > max_step * (1 + TOLERANCE) + ROUNDING * size  # NaN is not


def _smallest(stated: Any, given: Any, names: list[str]) -> np.ndarray | None:
    """float32 (axes,): the contract's `max_step`, or the given one where that is less."""
    contract = None if stated is None else np.asarray(stated, np.float32)
    if given is None:
        return contract
    try:
        less = np.asarray(given, np.float32)
    except (TypeError, ValueError, OverflowError):
        less = np.zeros(())
    if less.shape not in ((), (len(names),)) or not (np.isfinite(less) & (less > 0)).all():
        raise ContractError(f"max_step is {given!r}; give a positive number, or one for each of {names}")
    less = np.broadcast_to(less, (len(names),))
    return less if contract is None else np.minimum(less, contract)


def _sensed(embodiment: dict[str, Any], grippers: list[int]) -> dict[int, int]:
    """The axes of an absolute robot's action that its state has as well, by name and unit: axis -> index of it."""
    proprio, action = embodiment.get("proprio"), embodiment["action"]
    if not proprio or not holds_position(embodiment):
        return {}
    place = {key: i for i, key in enumerate(zip(proprio["names"], proprio["units"]))}
    axes = enumerate(zip(action["names"], action["units"]))
    return {axis: place[key] for axis, key in axes if key in place and axis not in grippers}
