"""Where a robot that executes nothing stands: from there its next action is limited."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mmseq_client.contract import holds_position
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

    def __init__(self, embodiment: dict[str, Any], gate: ActionGate):
        self._axes = len(gate.names)
        self._step = np.zeros(self._axes, np.float32) if gate.max_step is None else gate.max_step
        self._sensed = _sensed(embodiment) if holds_position(embodiment) else {}
        self._sensed.pop(gate.gripper, None)
        self._width = len((embodiment.get("proprio") or {}).get("names", ()))
        self._lag = np.zeros(self._axes, np.float32)  # beside its command, when it moved
        self._says = bool(self._sensed) and gate.max_step is not None

    def observed(self, observation: dict[str, Any]) -> np.ndarray:
        """Its state as an action, float32 (axes,), NaN for what is not known."""
        at = np.full(self._axes, np.nan, np.float32)
        try:
            state = np.asarray(observation.get("observation.state"), np.float32)
        except (TypeError, ValueError):
            state = at[:0]  # the server says what is wrong with it
        if state.shape == (self._width,):
            for axis, sensed in self._sensed.items():
                at[axis] = state[sensed]
        elif self._says:
            self._says = False
            log.warning("no 'observation.state' of %d axes, so max_step does not limit the first action", self._width)
        return at

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


def _sensed(embodiment: dict[str, Any]) -> dict[int | None, int]:
    """The axes of an action that the state has as well, by name and unit: axis -> index in the state."""
    proprio = embodiment.get("proprio")
    if not proprio:
        return {}
    place = {key: i for i, key in enumerate(zip(proprio["names"], proprio["units"]))}
    axes = enumerate(zip(embodiment["action"]["names"], embodiment["action"]["units"]))
    return {axis: place[key] for axis, key in axes if key in place}
