"""Where a robot that executes nothing stands: from there its next action is limited."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mmseq_client.gate import ActionGate

log = logging.getLogger("mmseq_client")

_MOST_LAG = 10  # largest steps


class Stance:
    """Of one robot. What it was commanded last does not say where it stands: somebody may have moved it by hand since.
    Nor does its state alone: an arm that sags or lags stands beside its command, and one that is commanded to where it
    is seen sags anew.

    So its last command counts, unless it stands farther beside that, by more than `max_step`, than when it moved;
    but one that stood far beside it then had no torque, and is where it is seen. Only absolute robots have such a
    place, and only axes that the state has under the same name and unit. A gripper has none: closed on something it
    is not where it was sent.
    """

    def __init__(self, gate: ActionGate):
        self._rules, axes = gate.rules, len(gate.rules.names)
        self._step = np.zeros(axes, np.float32) if gate.rules.max_step is None else gate.rules.max_step
        self._lag = np.zeros(axes, np.float32)  # beside its command, when it moved
        self._says = gate.rules.has_place and gate.rules.max_step is not None

    def observed(self, observation: dict[str, Any]) -> np.ndarray:
        """Its state as an action, float32 (axes,), NaN for what is not known."""
        width = self._rules.state_width
        try:
            state = np.asarray(observation.get("observation.state"), np.float32)
        except (TypeError, ValueError):
            state = np.zeros(0, np.float32)  # the server says what is wrong with it
        if state.shape != (width,) and self._says:
            self._says = False
            log.warning("no 'observation.state' of %d axes, so max_step does not limit the first action", width)
        return self._rules.stands(state)

    def moves(self, observation: dict[str, Any], last: np.ndarray) -> None:
        """It is seen while it executes; last: what it was commanded then, (axes,)."""
        lag = np.nan_to_num(np.abs(self.observed(observation) - last))
        self._lag = np.minimum(lag, _MOST_LAG * self._step)

    def stands(self, observation: dict[str, Any], last: np.ndarray | None) -> np.ndarray:
        """Where it stands, float32 (axes,), NaN for what is not known. last: its last command, if there was one."""
        at = self.observed(observation)
        if last is None:
            return at
        moved = np.abs(at - last) > self._lag + self._step  # NaN is not
        return np.where(moved, at, last)
