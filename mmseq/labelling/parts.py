"""Long episodes in parts: an hour of video fits into no memory, and no writer's queue.

source = Parts(open_source("videos"), most=4096)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np

from mmseq.data.reader import EpisodeSource
from mmseq.embodiment import Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode, Stream


class Parts:
    """A source whose episodes of more than `most` steps come in parts of about the same length, as episodes.

    A part has the episode's id with `#1`, `#2`, ..., its cameras, which `frames` reads, the texts of its steps, and no
    vectors. The outcome is known of the last part alone. Shorter episodes stay as they are.
    """

    def __init__(self, source: EpisodeSource, most: int):
        self._source = source
        self._parts: list[tuple[int, int, int, int]] = []  # episode, number of the part from 1, start, stop
        for index in range(len(source)):
            length = len(source[index])
            cuts = np.linspace(0, length, -(-length // most) + 1).astype(int).tolist()
            self._parts += [(index, n, a, b) for n, (a, b) in enumerate(pairwise(cuts), start=1)]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Episode:
        whole, number, start, stop = self._parts[index]
        episode = self._source[whole]
        if stop - start == len(episode):
            return episode
        cameras = [f"{IMAGE_PREFIX}{camera}" for camera in episode.cameras]
        times = np.arange(stop - start) / episode.rate_hz
        streams = {
            name: Stream(lambda name=name: np.stack(list(self.frames(index, name.removeprefix(IMAGE_PREFIX)))), times)
            for name in cameras
        }
        spans = [
            replace(span, start=max(span.start, start) - start, stop=min(span.stop, stop) - start)
            for span in episode.spans
            if span.start < stop and span.stop > start
        ]
        success = episode.success if stop == len(episode) else None
        return replace(episode, id=f"{episode.id}#{number}", streams=streams, spans=spans, success=success)

    def embodiment(self) -> Embodiment | None:
        return self._source.embodiment()

    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]:
        """The frames of a part, uint8 (H, W, 3). Those before it are decoded too."""
        whole, _, start, stop = self._parts[index]
        return islice(self._source.frames(whole, camera), start, stop)
