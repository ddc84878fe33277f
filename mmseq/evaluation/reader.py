"""Reading the robot's state off predicted pictures: what a predicted frame is for is to act on it.

A reader is a small network of single pictures that is taught by true frames of the training episodes. What it reads in
a predicted frame is compared with where the robot was: a picture that lost the robot, or draws it elsewhere, loses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.evaluation.measures import spans
from mmseq.labelling.network import LabellerNetwork
from mmseq.labelling.training import PREDICTED, LabellerConfig, teach

STEPS = 500  # of a reader's training
MOST_BYTES = 1 << 30  # of frames that a reader is taught with: 87,000 of 64 x 64, more than its training draws
_, STATE = PREDICTED  # the stream that is read
WITHIN = 0.1  # of each axis's range: a state that is read so near to the true one is found


class Readers:
    """A reader for each robot and camera, taught when it is first asked for.

    episodes: for training; their vectors must lie within the robots' limits. fit: brings frames, uint8 (N, H, W, 3), to
    the size of predicted ones.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        robots: Mapping[str, Embodiment],
        fit: Callable[[np.ndarray], np.ndarray],
        *,
        steps: int = STEPS,
        seed: int = 0,
    ):
        self._episodes, self._robots, self._fit = episodes, robots, fit
        self._config = LabellerConfig(around=[0], steps=steps, seed=seed, shift_pixels=1)
        self._taught: dict[tuple[str, str], LabellerNetwork | None] = {}

    def of(self, robot: str, camera: str) -> LabellerNetwork | None:
        """What reads the state of a robot off pictures of a camera; None where no training episode shows it."""
        key = (robot, camera)
        if key not in self._taught:
            self._taught[key] = self._teach(robot, camera)
        return self._taught[key]

    def _teach(self, robot: str, camera: str) -> LabellerNetwork | None:
        name = f"{IMAGE_PREFIX}{camera}"
        able = [e for e in self._episodes if e.embodiment == robot and all(part in e for part in (name, *PREDICTED))]
        if not able:
            return None
        contract = self._robots[robot]
        if any(part not in contract.vectors for part in PREDICTED):
            return None
        picture = self._fit(_frames(able[0], name)[:1])
        every = -(-sum(map(len, able)) * picture.nbytes // MOST_BYTES)
        chosen = [self._every(every, e, name) for e in able]
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # whoever evaluates keeps the generator's state
            return teach(chosen, camera, contract, self._config)

    def _every(self, every: int, episode: Episode, name: str) -> Episode:
        """Each step of an episode whose number `every` divides, with what a reader is taught with."""
        arrays: dict[str, Any] = {part: episode[part][::every] for part in PREDICTED}
        arrays[name] = self._fit(_frames(episode, name)[::every])
        return Episode.from_arrays(episode.id, episode.rate_hz / every, arrays, embodiment=episode.embodiment)


def _frames(episode: Episode, name: str) -> np.ndarray:
    """Frames uint8 (steps, H, W, 3) that the episode does not keep: all of a dataset's do not fit into memory."""
    return replace(episode.streams[name]).load()


def found(true: np.ndarray, read: np.ndarray, axes: Axes) -> bool:
    """Whether a state (axes,) that was read lies within `WITHIN` of the range of every axis of the true one."""
    return bool((np.abs(true - read) <= WITHIN * spans(axes)).all())
