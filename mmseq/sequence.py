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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np

from mmseq.errors import TaskError
from mmseq.tasks import END, SCALAR_STREAMS, TEXT_STREAMS, VECTOR_STREAMS, VISION_STREAMS, PlacedSegment, Task
from mmseq.vocabulary import RANGE_OF_STREAM, Vocabulary

# Slots tell the model where inside its frame or chunk a given token lies, which RoPE alone teaches
# slowly. In a predicted segment a position carries the slot of the token it must predict, so that
# it knows which axis or place comes next; after the last token it begins again, where nothing is learned.
FRAME_SLOTS = 256
CHUNK_SLOTS = 256
_SLOT_SIZES = {
    "none": 1,
    "vision": FRAME_SLOTS,
    "merged": FRAME_SLOTS,
    "action": CHUNK_SLOTS,
    "proprio": CHUNK_SLOTS,
    "next vision": FRAME_SLOTS,
    "next action": CHUNK_SLOTS,
    "next proprio": CHUNK_SLOTS,
}
_FIRST_SLOT = dict(zip(_SLOT_SIZES, accumulate(_SLOT_SIZES.values(), initial=0)))
SLOTS = sum(_SLOT_SIZES.values())


class TokenSource(Protocol):
    """Tokens of one episode, as the tokenizers made them. Arrays hold codes, not vocabulary ids."""

    rate_hz: float
    embodiment: str | None

    def __len__(self) -> int: ...

    @property
    def streams(self) -> Sequence[str]:
        """`text`, `image.<camera>`, `action`, ...: what this episode can fill."""
        ...

    def text(self, stream: str, variant: int) -> np.ndarray:
        """Text codes (length,) with the end token; `variant` picks a phrasing."""
        ...

    def vision(self, camera: str, start: int, stop: int) -> np.ndarray:
        """Codes (frames, tokens per frame) of one camera."""
        ...

    def vector(self, stream: str, start: int, stop: int) -> np.ndarray:
        """Codes (steps, axes) of `action` or `proprio`."""
        ...

    def scalar(self, stream: str, step: int) -> int:
        """The code of `progress` or `success` at a step."""
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
    """Ids of one document and what they are. L positions, M merged positions, P codes per merge.

    ids (L,) int64; slots (L,) int64; copies (L,) int64, the vision id that the *next* id may repeat, or
    NOTHING; patch_at (M,) positions of merged vision; patch_ids (M, P); target_at (N,) positions whose
    next id is learned, and target_range (N,) its range by name index into `RANGES`; masked (K,) positions
    that show the model `<mask>` in place of their id.
    """

    ids: np.ndarray
    slots: np.ndarray
    copies: np.ndarray
    patch_at: np.ndarray
    patch_ids: np.ndarray
    target_at: np.ndarray
    target_range: np.ndarray
    segments: list[SegmentSpan] = field(default_factory=list)
    masked: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)


NOTHING = -1  # to copy
_AT_END = 1 << 40  # the step of a frame at `@end`, after all others
RANGES = ("text", "vision", "action", "proprio", "latent", "progress", "success")


@dataclass(frozen=True)
class Layout:
    """What fixes the length of a sequence besides its task: the tokenizers' sizes and the merge."""

    grid: tuple[int, int]
    merge: int = 2

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def frame_positions(self, predicted: bool) -> int:
        """Positions that one frame takes."""
        return self.frame_tokens if predicted else self.frame_tokens // self.merge**2

    def __post_init__(self):
        if self.merge < 1 or self.grid[0] % self.merge or self.grid[1] % self.merge:
            raise TaskError(f"merge {self.merge} does not divide the vision grid {self.grid}")
        if self.frame_tokens > FRAME_SLOTS:
            raise TaskError(f"a frame has {self.frame_tokens} tokens, at most {FRAME_SLOTS} are supported")


