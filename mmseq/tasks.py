"""Task: the parsed arrow. `text, image, proprio -> action[16]` says what is given and what is predicted.

Lengths and offsets are control steps, or seconds with an `s`. Everything is placed relative to
one moment, "now" (step t of the episode):

- a stream without length is what is observed at now; `@+n` moves it n steps into the future, `@-n` what is given
  into the past; from a range, `@+1..10`, each sample of training draws one;
- a *given* `video[n]`, and any other stream that is observed, is the past: the n frames that end with now; a
  *predicted* one is the future: the n frames after now;
- `action[n]` are the commands of the n steps that begin at now;
- a group advances now by the length of its commands (`action[n]`, `motion[n]`) each time.

How it is written is `grammar.py`; which streams there are says the table in `streams.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mmseq.errors import TaskError
from mmseq.grammar import ALIASES, END, Duration, DurationRange, Group, Parser, Segment
from mmseq.streams import IMAGE_PREFIX, StreamRow


@dataclass(frozen=True)
class PlacedSegment:
    """A segment in steps of one episode's clock, relative to now.

    start, stop: first step and one past the last; both None for streams without a time (text) and
    for `@end`. steps: how many it covers, also of one without a time. predicted: whether the model writes it.
    """

    segment: Segment
    start: int | None
    stop: int | None
    steps: int = 1

    @property
    def stream(self) -> str:
        return self.segment.stream

    @cached_property
    def row(self) -> StreamRow:
        return self.segment.row

    @cached_property
    def predicted(self) -> bool:
        return self.segment.predicted

    def span(self, now: int, length: int) -> tuple[int, int]:
        """First step and one past the last in an episode of `length` steps: of what has no time the step that is now,
        of `@end` the last one."""
        if self.start is None or self.stop is None:
            now = length - 1 if self.segment.offset == END else now
            return now, now + 1
        return now + self.start, now + self.stop


@dataclass(frozen=True)
class Task:
    """A parsed arrow. Equal arrows are equal tasks, whatever their spacing or name."""

    parts: tuple[Segment | Group, ...]

    @classmethod
    def parse(cls, text: str) -> Task:
        """Parse an arrow or the name of a built-in one.

        Raises: TaskError that shows the place, when the text is not a task.
        """
        if not isinstance(text, str):
            raise TaskError(f"a task is a line of text, got {type(text).__name__}")
        return cls(Parser(ALIASES.get(text.strip(), text)).parse())

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Every segment in order, groups written out."""
        out: list[Segment] = []
        for part in self.parts:
            if isinstance(part, Segment):
                out.append(part)
            else:
                out.extend(replace(s, repeat=i) for i in range(part.count) for s in part.segments)
        return tuple(out)

    @property
    def given(self) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if not s.predicted)

    @property
    def predicted(self) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if s.predicted)

    @property
    def final_chunk(self) -> Segment | None:
        """The chunk of commands that the task ends with, outside a group; None when it ends otherwise."""
        last = self.parts[-1]
        chunk = isinstance(last, Segment) and last.predicted and last.row.clock == "commanded" and last.length
        return last if chunk else None  # type: ignore[return-value]

    @property
    def group(self) -> Group | None:
        """What repeats in the task; None when nothing does."""
        return next((part for part in self.parts if isinstance(part, Group)), None)

    def with_count(self, count: int) -> Task:
        """The task with `count` repetitions of its group."""
        return Task(tuple(replace(p, count=count) if isinstance(p, Group) else p for p in self.parts))

    @property
    def alias(self) -> str | None:
        """The built-in name of an arrow with this shape, lengths and offsets aside."""
        return next((name for name, arrow in ALIASES.items() if _shape(Task.parse(arrow)) == _shape(self)), None)

    def __str__(self) -> str:
        def side(segments: tuple[Segment, ...]) -> str:
            given = ", ".join(str(s) for s in segments if not s.predicted)
            predicted = ", ".join(str(s) for s in segments if s.predicted)
            return (f"{given} -> {predicted}" if given else f"-> {predicted}") if predicted else given

        if all(isinstance(part, Segment) for part in self.parts):
            return side(tuple(p for p in self.parts if isinstance(p, Segment)))
        items = [str(p) if isinstance(p, Segment) else f"({side(p.segments)}) * {p.count}" for p in self.parts]
        return ", ".join(items)

    @property
    def ranged(self) -> tuple[Segment, ...]:
        """The segments whose offsets each sample draws."""
        return tuple(s for s in self.segments if isinstance(s.offset, DurationRange))

    def with_offsets(self, steps: Sequence[int]) -> Task:
        """The task with a drawn offset, in steps, in place of each range."""
        drawn = iter(steps)
        fixed = lambda s: replace(s, offset=Duration(float(next(drawn)))) if isinstance(s.offset, DurationRange) else s
        return Task(tuple(fixed(p) if isinstance(p, Segment) else p for p in self.parts))

    def nearest(self, rate_hz: float) -> Task:
        """The task with the offset nearest to now in place of each range."""
        return self.with_offsets([min(options, key=abs) for options in self._options(rate_hz)])

    def middle(self, rate_hz: float) -> Task:
        """The task with the offset in the middle of each range: the one to measure, where one has to stand for all."""
        return self.with_offsets([options[len(options) // 2] for options in self._options(rate_hz)])

    def _options(self, rate_hz: float) -> list[range]:
        """The steps of each range of offsets."""
        offsets = [s.offset for s in self.segments]
        return [offset.steps(rate_hz) for offset in offsets if isinstance(offset, DurationRange)]

    def require_fixed(self) -> None:
        """Raises: TaskError when an offset is a range, which only training draws from."""
        for segment in self.ranged:
            raise TaskError(
                f"{self} leaves open which offset {segment} means: only training draws one",
                fix=f"choose one, such as {replace(segment, offset=segment.offset.low)}",  # type: ignore[union-attr]
            )

    def covers(self, other: Task) -> bool:
        """Whether `other` is this task, with an offset out of each range or the same range."""
        if len(self.parts) != len(other.parts):
            return False
        return all(
            mine == theirs
            or (
                isinstance(mine, Segment)
                and isinstance(theirs, Segment)
                and isinstance(mine.offset, DurationRange)
                and isinstance(theirs.offset, Duration)
                and mine.offset.low.seconds == theirs.offset.seconds
                and mine.offset.low.value <= theirs.offset.value <= mine.offset.high.value
                and replace(mine, offset=theirs.offset) == theirs
            )
            for mine, theirs in zip(self.parts, other.parts)
        )

    def at_most(self, steps: int, rate_hz: float) -> Task:
        """The task with `steps` control steps of a clock of `rate_hz` in place of longer lengths and offsets ahead."""

        def short(of: Duration) -> Duration:
            most = Duration(steps / rate_hz, True) if of.seconds else Duration(float(steps))
            return most if of.steps(rate_hz) > steps else of

        def sized(segment: Segment) -> Segment:
            offset = segment.offset
            if isinstance(offset, DurationRange):
                low, high = short(offset.low), short(offset.high)
                offset = DurationRange(low, high) if low.value < high.value else low
            elif isinstance(offset, Duration):
                offset = short(offset)
            return replace(segment, length=segment.length and short(segment.length), offset=offset)

        sized_part = lambda p: (
            sized(p) if isinstance(p, Segment) else replace(p, segments=tuple(map(sized, p.segments)))
        )
        return Task(tuple(map(sized_part, self.parts)))

    def without(self, streams: Collection[str]) -> Task:
        """The task without given streams, where something else is left of its given side; groups stay as they are."""
        kept = [p for p in self.parts if isinstance(p, Group) or p.predicted or p.stream not in streams]
        left = any(isinstance(p, Group) or not p.predicted for p in kept)
        return Task(tuple(kept)) if left and not any(isinstance(p, Group) for p in self.parts) else self

    def names(self, stream: str, *, given: bool | None = None) -> bool:
        """Whether a stream stands in the task; given: on that side of the arrow only."""
        return any(s.stream == stream and (given is None or s.predicted != given) for s in self.segments)

    def place(self, rate_hz: float) -> tuple[PlacedSegment, ...]:
        """Where each segment lies relative to now, in steps of a clock of `rate_hz`. Of a range, the nearest offset."""
        if self.ranged:
            return self.nearest(rate_hz).place(rate_hz)
        stride = self.stride(rate_hz)
        placed = []
        for segment in self.segments:
            length = segment.length.steps(rate_hz) if segment.length else 1
            if not segment.row.timed or segment.offset == END:
                placed.append(PlacedSegment(segment, None, None, length))
                continue
            start = segment.repeat * stride
            if isinstance(segment.offset, Duration):
                start += segment.offset.steps(rate_hz)
            if segment.row.clock == "observed" and segment.length:
                start += 1 if segment.predicted else 1 - length
            placed.append(PlacedSegment(segment, start, start + length, length))
        return tuple(placed)

    def stride(self, rate_hz: float) -> int:
        """Steps from one repetition of the group to the next."""
        lengths = [
            s.length.steps(rate_hz)
            for part in self.parts
            if isinstance(part, Group)
            for s in part.segments
            if s.row.clock == "commanded" and s.length
        ]
        return max(lengths, default=1)

    def moments(self, length: int, rate_hz: float, *, pad: bool = False) -> range:
        """The steps t of an episode of `length` steps at which every segment lies inside it.

        Of a range of offsets the nearest one is enough. pad: of a chunk of commands that the task ends with, the first
        step is enough (`SequenceBuilder.build`).
        """
        chunk = len(self.segments) - 1 if pad and self.final_chunk is not None else None
        placed = enumerate(self.place(rate_hz))
        timed = [(i, p.start, p.stop) for i, p in placed if p.start is not None and p.stop is not None]
        stops = [start + 1 if i == chunk else stop for i, start, stop in timed]
        first = max((-start for _, start, _ in timed), default=0)
        last = length - max([1, *stops])
        return range(max(0, first), last + 1)

    def offsets_within(self, now: int, length: int, rate_hz: float, *, pad: bool = False) -> list[range]:
        """Of each range of offsets, in steps, those that stay inside an episode of `length` steps when it is `now`.

        pad: as for `moments`.
        """
        found = []
        for segment, placed in zip(self.segments, self.place(rate_hz)):
            if isinstance(segment.offset, DurationRange):
                options = segment.offset.steps(rate_hz)
                near = placed.segment.offset.steps(rate_hz)  # type: ignore[union-attr]
                start, stop = now + placed.start - near, now + placed.stop - near  # type: ignore[operator]
                stop = start + 1 if pad and segment is self.final_chunk else stop
                found.append(range(max(options.start, -start), min(options.stop, length - stop + 1)))
        return found

    def missing(self, streams: Collection[str], *, given_only: bool = False) -> list[str]:
        """What an episode with `streams` lacks for this task (`image` is there with any camera).

        given_only: a prediction needs no truth, so only the given side is asked for.
        """
        images = [name for name in streams if name.startswith(IMAGE_PREFIX)]
        lacking = []
        for segment in self.given if given_only else self.segments:
            if segment.row.kind.cameras:
                wanted = f"{IMAGE_PREFIX}{segment.camera}" if segment.camera else "image"
                present = wanted in streams if segment.camera else bool(images)
            else:
                wanted, present = segment.stream, segment.stream in streams
            if not present and wanted not in lacking:
                lacking.append(wanted)
        return lacking


def _shape(task: Task) -> tuple:
    return tuple(
        (s.stream, s.camera, s.predicted, s.offset if s.offset in (None, END) else s.at[1], s.repeat)
        for s in task.segments
    )
