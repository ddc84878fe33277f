"""The last check before an action reaches the motors: everything that `rules` says, and its age."""

from __future__ import annotations

from collections import Counter
from typing import Any, Callable

import numpy as np

from mmseq_client.errors import ContractError, UnsafeActionError
from mmseq_client.rules import Breach, Rules

_REASONS = {"limit": "out_of_range", "gripper": "out_of_range", "rate": "max_step"}  # in `counts`, else the rule's name


class ActionGate:
    """Checks chunks when they arrive and each action before it leaves, against the robot's contract.

    out_of_range: `clamp` limits an axis to minimum..maximum (a gripper to open..closed) and its change from one
    control step to the next to `max_step`, where the contract has it or it is given (a number, or one by axis: only to
    allow less); `refuse` withholds the chunk instead.
    counts: what it has limited and withheld. Raises: ContractError for a contract without actions.
    """

    def __init__(self, embodiment: dict[str, Any], out_of_range: str = "clamp", max_step: Any = None):
        if out_of_range not in ("clamp", "refuse"):
            raise ContractError(f"out_of_range is {out_of_range!r}; use clamp or refuse")
        self.rules = Rules(embodiment, max_step=max_step)
        self.refuses = out_of_range == "refuse"
        self.counts: Counter[str] = Counter()

    def check_chunk(self, actions: Any, horizon: int, clamp: bool = False) -> np.ndarray:
        """A reply's actions as float32 (horizon, axes) within the limits. clamp: even if it is configured to refuse.

        Raises: UnsafeActionError that names the axis, the step and the value.
        """
        checked = self._checked(lambda: self.rules.well_formed(actions, horizon))
        refuse = ("limit", "gripper") if self.refuses and not clamp else ()
        found = self._checked(lambda: self.rules.limit(checked, refuse=refuse))
        self._count("clamped_range", found)
        return checked

    def limit_steps(self, actions: np.ndarray, previous: np.ndarray | None, clamp: bool = False) -> None:
        """Keep each axis' change per control step within `max_step`, from `previous` (axes,) on; in place.

        previous: the action before, or where the robot stands; NaN for an axis of which it is not known. clamp: even
        if it is configured to refuse, for a robot that stands: what it sees lags behind what it is to do.
        Raises: UnsafeActionError when it is configured to refuse, and for a robot that stands so far outside of its
        limits that one step cannot take it back.
        """
        refuse = self.refuses and not clamp
        self._count("clamped_step", self._checked(lambda: self.rules.limit_steps(actions, previous, refuse=refuse)))

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

    def _count(self, name: str, found: dict[str, np.ndarray]) -> None:
        if found:
            self.counts[name] += int(np.logical_or.reduce(list(found.values())).sum())

    def _checked(self, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except Breach as breach:
            self._withhold(_REASONS.get(breach.rule, breach.rule), str(breach))

    def _withhold(self, reason: str, what: str) -> None:
        self.counts[reason] += 1
        raise UnsafeActionError(f"the gate withheld it ({reason}): {what}")
