"""Moments: at which steps of which episodes a task can be filled, in an order that is a function of the seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmseq.data.tokens import EpisodePlan, Kind
from mmseq.layout import sequence_length
from mmseq.sequence import SequenceBuilder
from mmseq.streams import lacking
from mmseq.tasks import Task


@dataclass(frozen=True)
class Sample:
    """One sample before it is built: what to read and which task to fill.

    offsets: in steps, one for each range of offsets of the task. visible: steps of its chunk that later tokens of the
    chunk see; None: all (`SequenceBuilder.build`).
    """

    moments: int
    task: int
    source: str
    episode: int
    now: int
    variant: int
    length: int
    offsets: tuple[int, ...] = ()
    visible: int | None = None


class Moments:
    """All moments of one task in one source, in an order that is permuted afresh each epoch.

    None when no episode holds the task whole; else those too at which a final chunk of actions ends after its episode.
    An episode whose texts change on the way counts as several pieces, each with the moments that lie in it.
    """

    def __init__(
        self,
        index: int,
        task_index: int,
        task: Task,
        source: str,
        plan: EpisodePlan,
        episodes: Sequence[int],
        builder: SequenceBuilder,
        parallel: float = 0.0,
    ):
        self.parallel = parallel
        self.index, self.task_index, self.task, self.source = index, task_index, task, source
        self._builder, self._plan = builder, plan
        pieces = plan.pieces_of(episodes)
        kinds, which = np.unique(plan.kind_ids[plan.first[pieces]], return_inverse=True)
        fits = np.array([not task.missing(self._visible(plan.kinds[k])) for k in kinds], dtype=bool)[which]

        def edge(name: str, *, pad: bool) -> np.ndarray:
            """The `start` of each episode's moments, or their `stop`, counted from its end."""
            of_kind = [getattr(task.moments(0, plan.kinds[k].rate_hz, pad=pad), name) for k in kinds]
            return np.array(of_kind, dtype=np.int64)[which]

        lengths, starts, stops = plan.lengths[plan.episodes[pieces]], plan.starts[pieces], plan.stops[pieces]
        first = np.maximum(edge("start", pad=True), starts)
        ends = [np.minimum(lengths + edge("stop", pad=pad), stops) for pad in (False, True)]
        whole, counts = (np.where(fits, end - first, 0) for end in ends)
        if not (whole > 0).any():
            counts[:] = 0  # the end of the chunk would never be learned
        used = counts > 0
        self._members, self._pieces, self._first = pieces, pieces[used], first[used]
        self._ends = np.cumsum(counts[used])
        self._lengths: dict[int, int] = {}  # by kind
        self._placed: dict[float, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def episodes(self) -> int:
        return len(np.unique(self._plan.episodes[self._pieces]))

    @property
    def share_of_steps(self) -> float:
        """Of the steps of its episodes, those at which the task can be filled."""
        return len(self) / self._steps

    @property
    def left_out(self) -> tuple[float, float]:
        """Of the steps of its episodes, those before the first moments and those after the last."""
        early = int((self._first - self._plan.starts[self._pieces]).sum())
        return early / self._steps, (self._steps - len(self) - early) / self._steps

    @property
    def _steps(self) -> int:
        return int((self._plan.stops[self._pieces] - self._plan.starts[self._pieces]).sum())

    def sample(self, k: int, seed: int) -> Sample:
        """The k-th visit, k from 0 without end."""
        epoch, place = divmod(k, len(self))
        at = permute(place, len(self), seed ^ (self.index << 20) ^ (epoch * 0x9E3779B1))
        piece, now = self._at(at)
        variant = _mix64(seed + 0x51ED27 * (k + 1) + self.index) >> 33
        draw = lambda number: _mix64(seed ^ 0x632BE59B * (k + 1) ^ self.index << 40 ^ number << 8)
        return self._finish(piece, now, variant, self._visible_steps(piece, k, seed), draw)

    def moment(self, place: int) -> Sample:
        """The place-th moment in file order, first phrasing, the nearest of a range of offsets: for evaluation."""
        return self._finish(*self._at(place), 0)

    def longest(self) -> Sample:
        """A sample of the longest sequence."""
        plan = self._plan
        variants = np.diff(plan.first)[self._pieces]
        owner = np.repeat(np.arange(len(self._pieces)), variants)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(variants) - variants, variants)
        kinds, found = np.unique(plan.kind_ids[plan.first[self._pieces][owner] + place], return_index=True)
        at = found[max(range(len(kinds)), key=lambda i: self._length(int(kinds[i])))]
        return self._finish(int(self._pieces[owner[at]]), int(self._first[owner[at]]), int(place[at]))

    def why_empty(self) -> str:
        """What the episodes lack to fill the task."""
        if not len(self._members):
            return "no episodes in this split"
        kinds = np.unique(self._plan.kind_ids[self._plan.first[self._members]])
        missing = [self.task.missing(self._visible(self._plan.kinds[k])) for k in kinds]
        if all(missing):
            there = {stream for k in kinds for stream in self._visible(self._plan.kinds[k])}
            return f"no {lacking(min(missing, key=len), there)}"
        found = f"episodes of at most {self._plan.lengths[self._plan.episodes[self._members]].max()} steps"
        cut = len(self._members) > len(np.unique(self._plan.episodes[self._members]))
        return found + (", with no room at the steps that their texts belong to" if cut else "")

    def _at(self, place: int) -> tuple[int, int]:
        """The piece and the step of the place-th moment."""
        slot = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[slot - 1]) if slot else 0
        return int(self._pieces[slot]), int(self._first[slot]) + place - before

    def _visible_steps(self, piece: int, k: int, seed: int) -> int | None:
        """None for a sample that is learned token by token; else half begin to hide tokens with the first."""
        if not self.parallel:
            return None
        draw = _mix64(seed ^ 0x2545F491 * (k + 1) ^ self.index << 40)
        if (draw & 0xFFFFFF) >= self.parallel * 0x1000000:
            return None
        chunk = self.task.final_chunk
        assert chunk is not None
        assert chunk.length is not None
        first = draw >> 24 & 1
        rate = self._plan.kinds[self._plan.kind(piece)].rate_hz
        return 0 if first else (draw >> 32) % chunk.length.steps(rate)

    def _finish(
        self,
        piece: int,
        now: int,
        variant: int,
        visible: int | None = None,
        draw: Callable[[int], int] | None = None,
    ) -> Sample:
        """draw: a random number for the n-th range of offsets; None takes the nearest offset."""
        plan = self._plan
        episode, variant = int(plan.episodes[piece]), variant % plan.variants(piece)
        kind = plan.kind(piece, variant)
        offsets: tuple[int, ...] = ()
        if self.task.ranged:
            rate_hz, length = plan.kinds[kind].rate_hz, int(plan.lengths[episode])
            options = self.task.offsets_within(now, length, rate_hz, pad=True)
            offsets = tuple(o[draw(i) % len(o)] if draw is not None else min(o, key=abs) for i, o in enumerate(options))
        length = self._length(kind)
        return Sample(self.index, self.task_index, self.source, episode, now, variant, length, offsets, visible)

    def _length(self, number: int) -> int:
        if number not in self._lengths:
            kind = self._plan.kinds[number]
            if kind.rate_hz not in self._placed:
                self._placed[kind.rate_hz] = self.task.place(kind.rate_hz)
            self._lengths[number] = sequence_length(
                self._placed[kind.rate_hz],
                self._builder.layout,
                cameras=len(self._builder.views(kind.embodiment, kind.streams)),
                numbered=len(self._builder.numbered(kind.embodiment, kind.streams)) > 1,
                axes=dict(kind.axes),
                text_lengths=dict(kind.text_tokens),
            )
        return self._lengths[number]

    def _visible(self, kind: Kind) -> list[str]:
        return self._builder.visible(kind.embodiment, kind.streams)


def _mix64(x: int) -> int:
    """SplitMix64: a well-mixed 64-bit hash of an integer."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(place: int, size: int, key: int) -> int:
    """A bijection of 0 .. size - 1 chosen by `key`: a four-round Feistel network with cycle walking.

    Any element of the permutation costs the same and nothing is stored, so an epoch over a billion
    samples needs no shuffled list.
    """
    if size == 1:
        return 0
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for round_ in range(4):
            left, right = right, left ^ (_mix64(key * 4 + round_ + (right << 64 - half)) & mask)
        place = (left << half) | right
        if place < size:
            return place
