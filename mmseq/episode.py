"""Episode: what happened once, as named streams with their times. Any stream may be missing.

Step `t` is one tick of the episode's clock: the images and the proprio observed at `t`, and the
action executed from `t` to `t + 1`. Streams on disk are read when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.errors import EpisodeError, did_you_mean
from mmseq.reading import AS_IT_IS, Reading
from mmseq.streams import IMAGE_PREFIX, TEXT, of_kind


@dataclass
class Stream:
    """Values with a leading time axis, and the time of each in seconds since the episode began.

    values: an array (steps, ...) or a function that returns one, called at most once.
    """

    values: np.ndarray | Callable[[], np.ndarray]
    times: np.ndarray

    def load(self) -> np.ndarray:
        if callable(self.values):
            self.values = np.asarray(self.values())
        if len(self.values) != len(self.times):
            raise EpisodeError(f"a stream holds {len(self.values)} values for {len(self.times)} times")
        return self.values

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class TextSpan:
    """Phrasings of a text stream (`text`, `plan`, ...) that hold for steps start .. stop - 1 of an episode only."""

    stream: str
    start: int
    stop: int
    texts: tuple[str, ...]


@dataclass
class Episode:
    """One episode.

    streams: `image.<camera>` uint8 (steps, H, W, 3) RGB; `proprio` float32 (steps, axes); `action`
    float32 (steps, axes). texts: the instruction or caption, in one or more phrasings; plans: ways
    to write the steps towards it. spans: what holds for some steps only, in place of these there: an episode may hold
    several tasks, and subtasks. embodiment: the name of the robot, or None for video without one. success: whether it
    reached its goal; None when nobody knows.
    """

    id: str
    rate_hz: float
    streams: dict[str, Stream]
    texts: list[str] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    spans: list[TextSpan] = field(default_factory=list)
    embodiment: str | None = None
    success: bool | None = None
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.streams:
            raise EpisodeError(f"episode {self.id!r} has no streams")
        lengths = {name: len(stream) for name, stream in self.streams.items()}
        if min(lengths.values()) == 0:
            raise EpisodeError(f"episode {self.id!r} has an empty stream: {lengths}")
        for span in self.spans:
            if not 0 <= span.start < span.stop or not span.texts:
                raise EpisodeError(f"episode {self.id!r}: {span} holds no text or no step")
        if len(set(lengths.values())) > 1:
            raise EpisodeError(f"episode {self.id!r}: streams differ in length: {lengths}", fix="resample them first")

    @classmethod
    def from_arrays(
        cls,
        id: str,
        rate_hz: float,
        arrays: dict[str, np.ndarray | Callable[[], np.ndarray]],
        length: int | None = None,
        **fields,
    ) -> Episode:
        """An episode whose streams share one clock of `rate_hz` steps per second.

        length: the number of steps; needed when every array is a function.
        """
        if length is None:
            sizes = [len(a) for a in arrays.values() if not callable(a)]
            if not sizes:
                raise EpisodeError(f"episode {id!r}: the number of steps is unknown", fix="pass length=")
            length = sizes[0]
        times = np.arange(length, dtype=np.float64) / rate_hz
        streams = {name: Stream(a, times if callable(a) else np.arange(len(a)) / rate_hz) for name, a in arrays.items()}
        return cls(id=id, rate_hz=rate_hz, streams=streams, **fields)

    @classmethod
    def from_lerobot(cls, path: str | Path, index: int = 0, reading: Reading = AS_IT_IS) -> Episode:
        """Episode `index` of the LeRobot dataset at `path`."""
        from mmseq.data.importing import open_episodes

        return open_episodes(path, reading, format="lerobot")[index]

    def __len__(self) -> int:
        return len(next(iter(self.streams.values())))

    def texts_of(self, stream: str, step: int = 0) -> list[str]:
        """The phrasings that fill a text stream at a step; [] where there are none."""
        for span in self.spans:
            if span.stream == stream and span.start <= step < span.stop:
                return list(span.texts)
        if stream == "text":
            return list(self.texts)
        if stream == "plan":
            return list(self.plans)
        return [str(self.metadata[stream])] if stream in self.metadata else []

    def pieces(self) -> list[tuple[int, int, dict[str, list[str]]]]:
        """The episode cut where texts change: first step, one past the last, phrasings by text stream."""
        edges = {edge for span in self.spans for edge in (span.start, span.stop) if 0 < edge < len(self)}
        cuts = sorted({0, len(self), *edges})
        of = lambda step: {name: texts for name in of_kind(TEXT) if (texts := self.texts_of(name, step))}
        return [(start, stop, of(start)) for start, stop in pairwise(cuts)]

    @property
    def cameras(self) -> list[str]:
        return [name.removeprefix(IMAGE_PREFIX) for name in self.streams if name.startswith(IMAGE_PREFIX)]

    def __getitem__(self, name: str) -> np.ndarray:
        """The values of a stream, (steps, ...). Raises: EpisodeError for an unknown name."""
        if name not in self.streams:
            raise EpisodeError(f"episode {self.id!r} has no stream {name!r}: {did_you_mean(name, self.streams)}")
        return self.streams[name].load()

    def __contains__(self, name: str) -> bool:
        return name in self.streams
