"""Retargeting: the actions with which a robot would move as a hand did, from where the hand was.

    retargeting = Retargeting.fit(robot_episodes, contract)
    actions = retargeting.actions(poses)      # (steps, state axes) in the robot's own units -> (steps, action axes)

A tracker says where a hand is, and not what a robot would be told to go there. The robot's own episodes say how its
state follows from its actions; the inverse of that, linear in the state and its changes a few steps around, is fitted
to them by least squares. On Meta-World's arm, fitted to demonstrations and play, it explains three quarters of the
variance of an expert's motions in other tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.episode import Episode, Stream
from mmseq.errors import DataError
from mmseq.labelling.network import set_switches
from mmseq.labelling.training import PREDICTED, switches_of

AROUND = (-2, 4)  # steps whose changes are looked at: an arm lags behind what it is told
RIDGE = 1e-6  # what is added to the mean square of each feature, in its unit: small beside a centimetre a step

_ACTION, _STATE = PREDICTED


@dataclass(frozen=True)
class Retargeting:
    """A fitted map. weights: float64 (features, action axes). switches: axes of the action that have two values, with
    these."""

    weights: np.ndarray
    contract: Embodiment
    switches: dict[int, tuple[float, float]]

    @classmethod
    def fit(cls, episodes: Iterable[Episode], contract: Embodiment) -> Retargeting:
        """From the episodes of the robot of a contract that have both vectors; others are left out.

        Raises: DataError without any, with too few steps or another rate; EpisodeError for a value beyond the limits.
        """
        able = [e for e in episodes if e.embodiment == contract.name and all(name in e for name in PREDICTED)]
        if not able or any(name not in contract.vectors for name in PREDICTED):
            raise DataError(
                f"no episode of {contract.name!r} has {' and '.join(PREDICTED)}", fix="give demonstrations or play"
            )
        for episode in able:
            _require_rate(episode, contract)
        check = lambda e, name: contract.vectors[name].check(e[name], what=name, where=f"episode {e.id!r}")
        seen = np.concatenate([_features(check(e, _STATE)) for e in able])
        told = np.concatenate([check(e, _ACTION) for e in able]).astype(np.float64)
        steps, numbers = seen.shape
        if steps < numbers:
            raise DataError(
                f"{steps} steps of {contract.name!r} are too few to fit {numbers} numbers for each axis of its actions",
                fix="give more episodes: a few minutes of demonstrations or play",
            )
        weights = np.linalg.solve(seen.T @ seen + RIDGE * steps * np.eye(numbers), seen.T @ told)
        return cls(weights, contract, switches_of(told))

    def actions(self, states: np.ndarray) -> np.ndarray:
        """States (steps, axes) -> float32 (steps, action axes), within the limits of the contract.

        Raises: DataError for states of another shape, or that are not finite.
        """
        states, width = np.asarray(states, dtype=np.float64), len(self.contract.vectors[_STATE])
        if states.ndim != 2 or len(states) == 0 or states.shape[1] != width:
            raise DataError(f"states have shape {states.shape}, {self.contract.name!r} has (steps, {width})")
        lost = np.flatnonzero(~np.isfinite(states).all(axis=1))
        if len(lost):
            raise DataError(
                f"the state is not finite at step {lost[0]}, and at {len(lost)} of {len(states)} in all",
                fix="cut the episode where the hand was lost, or fill the gap",
            )
        axes = self.contract.vectors[_ACTION]
        found = np.clip(_features(states) @ self.weights, axes.minimum, axes.maximum)
        set_switches(found, self.switches)
        return found.astype(np.float32)

    def retargeted(self, episode: Episode) -> Episode:
        """An episode with a state in the robot's units, as one of the robot, with the actions that follow from it.

        Raises: EpisodeError without a state; DataError for one that cannot be, or another rate.
        """
        _require_rate(episode, self.contract)
        stream = Stream(values=self.actions(episode[_STATE]), times=episode.streams[_STATE].times)
        return replace(episode, streams={**episode.streams, _ACTION: stream}, embodiment=self.contract.name)


def _require_rate(episode: Episode, contract: Embodiment) -> None:
    if abs(episode.rate_hz - contract.rate_hz) > 1e-6:  # a step would be another change
        raise DataError(
            f"episode {episode.id!r} has {episode.rate_hz:g} steps per second, {contract.name!r} has "
            f"{contract.rate_hz:g}",
            fix=f"import it with --rate-hz {contract.rate_hz:g}",
        )


def _features(states: np.ndarray) -> np.ndarray:
    """(steps, axes) -> float64 (steps, 1 + axes + axes x changes around): at the ends nothing moves."""
    states = states.astype(np.float64)
    first, stop = AROUND
    at = np.clip(np.arange(len(states))[:, None] + np.arange(first, stop + 1), 0, len(states) - 1)
    changes = np.diff(states[at], axis=1).reshape(len(states), -1)
    return np.concatenate([np.ones((len(states), 1)), states, changes], axis=1)