class SequenceBuilder:
    """Turns (task, tokens, now) into a TokenSequence, step by step, so that decoding can pause
    after each header and continue with what the model wrote."""

    def __init__(self, vocabulary: Vocabulary, layout: Layout, cameras: dict[str | None, Sequence[str]] | None = None):
        """cameras: the cameras of each embodiment in order; others use the episode's own order."""
        self.vocabulary = vocabulary
        self.layout = layout
        self.cameras = cameras or {}

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
        if segment.stream not in VISION_STREAMS:
            return (None,)
        known = self.views(tokens.embodiment, tokens.streams)
        if segment.segment.camera:
            if segment.segment.camera not in known:
                raise TaskError(f"no camera {segment.segment.camera!r} in this episode; it has {known}")
            return (segment.segment.camera,)
        if not known:
            present = [s for s in tokens.streams if s.startswith("image.")]
            raise TaskError(
                f"{segment.segment}: this episode has no camera of embodiment {tokens.embodiment!r}; it has {present}"
            )
        return known

    def numbered(self, embodiment: str | None, streams: Sequence[str]) -> Sequence[str]:
        """The cameras that headers number: those of the contract, else the episode's own."""
        if embodiment in self.cameras:
            return self.cameras[embodiment]
        return [s.removeprefix("image.") for s in streams if s.startswith("image.")]

    def views(self, embodiment: str | None, streams: Sequence[str]) -> Sequence[str]:
        """What `image` stands for: the cameras of the contract that the episode has."""
        return [c for c in self.numbered(embodiment, streams) if f"image.{c}" in streams]

    def codes(
        self, segment: PlacedSegment, camera: str | None, tokens: TokenSource, now: int, variant: int
    ) -> np.ndarray:
        """The tokenizer codes that fill a segment: (n,), (frames, tokens) or (steps, axes)."""
        stream = segment.stream
        if stream in TEXT_STREAMS:
            return tokens.text(stream, variant)
        if stream in VISION_STREAMS:
            assert camera is not None
            if stream == "demo":
                return self._demo(tokens, camera, segment)
            if segment.segment.offset == END:
                return tokens.vision(camera, len(tokens) - 1, len(tokens))
        assert segment.start is not None
        assert segment.stop is not None
        start, stop = now + segment.start, now + segment.stop
        if start < 0 or stop > len(tokens):
            raise TaskError(
                f"{segment.segment} at step {now} needs steps {start} to {stop - 1} "
                f"of an episode of {len(tokens)} steps"
            )
        if stream in VISION_STREAMS:
            assert camera is not None
            return tokens.vision(camera, start, stop)
        if stream in VECTOR_STREAMS:
            return tokens.vector(stream, start, stop)
        if stream in SCALAR_STREAMS:
            return np.array([tokens.scalar(stream, stop - 1)])
        raise TaskError(f"{stream!r} has no tokenizer here: train a latent-action tokenizer first")

    def _padded(self, segment: PlacedSegment, tokens: TokenSource, now: int) -> tuple[np.ndarray, int]:
        """Codes (steps, axes) of a chunk whose last steps may lie after the episode, and how many codes these have."""
        assert segment.start is not None
        assert segment.stop is not None
        inside = min(segment.stop, len(tokens) - now)
        codes = self.codes(replace(segment, stop=max(inside, segment.start + 1)), None, tokens, now, 0)
        missing = segment.stop - segment.start - len(codes)
        return np.concatenate([codes, np.repeat(codes[-1:], missing, axis=0)]), missing * codes.shape[1]

    def _demo(self, tokens: TokenSource, camera: str, segment: PlacedSegment) -> np.ndarray:
        assert segment.segment.length is not None
        count = segment.segment.length.steps(tokens.rate_hz)
        steps = np.linspace(0, len(tokens) - 1, count).round().astype(int)
        return np.concatenate([tokens.vision(camera, int(s), int(s) + 1) for s in steps])


@lru_cache(1024)
def _constant(value: int, count: int) -> np.ndarray:
    """One array (count,) for all sequences: copy, do not change."""
    array = np.full(count, value, dtype=np.int64)
    array.flags.writeable = False
    return array


