"""TokenSequence: one task filled with one episode's tokens, and the builder that makes it.

    <bos> <embodiment>  header tokens...  header tokens...  <eos>

A segment is a header (the stream's token; then, where it applies, the camera and the time offset)
and its tokens. The header of a predicted segment is supplied by the task, also when decoding, so
the model never guesses structure and every token it writes comes from one known range. Text ends
with its tokenizer's end token, which lies in the text range.

Given vision is merged: `merge` x `merge` neighbouring codes share one position. Predicted vision has
one position per code, and each of them is told which code stands at its place in the frame before:
most codes of a video stay, so the model learns what changes instead of learning to copy.

A sequence that ends with a chunk of actions may hide the chunk's tokens from each other, from a step on:
`<mask>` stands in their places, which say by their slots what comes next. A model that has learned this decodes
many tokens in one pass (parallel decoding: Kim, Finn and Liang 2025, OpenVLA-OFT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from mmseq.errors import TaskError
from mmseq.grammar import END
from mmseq.inputs import ModelInput
from mmseq.layout import Layout, merge_codes, says_its_rate
from mmseq.streams import IMAGE_PREFIX, VECTOR
from mmseq.tasks import PlacedSegment, Task
from mmseq.vocabulary import Vocabulary

NOTHING = -1  # to copy
_AT_END = 1 << 40  # the step of a frame at `@end`, after all others


class TokenSource(Protocol):
    """Tokens of one episode, as the tokenizers made them. Arrays hold codes, not vocabulary ids."""

    rate_hz: float
    embodiment: str | None

    def __len__(self) -> int: ...

    @property
    def streams(self) -> Sequence[str]:
        """`text`, `image.<camera>`, `action`, ...: what this episode can fill."""
        ...

    def codes(self, stream: str, start: int, stop: int, variant: int = 0) -> np.ndarray:
        """The codes of one of `streams` at steps start .. stop - 1.

        Of text (n,), that of step `start` with its end token, in the phrasing that `variant` picks; of a camera
        (steps, tokens per frame); of a vector (steps, axes); of a scalar (steps,).
        """
        ...

    def demonstration(self) -> TokenSource:
        """What shows how the task is done."""
        ...

    def features(self, camera: str, start: int, stop: int) -> np.ndarray:
        """Features float32 (steps, positions, F) of a camera's frames; asked for only where `Layout.soft` is set."""
        ...


@dataclass
class SegmentSpan:
    """Where a segment lies in its sequence: tokens start .. stop - 1, after the header.

    padding: how many tokens at its end stand for steps after the episode, of which nothing is learned.
    """

    stream: str
    predicted: bool
    start: int
    stop: int
    step: int | None
    camera: str | None = None
    padding: int = 0


@dataclass
class TokenSequence:
    """One document as the model reads it, and what its parts are.

    target_at (N,): positions whose next id is learned, target_range (N,) its range, numbered in the vocabulary's
    order; masked (K,): positions that show the model `<mask>` in place of their id.
    """

    input: ModelInput
    target_at: np.ndarray
    target_range: np.ndarray
    segments: list[SegmentSpan] = field(default_factory=list)
    masked: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def ids(self) -> np.ndarray:
        return self.input.ids

    def __len__(self) -> int:
        return len(self.input)


