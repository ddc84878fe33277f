"""Another reader's episodes with what their files do not say, and their owner does: exchanged colours, success."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmseq.episode import IMAGE_PREFIX, Episode, Stream
from mmseq.errors import DataError, did_you_mean


class ChangedReader:
    """A reader whose episodes go through `change`."""

    def __init__(self, source: Any):
        self._source = source

    def __getattr__(self, name: str) -> Any:  # notes and whatever else a reader has
        if name.startswith("_"):  # also while it is unpickled, when there is no reader yet
            raise AttributeError(name)
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Episode:
        return self.change(self._source[index])

    def change(self, episode: Episode) -> Episode:
        return episode

    def embodiment(self) -> Any:
        return self._source.embodiment()

    def frames(self, index: int, camera: str, *args: Any, **options: Any) -> Iterator[np.ndarray]:
        return self._source.frames(index, camera, *args, **options)


class Successful(ChangedReader):
    """Episodes that say nothing of their outcome are demonstrations, which reach their goal."""

    def change(self, episode: Episode) -> Episode:
        episode.success = True if episode.success is None else episode.success
        return episode


class SwappedColours(ChangedReader):
    """Red and blue are exchanged for some cameras. Raises: DataError for an unknown one."""

    def __init__(self, source: Any, cameras: Sequence[str]):
        super().__init__(source)
        self._swapped = tuple(cameras)
        robot = source.embodiment()
        known = [c.name for c in robot.cameras] if robot else source[0].cameras if len(source) else []
        for camera in self._swapped:
            if camera not in known:
                raise DataError(f"swap_colours names the camera {camera!r}: {did_you_mean(camera, known)}")

    def change(self, episode: Episode) -> Episode:
        for camera in self._swapped:
            stream = episode.streams.get(f"{IMAGE_PREFIX}{camera}")
            if stream is not None:
                stored = Stream(stream.values, stream.times)
                stream.values = lambda stored=stored: _exchanged(stored.load())
        return episode

    def frames(self, index: int, camera: str, *args: Any, **options: Any) -> Iterator[np.ndarray]:
        frames = super().frames(index, camera, *args, **options)
        return map(_exchanged, frames) if camera in self._swapped else frames


def _exchanged(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[..., ::-1])
