"""Readers: what each offers, and what those of robots' datasets share: columns that fill streams, bad episodes, the
contract, texts that change on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mmseq.data.mapping import Column, Streams, describe, fill, kind_of, left_out
from mmseq.embodiment import Axes, Camera, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode, TextSpan
from mmseq.errors import MMSeqError
from mmseq.statistics import remarks

type Phrasings = list[tuple[str, ...]]  # of each step, () for none


@runtime_checkable
class EpisodeSource(Protocol):
    """What every reader offers: a number of episodes, each one lazily, and its frames one at a time.

    What is wrong with an episode is raised where that is opened, and `embodiment()` is of those that can be read. A
    reader may also have `notes` (what is odd, and what it leaves out), `left_out` (the columns that nothing uses, with
    the entry of a map that would), and `check(index)`, which finds fault with pictures without decoding them.

    A reader is made with (path, rate_hz=..., embodiment=..., map=...); that of a plug-in says with a static method
    `detects(path)` which paths it reads.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Episode: ...
    def embodiment(self) -> Embodiment | None: ...
    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]: ...


class DatasetReader(EpisodeSource):
    """A robot's dataset on disk. `streams` says which columns fill which stream.

    embodiment: the contract that the owner gives.
    """

    rate_hz: float
    streams: Streams
    left_out: dict[str, str]

    def __init__(self, path: str | Path, embodiment: Embodiment | None):
        self.path = Path(path)
        self.notes: list[str] = []
        self._given = embodiment
        self._embodiment: Embodiment | None = None

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    @property
    def cameras(self) -> list[str]:
        return [s.removeprefix(IMAGE_PREFIX) for s in self.streams if s.startswith(IMAGE_PREFIX)]

    @property
    def vectors(self) -> list[str]:
        """The vector streams."""
        return [stream for stream in self.streams if kind_of(stream) == "vector"]

    def embodiment(self) -> Embodiment:
        """The contract of the robot: the given one, else one inferred from every episode that can be read.

        Raises: EmbodimentError when the dataset contradicts the given one.
        """
        if self._embodiment is None:
            self._embodiment = self._hold_to(self._given) if self._given is not None else self._infer()
        return self._embodiment

    def _hold_to(self, given: Embodiment) -> Embodiment:
        return given

    def _infer(self) -> Embodiment:
        raise NotImplementedError

    def _fill(self, found: Streams, given: Streams, columns: Mapping[str, Column], used: Sequence[str] = ()) -> None:
        """Settle what fills each stream. used: columns that are of use without filling one. Raises: DataError."""
        self.streams = fill(found, given, columns, str(self.path))
        unused = left_out(columns, self.streams)
        self.left_out = {name: advice for name, advice in unused.items() if name not in used}
        self.notes += describe(columns, self.left_out)

    def _readable[T](self, of: Callable[[int], T], indices: Iterable[int] | None = None) -> Iterator[T]:
        """What `of` gives for each episode, those left out of which that cannot be read.

        Raises: what was wrong with the first where it can be read of none.
        """
        problem, good = None, False
        for index in range(len(self)) if indices is None else indices:
            try:
                found = of(index)
            except MMSeqError as error:
                problem = problem or error
            else:
                good = True
                yield found
        if problem is not None and not good:
            raise problem

    def _stack(self, index: int, camera: str) -> np.ndarray:
        return np.stack(list(self.frames(index, camera)))

    def _axes(
        self,
        stream: str,
        found: Sequence[tuple[str, np.ndarray]],
        names: Sequence[str] | None,
        units: Sequence[str] | None = None,
    ) -> Axes:
        """Axes with the statistics of episodes; what is odd about their range is noted.

        found: of each episode, what to call it and its values (steps, axes).
        """
        values = np.concatenate([values for _, values in found])
        axes = Axes.from_values(values, names, units)
        self.notes += remarks(found, axes.names, stream)
        return axes

    def _contract(self, name: str, cameras: Iterable[Camera], axes: dict[str, Axes], form: str) -> Embodiment:
        return Embodiment(
            name=name,
            rate_hz=self.rate_hz,
            cameras=tuple(cameras),
            proprio=axes.pop("proprio", None),
            action=axes.pop("action", None),
            action_form=form,
            streams=axes,
        )


def by_step(stream: str, phrasings: Phrasings) -> tuple[list[str], list[TextSpan]]:
    """What holds for the whole episode, or the spans of a text that changes."""
    cuts = [0, *(i for i in range(1, len(phrasings)) if phrasings[i] != phrasings[i - 1]), len(phrasings)]
    if len(cuts) == 2:
        return list(phrasings[0]), []
    return [], [TextSpan(stream, a, b, phrasings[a]) for a, b in pairwise(cuts) if phrasings[a]]