class SequenceBuilder:
    """Turns (task, tokens, now) into a TokenSequence, step by step, so that decoding can pause
    after each header and continue with what the model wrote."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        layout: Layout,
        cameras: Mapping[str, Sequence[str]] | None = None,
        axes: Mapping[str, Mapping[str, int]] | None = None,
    ):
        """cameras: those of each embodiment in order; others use the episode's own. axes: how many each vector stream
        of each embodiment has."""
        self.vocabulary = vocabulary
        self.layout = layout
        self.cameras = cameras or {}
        self._axes = axes or {}
        self.range_numbers = {name: i for i, name in enumerate(vocabulary.ranges)}

    def build(
        self,
        task: Task,
        tokens: TokenSource,
        now: int,
        variant: int = 0,
        *,
        placed: Sequence[PlacedSegment] | None = None,
        visible: int | None = None,
        pad: bool = False,
    ) -> TokenSequence:
        """The whole sequence with its learning targets.

        variant: which phrasing of each text. visible: of a task that ends with a chunk, the steps of it that its
        later tokens see; None: each token sees all before it. pad: a chunk that the task ends with may go beyond the
        end of the episode; its last action fills the rest, of which nothing is learned (as LeRobot's `action_is_pad`).
        Raises: TaskError when the episode cannot fill it.
        """
        task = task.nearest(tokens.rate_hz) if placed is None else task
        draft = Draft(self, tokens, now)
        axes = 1
        for segment in placed if placed is not None else task.place(tokens.rate_hz):
            for camera in self.expand(segment, tokens):
                draft.header(segment, camera)
                if pad and segment.segment is task.final_chunk:
                    codes, padding = self._padded(segment, tokens, now)
                else:
                    codes, padding = self.codes(segment, camera, tokens, now, variant), 0
                draft.content(segment, camera, codes, padding)
                axes = codes.shape[-1]
        sequence = draft.finish()
        if visible is not None:
            chunk = sequence.segments[-1]
            sequence.masked = np.arange(chunk.start + visible * axes, chunk.stop - 1)
        return sequence

    def expand(self, segment: PlacedSegment, tokens: TokenSource) -> Sequence[str | None]:
        """`image` is every camera of the embodiment, in its order."""
        if not segment.row.kind.cameras:
            return (None,)
        known = self.views(tokens.embodiment, tokens.streams)
        if segment.segment.camera:
            if segment.segment.camera not in known:
                raise TaskError(f"no camera {segment.segment.camera!r} in this episode; it has {known}")
            return (segment.segment.camera,)
        if not known:
            present = [s for s in tokens.streams if s.startswith(IMAGE_PREFIX)]
            raise TaskError(
                f"{segment.segment}: this episode has no camera of embodiment {tokens.embodiment!r}; it has {present}"
            )
        return known

    def numbered(self, embodiment: str | None, streams: Sequence[str]) -> Sequence[str]:
        """The cameras that headers number: those of the contract, else the episode's own."""
        if embodiment is not None and embodiment in self.cameras:
            return self.cameras[embodiment]
        return [s.removeprefix(IMAGE_PREFIX) for s in streams if s.startswith(IMAGE_PREFIX)]

    def views(self, embodiment: str | None, streams: Sequence[str]) -> Sequence[str]:
        """What `image` stands for: the cameras of the contract that the episode has."""
        return [c for c in self.numbered(embodiment, streams) if f"{IMAGE_PREFIX}{c}" in streams]

    def visible(self, embodiment: str | None, streams: Sequence[str]) -> list[str]:
        """The streams of an episode, without cameras that its contract does not name."""
        views = self.views(embodiment, streams)
        return [s for s in streams if not s.startswith(IMAGE_PREFIX)] + [f"{IMAGE_PREFIX}{c}" for c in views]

    def axes(self, segment: PlacedSegment, embodiment: str | None) -> int:
        """Axes of a segment's stream; 1 of what is no vector.

        Raises: TaskError when the embodiment has no such stream.
        """
        if segment.row.kind is not VECTOR:
            return 1
        found = self._axes.get(embodiment or "", {}).get(segment.stream)
        if found is None:
            raise TaskError(f"embodiment {embodiment!r} has no {segment.stream}")
        self.layout.require(segment, found)
        return found

    def shape(self, segment: PlacedSegment, embodiment: str | None) -> tuple[int, ...] | None:
        """The shape of a segment's codes, of one camera; None for text, whose length its writer decides."""
        axes = self.axes(segment, embodiment)
        return segment.row.kind.shape(segment.steps, self.layout.frame_tokens, axes)

    def codes(
        self, segment: PlacedSegment, camera: str | None, tokens: TokenSource, now: int, variant: int
    ) -> np.ndarray:
        """The tokenizer codes that fill a segment: (n,), (frames, tokens) or (steps, axes)."""
        stream = segment.stream if camera is None else f"{IMAGE_PREFIX}{camera}"
        if segment.start is None or segment.stop is None:  # without a time
            if camera is None:
                return tokens.codes(stream, now, now + 1, variant)
            shown, steps = self.shown(segment, tokens, now)
            return np.concatenate([shown.codes(stream, step, step + 1) for step in steps])
        start, stop = now + segment.start, now + segment.stop
        if start < 0 or stop > len(tokens):
            raise TaskError(
                f"{segment.segment} at step {now} needs steps {start} to {stop - 1} "
                f"of an episode of {len(tokens)} steps"
            )
        return tokens.codes(stream, start, stop)

    @staticmethod
    def shown(segment: PlacedSegment, tokens: TokenSource, now: int) -> tuple[TokenSource, list[int]]:
        """Where the frames of a vision segment come from, and their steps; of a demonstration, evenly over it."""
        if segment.segment.offset == END:
            return tokens, [len(tokens) - 1]
        if segment.start is None or segment.stop is None:
            source = tokens.demonstration()
            return source, [int(step) for step in np.linspace(0, len(source) - 1, segment.steps).round()]
        return tokens, list(range(now + segment.start, now + segment.stop))

    def _padded(self, segment: PlacedSegment, tokens: TokenSource, now: int) -> tuple[np.ndarray, int]:
        """Codes (steps, axes) of a chunk whose last steps may lie after the episode, and how many codes these have."""
        assert segment.start is not None
        assert segment.stop is not None
        inside = min(segment.stop, len(tokens) - now)
        codes = self.codes(replace(segment, stop=max(inside, segment.start + 1)), None, tokens, now, 0)
        missing = segment.steps - len(codes)
        return np.concatenate([codes, np.repeat(codes[-1:], missing, axis=0)]), missing * codes.shape[1]


@lru_cache(1024)
def _constant(value: int, count: int) -> np.ndarray:
    """One array (count,) for all sequences: copy, do not change."""
    array = np.full(count, value, dtype=np.int64)
    array.flags.writeable = False
    return array


@dataclass
class _Open:
    """The predicted segment that a draft is writing. columns: of its places. period: tokens of a frame.

    before: ids (tokens,) that the frame being written may repeat.
    """

    range_name: str
    columns: int
    period: int = 1 << 40
    camera: str | None = None
    step: int = 0
    before: np.ndarray | None = None
    written: int = 0


class Draft:
    """A sequence under construction: `header` opens a segment, `content` fills it.

    Decoding fills a predicted segment with `write`, as many codes at a time as the model has chosen.
    """

    def __init__(self, builder: SequenceBuilder, tokens: TokenSource, now: int):
        self.builder = builder
        self.tokens = tokens
        self.now = now
        self.ids: list[np.ndarray] = []
        self.slots: list[np.ndarray] = []
        self.copies: list[tuple[int, np.ndarray]] = []  # first position, and vision ids that the *next* ids may repeat
        self.length = 0
        self.patches: list[tuple[int, np.ndarray]] = []  # first position, and merged ids (positions, P)
        self.soft: list[tuple[int, np.ndarray]] = []  # first position, and features (positions, F)
        self.target_at: list[np.ndarray] = []
        self.target_range: list[np.ndarray] = []
        self.segments: list[SegmentSpan] = []
        self._frames: dict[str, dict[int, np.ndarray]] = {}  # by camera and step
        self._open: _Open | None = None
        vocabulary = builder.vocabulary
        start = [vocabulary.structure("<bos>"), vocabulary.embodiment(tokens.embodiment)]
        self._add(np.array(start, dtype=np.int64))

    def _add(self, ids: np.ndarray, slots: np.ndarray | None = None) -> int:
        start = self.length
        self.ids.append(ids)
        self.slots.append(self.builder.layout.slots("none", 1, 0, len(ids)) if slots is None else slots)
        self.length += len(ids)
        return start

    def header(self, segment: PlacedSegment, camera: str | None) -> None:
        """Add the header that a task supplies."""
        ids = np.array(self._header_ids(segment, camera), dtype=np.int64)
        slots = self._open = None
        if segment.predicted:
            self._open = current = self._opened(segment, camera)
            slots = self.builder.layout.slots("none", 1, 0, len(ids)).copy()
            slots[-1] = self._slots_after(-1, 1)[0]
            if current.before is not None:
                self.copies.append((self.length + len(ids) - 1, current.before[:1]))
        self._add(ids, slots)

    def _header_ids(self, segment: PlacedSegment, camera: str | None) -> list[int]:
        vocabulary, tokens = self.builder.vocabulary, self.tokens
        ids = [vocabulary.header(segment.stream)]
        if camera is not None:
            cameras = self.builder.numbered(tokens.embodiment, tokens.streams)
            if len(cameras) > 1:
                ids.append(vocabulary.camera(list(cameras).index(camera)))
        offset = segment.segment.offset
        if offset == END:
            ids.append(vocabulary.structure("<at_end>"))
        elif offset is not None:
            seconds = offset.steps(tokens.rate_hz) / tokens.rate_hz  # type: ignore[union-attr]
            ids += [vocabulary.structure("<past>")] if seconds < 0 else []
            ids.append(vocabulary.time(abs(seconds)))
        elif says_its_rate(segment):
            ids.append(vocabulary.time(1 / tokens.rate_hz))
        return ids

    def content(self, segment: PlacedSegment, camera: str | None, codes: np.ndarray, padding: int = 0) -> None:
        """Fill the segment whose header was added last. padding: as in `SegmentSpan`."""
        row, layout = segment.row, self.builder.layout
        step = None if segment.start is None else self.now + segment.start
        if segment.predicted:
            start = self.length
            self.write(codes.reshape(-1))
            learned = self.length - start - padding
            self.target_at.append(np.arange(start - 1, start - 1 + learned))
            self.target_range.append(_constant(self.builder.range_numbers[row.range], learned))
        else:
            ids = self.builder.vocabulary.encode(row.range, codes)
            if camera is not None and row.timed:
                first = _AT_END if step is None else step
                self._frames.setdefault(camera, {}).update((first + i, frame) for i, frame in enumerate(ids))
            if camera is not None and (layout.merge > 1 or layout.soft):
                start = self._condensed(ids, camera, segment, step)
            else:
                columns = layout.grid[1] if camera is not None else ids.shape[-1]
                start = self._add(ids.reshape(-1), layout.slots(row.range, columns, 0, ids.size))
        self.segments.append(SegmentSpan(segment.stream, segment.predicted, start, self.length, step, camera, padding))

    def _condensed(self, ids: np.ndarray, camera: str, segment: PlacedSegment, step: int | None) -> int:
        """Given frames as positions that carry several codes each, or an encoder's features."""
        layout = self.builder.layout
        positions, columns = len(ids) * layout.frame_positions(False), layout.tables["merged"][2]
        if layout.flat:
            columns = layout.frame_positions(False)
        patch = _constant(self.builder.vocabulary.structure("<patch>"), positions)
        start = self._add(patch, layout.slots("merged", columns, 0, positions))
        if layout.soft:
            source, steps = self.builder.shown(segment, self.tokens, self.now)
            features = np.concatenate([source.features(camera, step, step + 1) for step in steps])
            self.soft.append((start, features.reshape(positions, -1)))
        else:
            self.patches.append((start, merge_codes(ids, layout).reshape(positions, -1)))
        return start

    def write(self, codes: np.ndarray) -> None:
        """Go on with the predicted segment whose header was added last. codes (n,), in their range."""
        assert self._open is not None
        current = self._open
        ids = self.builder.vocabulary.encode(current.range_name, np.asarray(codes, dtype=np.int64))
        while len(ids):  # frame by frame, as each frame may repeat the one before
            room = current.period - current.written % current.period
            part, ids = ids[:room], ids[room:]
            first = current.written
            current.written += len(part)
            if current.before is not None:
                place = first % current.period + 1
                self.copies.append((self.length, current.before[place : place + len(part)]))
            self._add(part, self._slots_after(first, len(part)))
            if current.camera is not None and current.written % current.period == 0:
                whole = len(part) == current.period
                current.before = part if whole else np.concatenate(self.ids)[-current.period :]
                self._frames.setdefault(current.camera, {})[current.step] = current.before
                current.step += 1
                self.copies.append((self.length - 1, current.before[:1]))

    def _opened(self, segment: PlacedSegment, camera: str | None) -> _Open:
        layout, name = self.builder.layout, segment.row.range
        if camera is None:
            return _Open(name, self.builder.axes(segment, self.tokens.embodiment))
        step = _AT_END if segment.start is None else self.now + segment.start
        return _Open(name, layout.grid[1], layout.frame_tokens, camera, step, self._frame_before(camera, step))

    def _frame_before(self, camera: str, step: int) -> np.ndarray | None:
        """Ids (tokens,) of the nearest earlier frame of a camera, else of the nearest later one."""
        frames = self._frames.get(camera)
        if not frames:
            return None
        earlier = [s for s in frames if s < step]
        return frames[max(earlier) if earlier else min(frames)]

    def _slots_after(self, first: int, count: int) -> np.ndarray:
        """The slots of the tokens after tokens first .. first + count - 1 of the open segment."""
        assert self._open is not None
        return self.builder.layout.slots(f"next {self._open.range_name}", self._open.columns, first + 1, count)

    def masks(self, count: int) -> ModelInput:
        """`count` masks in the places of the next tokens of the open segment."""
        return self._ahead(np.full(count, self.builder.vocabulary.structure("<mask>"), dtype=np.int64))

    def guesses(self, codes: np.ndarray) -> ModelInput:
        """Codes (n,) in the places of the next tokens of the open segment, which are not written."""
        assert self._open is not None
        return self._ahead(self.builder.vocabulary.encode(self._open.range_name, np.asarray(codes, dtype=np.int64)))

    def _ahead(self, ids: np.ndarray) -> ModelInput:
        assert self._open is not None
        return self._of_ids(ids, self._slots_after(self._open.written, len(ids)))

    def _of_ids(self, ids: np.ndarray, slots: np.ndarray) -> ModelInput:
        width = self.soft[0][1].shape[1] if self.soft else 0
        return ModelInput.of_ids(ids, slots, merge=self.builder.layout.merge, soft=width)

    @property
    def may_repeat(self) -> int:
        """The vision id that the next id may repeat, or NOTHING."""
        at, ids = self.copies[-1] if self.copies else (0, np.zeros(0, np.int64))
        return int(ids[-1]) if len(ids) and at + len(ids) == self.length else NOTHING

    def input(self, start: int = 0) -> ModelInput:
        """What was written from position `start` on, counted from there."""
        for parts in (self.ids, self.slots):
            parts[:] = [np.concatenate(parts)]
        out = self._of_ids(self.ids[0][start:], self.slots[0][start:])
        out.patch_at, out.patch_ids = _from(start, self.patches, out.patch_ids)
        out.copy_at, out.copy_ids = _from(start, self.copies, out.copy_ids)
        out.soft_at, out.soft = _from(start, self.soft, out.soft)
        return out

    def finish(self) -> TokenSequence:
        """Close with `<eos>`; the arrays."""
        self._add(np.array([self.builder.vocabulary.structure("<eos>")], dtype=np.int64))
        join = lambda parts: np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        return TokenSequence(self.input(), join(self.target_at), join(self.target_range), self.segments)


def _from(start: int, parts: list[tuple[int, np.ndarray]], none: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of runs of values that begin at some position: those at `start` and after it, counted from there."""
    later = [(max(first, start), values[max(0, start - first) :]) for first, values in parts]
    later = [(first, values) for first, values in later if len(values)]
    if not later:
        return np.zeros(0, dtype=np.int64), none
    at = [np.arange(first - start, first - start + len(values)) for first, values in later]
    return np.concatenate(at), np.concatenate([values for _, values in later])


def void_sequence(builder: SequenceBuilder) -> TokenSequence:
    """A sequence that says nothing and teaches nothing."""
    names = ("<bos>", "<no_embodiment>", "<eos>")
    ids = np.array([builder.vocabulary.structure(token) for token in names], dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    slots = builder.layout.slots("none", 1, 0, len(ids))
    return TokenSequence(ModelInput.of_ids(ids, slots, merge=builder.layout.merge), none, none)
