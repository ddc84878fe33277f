"""Retargeting: the actions with which a robot would move as a hand did, from where the hand was.

    retargeting = Retargeting.fit(robot_episodes, contract)
    actions = retargeting.actions(poses)      # (steps, state axes) in the robot's own units -> (steps, action axes)

A tracker says where a hand is, and not what a robot would be told to go there. The robot's own episodes say how its
state follows from its actions; the inverse of that, linear in the state and its changes a few steps around, is fitted to
them by least squares. On Meta-World's arm it explains three quarters of the variance of an expert's actions (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.episode import Episode, Stream
from mmseq.errors import DataError
from mmseq.labelling.training import PREDICTED, switches_of

AROUND = (-2, 4)  # steps whose changes are looked at: an arm lags behind what it is told
RIDGE = 1e-6

_ACTION, _STATE = PREDICTED


@dataclass(frozen=True)
class Retargeting:
    """weights: float64 (features, action axes). switches: axes of the action that have two values, with these."""

    weights: np.ndarray
    contract: Embodiment
    switches: dict[int, tuple[float, float]]

    @classmethod
    def fit(cls, episodes: Iterable[Episode], contract: Embodiment) -> Retargeting:
        """Raises: DataError without an episode that has both vectors."""
        able = [e for e in episodes if all(name in e for name in PREDICTED)]
        if not able:
            raise DataError(f"no episode of {contract.name!r} has {' and '.join(PREDICTED)}")
        seen = np.concatenate([_features(e[_STATE]) for e in able])
        told = np.concatenate([e[_ACTION] for e in able]).astype(np.float64)
        weights = np.linalg.solve(seen.T @ seen + RIDGE * len(seen) * np.eye(seen.shape[1]), seen.T @ told)
        return cls(weights, contract, switches_of(told))

    def actions(self, states: np.ndarray) -> np.ndarray:
        """States (steps, axes) -> float32 (steps, action axes), within the limits of the contract."""
        axes = self.contract.vectors[_ACTION]
        found = np.clip(_features(states) @ self.weights, axes.minimum, axes.maximum)
        for axis, (low, high) in self.switches.items():
            found[:, axis] = np.where(found[:, axis] > (low + high) / 2, high, low)
        return found.astype(np.float32)

    def retargeted(self, episode: Episode) -> Episode:
        """An episode with a state, and the actions of the robot that follow from it."""
        stream = Stream(values=self.actions(episode[_STATE]), times=episode.streams[_STATE].times)
        return replace(episode, streams={**episode.streams, _ACTION: stream})


def _features(states: np.ndarray) -> np.ndarray:
    """(steps, axes) -> float64 (steps, 1 + axes + axes x changes around): at the ends nothing moves."""
    states = np.asarray(states, dtype=np.float64)
    first, stop = AROUND
    at = np.clip(np.arange(len(states))[:, None] + np.arange(first, stop + 1), 0, len(states) - 1)
    changes = np.diff(states[at], axis=1).reshape(len(states), -1)
    return np.concatenate([np.ones((len(states), 1)), states, changes], axis=1)