@dataclass
class _Open:
    """The predicted segment that a draft is writing. period: tokens of a frame, or slots of a chunk.

    before: ids (tokens,) that the frame being written may repeat.
    """

    range_name: str
    period: int
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
        vocabulary = builder.vocabulary
        self.ids: list[np.ndarray] = []
        self.slots: list[np.ndarray] = []
        self.copies: list[np.ndarray] = []
        self.length = 0
        self.patch_at: list[np.ndarray] = []
        self.patch_ids: list[np.ndarray] = []
        self.target_at: list[np.ndarray] = []
        self.target_range: list[np.ndarray] = []
        self.segments: list[SegmentSpan] = []
        self._frames: dict[str, dict[int, np.ndarray]] = {}  # by camera and step
        self._open: _Open | None = None
        start = [vocabulary.structure("<bos>"), vocabulary.embodiment(tokens.embodiment)]
        self._add(np.array(start, dtype=np.int64))

    def _add(self, ids: np.ndarray, slots: np.ndarray | None = None, copies: np.ndarray | None = None) -> int:
        start = self.length
        self.ids.append(ids)
        self.slots.append(_constant(0, len(ids)) if slots is None else slots)
        self.copies.append(_constant(NOTHING, len(ids)) if copies is None else copies)
        self.length += len(ids)
        return start

    def header(self, segment: PlacedSegment, camera: str | None) -> None:
        """Add the header that a task supplies."""
        ids = np.array(self._header_ids(segment, camera), dtype=np.int64)
        slots = copies = self._open = None
        if segment.predicted:
            self._open = current = self._opened(segment, camera)
            slots, copies = np.zeros(len(ids), dtype=np.int64), np.full(len(ids), NOTHING, dtype=np.int64)
            slots[-1] = self._slots_after(current.range_name, current.period, -1, 1)[0]
            copies[-1] = NOTHING if current.before is None else current.before[0]
        self._add(ids, slots, copies)

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
            ids.append(vocabulary.time(offset.steps(tokens.rate_hz) / tokens.rate_hz))  # type: ignore[union-attr]
        elif segment.stream == "video":
            ids.append(vocabulary.time(1 / tokens.rate_hz))
        return ids

    def content(self, segment: PlacedSegment, camera: str | None, codes: np.ndarray, padding: int = 0) -> None:
        """Fill the segment whose header was added last. padding: as in `SegmentSpan`."""
        stream = segment.stream
        range_name = RANGE_OF_STREAM[stream]
        if segment.predicted:
            start = self.length
            self.write(codes.reshape(-1))
            learned = self.length - start - padding
            self.target_at.append(np.arange(start - 1, start - 1 + learned))
            self.target_range.append(_constant(RANGES.index(range_name), learned))
        else:
            ids = self.builder.vocabulary.encode(range_name, codes)
            if camera is not None and stream != "demo":
                first = _AT_END if segment.start is None else self.now + segment.start
                self._frames.setdefault(camera, {}).update((first + i, frame) for i, frame in enumerate(ids))
            if stream in VISION_STREAMS and self.builder.layout.merge > 1:
                start = self._merged(ids)
            else:
                start = self._add(ids.reshape(-1), self._given_slots(range_name, ids.shape))
        step = None if segment.start is None else self.now + segment.start
        self.segments.append(SegmentSpan(stream, segment.predicted, start, self.length, step, camera, padding))

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
            slots = self._slots_after(current.range_name, current.period, first, len(part))
            copies = np.full(len(part), NOTHING, dtype=np.int64)
            if current.before is not None:
                place = first % current.period + 1
                copies[: current.period - place] = current.before[place : place + len(part)]
            self._add(part, slots, copies)
            if current.camera is not None and current.written % current.period == 0:
                whole = len(part) == current.period
                current.before = part if whole else np.concatenate(self.ids)[-current.period :]
                self._frames.setdefault(current.camera, {})[current.step] = current.before
                current.step += 1
                copies[-1] = current.before[0]

    def _opened(self, segment: PlacedSegment, camera: str | None) -> _Open:
        range_name = RANGE_OF_STREAM[segment.stream]
        if camera is None:
            return _Open(range_name, CHUNK_SLOTS)
        step = _AT_END if segment.start is None else self.now + segment.start
        return _Open(range_name, self.builder.layout.frame_tokens, camera, step, self._frame_before(camera, step))

    def _frame_before(self, camera: str, step: int) -> np.ndarray | None:
        """Ids (tokens,) of the nearest earlier frame of a camera, else of the nearest later one."""
        frames = self._frames.get(camera)
        if not frames:
            return None
        earlier = [s for s in frames if s < step]
        return frames[max(earlier) if earlier else min(frames)]

    @staticmethod
    @lru_cache(1024)
    def _slots_after(range_name: str, period: int, first: int, count: int) -> np.ndarray:
        """The slots of the tokens after tokens first .. first + count - 1 of a predicted segment. As `_given_slots`."""
        base = _FIRST_SLOT.get(f"next {range_name}")
        if base is None:
            return np.zeros(count, dtype=np.int64)
        return base + (np.arange(first, first + count) + 1) % period

    @staticmethod
    @lru_cache(1024)
    def _given_slots(range_name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The place of each token in its frame or chunk. One array for all sequences: copy, do not change."""
        count = int(np.prod(shape))
        if range_name not in _FIRST_SLOT:
            return np.zeros(count, dtype=np.int64)
        period = shape[-1] if range_name in ("vision", "merged") else CHUNK_SLOTS
        return _FIRST_SLOT[range_name] + np.arange(count) % period

    def _merged(self, ids: np.ndarray) -> int:
        patches = merge_codes(ids, self.builder.layout)  # (frames, positions, codes per position)
        frames, positions, width = patches.shape
        patch_token = self.builder.vocabulary.structure("<patch>")
        slots = self._given_slots("merged", (frames, positions))
        start = self._add(_constant(patch_token, frames * positions), slots)
        self.patch_at.append(np.arange(start, self.length))
        self.patch_ids.append(patches.reshape(-1, width))
        return start

    def masks(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and slots of `count` masks in the places of the next tokens of the open segment."""
        assert self._open is not None
        ids = np.full(count, self.builder.vocabulary.structure("<mask>"), dtype=np.int64)
        return ids, self._slots_after(self._open.range_name, self._open.period, self._open.written, count)

    def guesses(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and slots of codes (n,) in the places of the next tokens of the open segment, which are not written."""
        assert self._open is not None
        ids = self.builder.vocabulary.encode(self._open.range_name, np.asarray(codes, dtype=np.int64))
        return ids, self._slots_after(self._open.range_name, self._open.period, self._open.written, len(codes))

    def tokens_from(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, slots and copies of the tokens from position `start` on."""
        for parts in (self.ids, self.slots, self.copies):
            parts[:] = [np.concatenate(parts)]
        return self.ids[0][start:], self.slots[0][start:], self.copies[0][start:]

    def finish(self) -> TokenSequence:
        """Close with `<eos>`; the arrays."""
        self._add(np.array([self.builder.vocabulary.structure("<eos>")], dtype=np.int64))
        width = self.builder.layout.merge**2
        join = lambda parts, empty: np.concatenate(parts) if parts else empty
        none = np.zeros(0, dtype=np.int64)
        return TokenSequence(
            ids=np.concatenate(self.ids),
            slots=np.concatenate(self.slots),
            copies=np.concatenate(self.copies),
            patch_at=join(self.patch_at, none),
            patch_ids=join(self.patch_ids, np.zeros((0, width), dtype=np.int64)),
            target_at=join(self.target_at, none),
            target_range=join(self.target_range, none),
            segments=self.segments,
        )


def void_sequence(vocabulary: Vocabulary, layout: Layout) -> TokenSequence:
    """A sequence that says nothing and teaches nothing."""
    none = np.zeros(0, dtype=np.int64)
    ids = np.array([vocabulary.structure(t) for t in ("<bos>", "<no_embodiment>", "<eos>")], dtype=np.int64)
    patches = np.zeros((0, layout.merge**2), dtype=np.int64)
    return TokenSequence(ids, np.zeros(3, np.int64), np.full(3, NOTHING), none, patches, none, none)


def merge_codes(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """(frames, tokens) codes in raster order -> (frames, positions, merge * merge)."""
    rows, columns = layout.grid
    m = layout.merge
    blocks = codes.reshape(-1, rows // m, m, columns // m, m).transpose(0, 1, 3, 2, 4)
    return blocks.reshape(len(blocks), -1, m * m)


def split_codes(patches: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `merge_codes`: (frames, positions, merge * merge) -> (frames, tokens)."""
    rows, columns = layout.grid
    m = layout.merge
    blocks = patches.reshape(-1, rows // m, columns // m, m, m).transpose(0, 1, 3, 2, 4)
    return blocks.reshape(len(blocks), -1)


def sequence_length(
    placed: Sequence[PlacedSegment],
    layout: Layout,
    *,
    rate_hz: float,
    cameras: int,
    numbered: bool,
    axes: dict[str, int],
    text_lengths: dict[str, int],
) -> int:
    """The length `SequenceBuilder.build` will give, from metadata alone (packing needs no data).

    cameras: how many `image` stands for. numbered: whether headers name the camera. axes: axes of
    `action` and `proprio`. text_lengths: tokens of each text stream, its end token included.
    """
    total = 3  # <bos> <embodiment> ... <eos>
    for p in placed:
        segment = p.segment
        timed = segment.offset is not None or segment.stream == "video"
        if segment.stream in TEXT_STREAMS:
            total += 1 + text_lengths[segment.stream]
        elif segment.stream in VISION_STREAMS:
            if segment.stream == "demo":
                assert segment.length is not None
                frames = segment.length.steps(rate_hz)
            else:
                frames = 1 if p.start is None else p.stop - p.start  # type: ignore[operator]
            per_frame = layout.frame_positions(p.predicted)
            views = 1 if segment.camera else cameras
            total += views * (1 + numbered + timed + frames * per_frame)
        elif segment.stream in VECTOR_STREAMS:
            total += 1 + timed + (p.stop - p.start) * axes[segment.stream]  # type: ignore[operator]
        else:
            total += 2 + timed
    return total
